"""Collectives: what arrives where, its gradient, and the bytes that were counted."""

from __future__ import annotations

import torch

from quintet.parallel.collectives import (
    Shift,
    all_to_all,
    gather_rows,
    gather_tokens,
    reduce_scatter,
    scatter_rows,
    scatter_tokens,
    start_all_to_all,
)
from quintet.parallel.mesh import make_mesh
from quintet.spec.layout import Layout
from tests.ranks import on_ranks


def test_gathering_tokens_and_scattering_sums_are_each_others_gradients() -> None:
    def work(rank: int) -> tuple[list[float], list[float], int]:
        group = make_mesh(Layout(tp=2))["tp"]
        x = torch.full((1, 1, 3), float(rank + 1), requires_grad=True)
        (whole,) = gather_tokens([x], group, dim=1)
        back = scatter_tokens(whole * (rank + 1), group, dim=1)
        back.sum().backward()
        assert x.grad is not None
        return back.flatten().tolist(), x.grad.flatten().tolist(), group.traffic.num_bytes

    # whole = [1, 2]; the ranks' terms are [1, 2] and [2, 4], so the sums are 3 and 6; the gradient of each token is 1 + 2.
    assert on_ranks(2, work) == [([3.0] * 3, [3.0] * 3, 4 * 12), ([6.0] * 3, [3.0] * 3, 4 * 12)]


def test_rows_go_to_their_rank_and_room_stays_behind_them() -> None:
    def work(rank: int) -> tuple[list[float], int, int]:
        group = make_mesh(Layout(dp=2, ep=2))["ep"]
        rows = torch.arange(3.0)[:, None] + 10 * rank
        send, receive = ([0, 3], [0, 1]) if rank == 0 else ([1, 2], [3, 2])
        got = start_all_to_all(rows, group, send=send, receive=receive, room=2).wait()
        return got[:-2].flatten().tolist(), len(got), group.traffic.num_bytes

    assert on_ranks(2, work) == [([10.0], 3, 12), ([0.0, 1.0, 2.0, 11.0, 12.0], 7, 4)]


def test_rows_of_all_ranks_are_gathered_and_their_terms_come_back() -> None:
    def work(rank: int) -> tuple[list[float], list[list[float]]]:
        group, counts = make_mesh(Layout(tp=3))["tp"], (2, 0, 1)
        rows = gather_rows(10.0 * rank + torch.arange(counts[rank]), group, counts=counts)
        return rows.tolist(), scatter_rows(rows + 100 * rank, group, counts=counts).tolist()

    whole = [0.0, 1.0, 20.0]
    terms = [[[0.0, 1.0], [100.0, 101.0], [200.0, 201.0]], [[]] * 3, [[20.0], [120.0], [220.0]]]
    assert on_ranks(3, work) == [(whole, terms[rank]) for rank in range(3)]


def test_sums_of_scattered_tensors_are_made_in_fp32_and_in_the_order_of_ranks() -> None:
    def work(rank: int) -> tuple[list[float], list[float], int]:
        group = make_mesh(Layout(dp=3))["dp"]
        # In bf16 256 + 1 is 256; in fp32 1e8 + 1 - 1e8 is 0, but 1e8 - 1e8 + 1 is 1.
        small = torch.full((3, 2), (256.0, 1.0, 1.0)[rank], dtype=torch.bfloat16)
        large = torch.full((3,), (1e8, 1.0, -1e8)[rank])
        return reduce_scatter(small, group).float().flatten().tolist(), reduce_scatter(large, group).tolist(), group.traffic.num_bytes

    assert on_ranks(3, work) == [([258.0, 258.0], [0.0], 8 + 8)] * 3


def test_a_ring_passes_tensors_of_every_kind_on() -> None:
    def work(rank: int) -> list[list[float]]:
        group = make_mesh(Layout(cp=3))["cp"]
        tensors = [torch.full((2,), float(rank)), torch.full((1,), rank, dtype=torch.int64), torch.ones(2).to(torch.float8_e4m3fn)]
        return [tensor.float().tolist() for tensor in Shift(tensors, group).wait()]

    assert on_ranks(3, work) == [[[source] * 2, [source], [1.0, 1.0]] for source in (2.0, 0.0, 1.0)]


def test_eight_bit_floats_and_no_rows_at_all_can_be_exchanged() -> None:
    def work(rank: int) -> list[float]:
        group = make_mesh(Layout(dp=2, ep=2))["ep"]
        rows = torch.tensor([[0.5], [2.0]][: 2 - 2 * rank]).view(-1, 1).to(torch.float8_e4m3fn)
        send, receive = ([0, 2], [0, 0]) if rank == 0 else ([0, 0], [2, 0])
        return all_to_all(rows, group, send=send, receive=receive).float().flatten().tolist()

    assert on_ranks(2, work) == [[], [0.5, 2.0]]
