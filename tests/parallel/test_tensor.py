"""Tensor parallelism computes what one device computes: losses, every gradient, counts, and the bytes that it says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quintet.cost.expert_comm import shared_bytes
from quintet.cost.tensor_comm import sequence_bytes, tensor_bytes
from quintet.model.router import NothingAhead, Routing, within_capacity
from quintet.ops.cross_entropy import head_loss_reference
from quintet.ops.pointwise import cross_entropy
from quintet.parallel import collectives, tensor
from quintet.parallel.collectives import Group, alone
from quintet.parallel.mesh import make_mesh
from quintet.parallel.tensor import AheadOnRanks, VocabularyParallelLoss, vocabulary_lookup
from quintet.spec.layout import Layout
from tests.parallel.rows import rows_between
from tests.parallel.shards import LENGTH, MODEL, Case, Result, compare, on_layout, on_one_device
from tests.ranks import on_ranks

DENSE = replace(MODEL, num_dense_layers=2, num_mtp_modules=0)
CASES = {
    "V3": Case(),
    "tied": Case(model=replace(MODEL, tie_embeddings=True)),
    "plain queries, no shared expert": Case(model=replace(MODEL, q_lora_rank=None, num_shared_experts=0)),
    "dense": Case(model=DENSE),
    "two MTP modules, documents": Case(model=replace(MODEL, num_mtp_modules=2), documents=True),
    "selective recompute, documents": Case(recompute="selective", documents=True),
    "full recompute, few experts": Case(recompute="full", steady=True),
    # Without the balance loss, which counts the best experts without bias: rounding may turn one of them into another.
    "bf16": Case(dtype=torch.bfloat16, steady=True, balance=0.0),
    "capacity": Case(model=replace(MODEL, capacity_factor=1.1), recompute="full"),
}


def test_loss_and_every_gradient_are_those_of_one_device() -> None:
    assert compare(Layout(tp=2), CASES) == {}


def test_four_ranks_agree_too() -> None:
    assert compare(Layout(tp=4), {name: CASES[name] for name in ("V3", "dense", "bf16", "capacity")}) == {}


def test_a_replica_without_rows_takes_part() -> None:
    layout = Layout(dp=2, tp=2)
    assert compare(layout, {"one sequence": Case(num_sequences=1), "recomputed": Case(num_sequences=1, recompute="full")}) == {}


def test_the_comparison_finds_a_reduce_scatter_that_forgets_to_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "reduce_scatter", lambda whole, group: whole.chunk(group.size)[group.rank].contiguous())
    found = compare(Layout(tp=2), {"V3": Case()})["V3"]
    assert any(name.startswith("losses") for name in found) and any(name.startswith("layers.0.attention.wo.weight") for name in found)


def test_the_comparison_finds_counts_of_experts_that_are_not_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor, "all_reduce", lambda counts, group: counts)
    assert any(name.startswith("layers.1.ffn.router.weight") for name in compare(Layout(tp=2), {"V3": Case()})["V3"])


def test_the_comparison_finds_a_gather_whose_gradients_are_not_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(group: Group, tensor: Tensor, dim: int) -> Tensor:
        return tensor.chunk(group.size, dim)[group.rank].contiguous()

    monkeypatch.setattr(collectives._Gather, "backward", staticmethod(lambda ctx, grad: (own(ctx.group, grad, ctx.dim), None, None)))
    found = [name.split()[0] for name in compare(Layout(tp=2), {"V3": Case()})["V3"]]
    assert "layers.0.attention.wkv_a.weight" in found and "losses" not in found


@pytest.mark.parametrize("layout", [Layout(tp=4), Layout(dp=2, tp=2, expert_tp=2)], ids=str)
def test_the_bytes_sent_are_those_of_the_formula(layout: Layout) -> None:
    cases = [
        Case(),
        Case(model=replace(MODEL, q_lora_rank=None, num_shared_experts=0, num_mtp_modules=2)),
        Case(model=DENSE, recompute="full"),
        Case(recompute="full"),
        Case(dtype=torch.bfloat16, mtp=0.0),
        Case(model=replace(MODEL, capacity_factor=1.0), recompute="selective"),
    ]

    def work(rank: int) -> list[Result]:
        return [on_layout(case, layout) for case in cases]

    on_one_device(cases[2])  # what recomputation imports, the children inherit
    by_rank = on_ranks(layout.num_ranks, work)
    for rank, results in enumerate(by_rank):
        for index, (case, result) in enumerate(zip(cases, results, strict=True)):
            sequences = case.num_sequences // layout.dp
            num_mtp = case.model.num_mtp_modules if case.mtp else 0
            sent = tensor_bytes(
                case.model,
                layout,
                tokens=sequences * LENGTH,
                element_bytes=case.dtype.itemsize,
                recompute=case.recompute,
                num_mtp=num_mtp,
            )
            counts = sequence_bytes(case.model, layout, sequences=sequences, recompute=case.recompute, num_mtp=num_mtp)
            passed_on = sum(
                shared_bytes(
                    case.model,
                    layout,
                    rows_here=rows.here,
                    rows_there=rows.there,
                    element_bytes=case.dtype.itemsize,
                    recompute=case.recompute,
                ).total
                for layer in range((case.model.num_moe_layers + num_mtp) * (layout.expert_tp > 1))
                for rows in [rows_between(layout, rank, [each[index].rows[layer] for each in by_rank])]
            )
            seen = (result.traffic["tp"][0], result.traffic["sequence"][0])
            assert seen == (sent.total + passed_on, counts.total), (rank, case)


def test_a_split_vocabulary_gives_embeddings_losses_and_gradients() -> None:
    torch.manual_seed(0)
    weight, hidden = torch.randn(6, 4), torch.randn(2, 4, 4)
    tokens = torch.tensor([[0, 2, 3, 5], [5, 5, 1, 4]])
    labels = torch.tensor([[0, -100, 5, 2], [3, 3, -1, 1]])

    def work(rank: int) -> tuple[Tensor, float, float, Tensor, Tensor]:
        group = make_mesh(Layout(tp=2))["tp"]
        part, mine = weight[3 * rank :][:3].clone().requires_grad_(), hidden[:, 2 * rank :][:, :2].clone().requires_grad_()
        embedded = vocabulary_lookup(group)(tokens, part).detach()
        loss = VocabularyParallelLoss(group)
        share = loss(mine, part, labels, chunk=3, kernel=cross_entropy)
        share.backward()
        with torch.no_grad():
            evaluated = loss(mine, part, labels, chunk=3, kernel=cross_entropy)
        assert part.grad is not None and mine.grad is not None
        return embedded, share.item(), evaluated.item(), part.grad, mine.grad

    first, second = on_ranks(2, work)
    assert torch.equal(torch.cat((first[0], second[0]), 1), weight[tokens])
    weight.requires_grad_(), hidden.requires_grad_()
    whole = head_loss_reference(hidden.flatten(0, 1), weight, labels.flatten())
    whole.backward()
    for share, other in ((first[1], second[1]), (first[2], second[2])):  # in training and in evaluation
        assert math.isclose(share + other, whole.item(), rel_tol=1e-6)
    torch.testing.assert_close(torch.cat((first[3], second[3])), weight.grad)
    torch.testing.assert_close(torch.cat((first[4], second[4]), 1), hidden.grad)


@given(st.integers(1, 20), st.integers(1, 7), st.sampled_from([torch.float32, torch.bfloat16]))
def test_alone_the_split_cross_entropy_is_the_plain_one(num_tokens: int, vocabulary: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(num_tokens, vocabulary) * 20).to(dtype)
    labels = torch.randint(-2, vocabulary, (num_tokens,))
    ours, theirs = VocabularyParallelLoss(alone("tp")).share(logits, labels), cross_entropy(logits, labels)
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1])


def zigzag(length: int, layout: Layout) -> list[list[int]]:
    """The positions of a sequence that each of its ranks holds, cp by cp and tp within."""
    chunks = torch.arange(length).chunk(2 * layout.cp)
    per_cp = [torch.cat((chunks[r], chunks[-1 - r])) if layout.cp > 1 else torch.arange(length) for r in range(layout.cp)]
    return [part.tolist() for tokens in per_cp for part in tokens.chunk(layout.tp)]


@given(st.integers(1, 4), st.integers(1, 6))
def test_pieces_of_a_sequence_are_counted_in_its_order(cp: int, tp: int) -> None:
    layout = Layout(cp=cp, tp=tp)
    held = zigzag(24 * cp * tp, layout)
    ahead = AheadOnRanks(Group("sequence", tuple(range(cp * tp)), 0), layout)
    pieces = [tokens for part in held for tokens in torch.tensor(part).chunk(ahead.num_pieces)]
    assert all(torch.equal(tokens, torch.arange(len(tokens)) + tokens[0]) for tokens in pieces), "no piece has a gap"
    assert ahead.places == [int(tokens[0]) // len(tokens) for tokens in pieces]


def dropped_of(routing: Routing) -> list[list[bool]]:
    return (routing.experts == routing.scores.shape[1]).tolist()


def choose(shape: Sequence[int], num_experts: int) -> Tensor:
    """Experts of tokens [.., K]; the first are chosen most."""
    return (torch.rand(*shape, num_experts) - torch.arange(num_experts) * 0.15).topk(shape[-1]).indices[..., 0, :]


@pytest.mark.parametrize("layout", [Layout(cp=2), Layout(cp=2, tp=2), Layout(tp=3)], ids=str)
def test_what_is_dropped_does_not_depend_on_the_layout(layout: Layout) -> None:
    batch, length, num_experts, factor = 2, 12, 4, 0.8
    experts = choose((batch, length, 2), num_experts)
    gates, scores = torch.rand(experts.shape), torch.rand(batch, length, num_experts)

    def part(tokens: list[int]) -> Routing:
        return Routing(experts[:, tokens].flatten(0, 1), gates[:, tokens].flatten(0, 1), scores[:, tokens].flatten(0, 1))

    def work(rank: int) -> tuple[Tensor, Tensor]:
        ahead = AheadOnRanks(make_mesh(layout)["sequence"], layout)
        routing = within_capacity(part(zigzag(length, layout)[rank]), batch, factor, ahead=ahead)
        assert routing.dropped is not None and torch.equal(routing.gates == 0, routing.experts == num_experts)
        return routing.experts.view(batch, -1, 2), routing.dropped

    whole = within_capacity(part(list(range(length))), batch, factor, ahead=NothingAhead())
    assert whole.dropped is not None and 0 < whole.dropped.sum() < experts.numel() / 2
    ours = on_ranks(layout.num_ranks, work)
    together = torch.empty_like(experts)
    for tokens, (mine, _) in zip(zigzag(length, layout), ours, strict=True):
        together[:, tokens] = mine
    assert torch.equal(together.flatten(0, 1), whole.experts)
    assert torch.equal(torch.stack([dropped for _, dropped in ours]).sum(0), whole.dropped)
