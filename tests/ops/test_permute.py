"""Rows go to their experts and come back: order, padding, sums and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quintet.ops import permute
from quintet.ops.permute import (
    ROW_ALIGNMENT,
    Permutation,
    collect,
    sort_by_expert,
    spread,
    spread_gates,
    sum_rows,
    sum_rows_reference,
)


@contextmanager
def alignment(rows: int) -> Iterator[None]:
    """Another ROW_ALIGNMENT for a while."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(permute, "ROW_ALIGNMENT", rows)
        yield


@st.composite
def choices(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Different experts for each of some tokens: [T, K], and how many experts there are."""
    num_experts = draw(st.integers(1, 6))
    per_token, num_tokens = draw(st.integers(1, num_experts)), draw(st.integers(1, 60))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    # A steep preference leaves some experts with few tokens or none.
    preference = torch.arange(num_experts) * draw(st.floats(0, 3))
    scores = torch.randn(num_tokens, num_experts, generator=generator) + preference
    return scores.topk(per_token).indices, num_experts


def begins(to: Permutation) -> list[int]:
    """The row where each expert's part begins."""
    return [0, *to.ends.tolist()[:-1]]


def test_rows_stand_in_the_order_of_their_experts() -> None:
    to = sort_by_expert(torch.tensor([[1, 0], [1, 2]]), 3)
    assert to.token_of_row.tolist() == [0, 0, 1, 1]
    assert to.row_of_slot.tolist() == [[1, 0], [2, 3]]
    assert to.load.tolist() == [1, 2, 1]
    assert to.ends.tolist() == [1, 3, 4] and to.ends.dtype == torch.int32


def test_each_experts_part_is_padded_with_copies_of_token_0() -> None:
    with alignment(2):
        to = sort_by_expert(torch.tensor([0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 0])[:, None], 2)
    assert to.load.tolist() == [5, 11]
    assert to.ends.tolist() == [6, 18]
    assert to.token_of_row.tolist() == [0, 4, 8, 12, 15, 0, 1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 0]


def test_few_rows_are_not_padded() -> None:
    few, many = (sort_by_expert(torch.zeros(size, 1, dtype=torch.int64), 2) for size in (8 * ROW_ALIGNMENT - 1, 8 * ROW_ALIGNMENT))
    assert few.token_of_row.numel() == 8 * ROW_ALIGNMENT - 1
    assert many.token_of_row.numel() == 8 * ROW_ALIGNMENT + 2 * (ROW_ALIGNMENT - 1)


@given(choices(), st.integers(1, 4))
def test_every_slot_has_a_row_of_its_own_in_its_experts_aligned_part(chosen: tuple[Tensor, int], aligned: int) -> None:
    experts, num_experts = chosen
    with alignment(aligned):
        to = sort_by_expert(experts, num_experts)
    rows, num_tokens = to.row_of_slot, len(experts)
    assert rows.unique().numel() == rows.numel(), "no row serves two slots"
    assert torch.equal(to.token_of_row[rows], torch.arange(num_tokens)[:, None].expand_as(rows))
    padded = aligned if experts.numel() >= 4 * num_experts * aligned else 1
    assert to.token_of_row.numel() == experts.numel() + num_experts * (padded - 1) >= int(to.ends[-1])
    for expert, (begin, end) in enumerate(zip(begins(to), to.ends.tolist(), strict=True)):
        mine = rows[experts == expert]  # in the order of tokens
        assert begin % padded == 0 and end - begin < int(to.load[expert]) + padded
        assert mine.tolist() == [*range(begin, begin + int(to.load[expert]))], "tokens keep their order"


@given(choices(), st.integers(1, 4))
def test_what_goes_out_comes_back_once_per_expert(chosen: tuple[Tensor, int], aligned: int) -> None:
    experts, num_experts = chosen
    with alignment(aligned):
        to = sort_by_expert(experts, num_experts)
    x = torch.randn(len(experts), 3)
    rows = spread(x, to)
    assert torch.equal(rows[to.row_of_slot], x[:, None].expand(-1, experts.shape[1], -1))
    torch.testing.assert_close(collect(rows, to), x * experts.shape[1])


def test_padding_has_gate_0() -> None:
    with alignment(2):
        to = sort_by_expert(torch.tensor([0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1])[:, None], 2)
    gates = torch.arange(1.0, 17.0)[:, None]
    assert spread_gates(gates, to).tolist() == [1.0, 0.0, *range(2, 17), 0.0]


def gated_sum(x: Tensor, gates: Tensor, to: Permutation, maps: Callable[[Tensor], Tensor]) -> Tensor:
    """Out to the experts, through a function of each row times its gate, and back."""
    return collect(maps(spread(x, to)) * spread_gates(gates, to)[:, None], to)


@given(choices(), st.integers(1, 4))
def test_gradients_of_the_way_out_and_back_are_those_of_the_plain_sum(chosen: tuple[Tensor, int], aligned: int) -> None:
    experts, num_experts = chosen
    with alignment(aligned):
        to = sort_by_expert(experts, num_experts)
    x = torch.randn(len(experts), 3, requires_grad=True)
    gates = torch.rand(experts.shape, requires_grad=True)
    grad = torch.randn(len(experts), 3)
    ours = torch.autograd.grad(gated_sum(x, gates, to, torch.sin), (x, gates), grad)
    theirs = torch.autograd.grad((x.sin()[:, None] * gates[:, :, None]).sum(1), (x, gates), grad)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their)


def test_gradients_of_padding_rows_reach_no_token() -> None:
    with alignment(2):
        to = sort_by_expert(torch.tensor([0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1])[:, None], 2)
    x = torch.randn(16, 2, requires_grad=True)
    grad = torch.full((to.token_of_row.numel(), 2), torch.nan)
    grad[to.row_of_slot.flatten()] = torch.arange(32.0).view(16, 2)
    assert torch.autograd.grad(spread(x, to), x, grad)[0].tolist() == torch.arange(32.0).view(16, 2).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(st.integers(1, 5), st.integers(1, 8))
def test_a_tokens_rows_are_summed_in_fp32(dtype: torch.dtype, num_tokens: int, per_token: int) -> None:
    rows = torch.randn(num_tokens * per_token, 5).to(dtype)
    row_of_slot = torch.randperm(num_tokens * per_token).view(num_tokens, per_token)
    torch.testing.assert_close(sum_rows(rows, row_of_slot), sum_rows_reference(rows, row_of_slot))


def test_a_small_row_is_not_lost_beside_large_ones_in_bf16() -> None:
    rows = torch.tensor([[256.0], [1.0], [1.0], [1.0], [1.0]], dtype=torch.bfloat16)  # 256 + 1 = 256 in bf16
    for path in (sum_rows, sum_rows_reference):
        assert path(rows, torch.arange(5)[None]).item() == 260.0


def test_slots_that_the_host_knows_to_have_no_expert_take_no_room() -> None:
    to = sort_by_expert(torch.tensor([[1, 3], [3, 3], [0, 1]]), 3, padded=False, spare=True, taken=3)
    assert to.token_of_row[:3].tolist() == [2, 0, 2] and to.token_of_row.numel() == 4
    assert to.row_of_slot.tolist() == [[1, 3], [3, 3], [0, 2]] and to.load.tolist() == [1, 2, 0]


@given(choices(), st.integers(1, 4), st.data())
def test_taken_slots_stand_as_if_there_were_no_others(chosen: tuple[Tensor, int], aligned: int, data: st.DataObject) -> None:
    experts, num_experts = chosen
    dropped = torch.tensor(data.draw(st.lists(st.booleans(), min_size=experts.numel(), max_size=experts.numel()))).view_as(experts)
    left = experts[~dropped]
    with alignment(aligned):
        ours = sort_by_expert(experts.masked_fill(dropped, num_experts), num_experts, spare=True, taken=left.numel())
        theirs = sort_by_expert(left[:, None], num_experts)
    for name in ("load", "ends"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.row_of_slot[~dropped], theirs.row_of_slot.flatten())
    assert bool((ours.row_of_slot[dropped] == ours.token_of_row.numel() - 1).all())
    token = torch.arange(len(experts))[:, None].expand_as(experts)
    assert torch.equal(ours.token_of_row[ours.row_of_slot[~dropped]], token[~dropped])


def test_arriving_rows_come_in_few_sizes() -> None:
    def size(count: int) -> int:
        return sort_by_expert(torch.zeros(count, 1, dtype=torch.int64), 2, spare=True, taken=count).token_of_row.numel()

    assert {size(count) for count in range(1000, 2000)} == {1152, 1280, 1408, 1536, 1664, 1792, 1920, 2048}


def test_slots_without_an_expert_have_the_spare_row() -> None:
    to = sort_by_expert(torch.tensor([[1, 0], [2, 2], [2, 1]]), 2, spare=True)  # 2 is none
    assert to.row_of_slot.tolist() == [[1, 0], [6, 6], [6, 2]]
    assert to.load.tolist() == [1, 2] and to.ends.tolist() == [1, 3] and to.token_of_row.numel() == 7
    x = torch.tensor([[1.0], [2.0], [3.0]], requires_grad=True)
    rows = spread(x, to)
    assert rows[:3].flatten().tolist() == [1.0, 1.0, 3.0]
    unused = torch.tensor([10.0, 20.0, 30.0, *[torch.nan] * 4])[:, None]
    assert collect(unused, to).flatten().tolist() == [30.0, 0.0, 30.0], "a spare row is in no sum"
    assert torch.autograd.grad(rows, x, unused)[0].flatten().tolist() == [30.0, 0.0, 30.0], "nor is its gradient"


def test_no_tokens_need_no_spare_row() -> None:
    to = sort_by_expert(torch.empty(0, 2, dtype=torch.int64), 3, spare=True)
    assert not to.spare and collect(spread(torch.empty(0, 4), to), to).shape == (0, 4) and to.load.tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_without_the_spare_row_are_those_of_the_reference(dtype: torch.dtype) -> None:
    rows = torch.tensor([[256.0], [1.0], [1.0], [1.0], [1.0], [torch.nan]], dtype=dtype)
    row_of_slot = torch.tensor([[0, 1, 2, 3, 4, 5], [5, 5, 0, 5, 5, 5], [5, 5, 5, 5, 5, 5]])
    for path in (sum_rows, sum_rows_reference):
        assert path(rows, row_of_slot, spare=True).flatten().tolist() == [260.0, 256.0, 0.0]
