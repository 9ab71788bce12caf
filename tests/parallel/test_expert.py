"""Expert parallelism computes what one device computes, however unevenly tokens choose, and sends the bytes that it says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quintet.cost.expert_comm import expert_bytes, mean_rows
from quintet.parallel import collectives, expert
from quintet.parallel.collectives import Group
from quintet.spec.layout import Layout
from tests.parallel.shards import LENGTH, MODEL, Case, Result, compare, on_layout, on_one_device
from tests.ranks import on_ranks

CASES = {
    "V3": Case(),
    "few experts": Case(steady=True),
    "a rank without rows": Case(num_sequences=3, model=replace(MODEL, tie_embeddings=True)),
    "selective recompute": Case(recompute="selective", model=replace(MODEL, num_shared_experts=0)),
    "full recompute, few experts, two MTP modules": Case(recompute="full", steady=True, model=replace(MODEL, num_mtp_modules=2)),
    "bf16": Case(dtype=torch.bfloat16, steady=True),
    "odd widths": Case(model=replace(MODEL, expert_ffn_size=6)),
    "capacity 1.1": Case(model=replace(MODEL, capacity_factor=1.1)),
    "top-1, capacity 1.1": Case(model=replace(MODEL, num_experts_per_token=1, normalize_gates=False, capacity_factor=1.1), num_sequences=3),
    "capacity 0.3, few experts": Case(model=replace(MODEL, capacity_factor=0.3), steady=True, recompute="full"),
}
SOME = {name: CASES[name] for name in ("V3", "a rank without rows", "bf16", "capacity 0.3, few experts")}
LAYOUTS = [
    (Layout(dp=2, ep=2), CASES),
    (Layout(dp=4, ep=4), SOME),
    (Layout(dp=4, ep=2), SOME),
    (Layout(dp=2, tp=2, ep=2), SOME),
    (Layout(tp=2, expert_tp=2), SOME),
    (Layout(dp=2, tp=2, ep=2, expert_tp=2), CASES),
]


@pytest.mark.parametrize(("layout", "cases"), LAYOUTS, ids=[str(layout) for layout, _ in LAYOUTS])
def test_loss_every_gradient_and_all_counts_are_those_of_one_device(layout: Layout, cases: dict[str, Case]) -> None:
    assert compare(layout, cases) == {}


def test_the_comparison_finds_rows_whose_gradient_goes_astray(monkeypatch: pytest.MonkeyPatch) -> None:
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
        back = collectives.all_to_all(grad, ctx.group, send=ctx.receive, receive=ctx.send)  # type: ignore[attr-defined]
        return back.roll(1, 0), None, None, None

    monkeypatch.setattr(collectives._Exchange, "backward", staticmethod(backward))
    found = [name.split()[0] for name in compare(Layout(dp=2, ep=2), {"V3": Case()})["V3"]]
    assert "layers.1.ffn_norm.weight" in found and "losses" not in found


def test_the_comparison_finds_terms_of_split_experts_that_are_not_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(terms: Tensor, group: Group, *, dim: int) -> Tensor:
        return terms.chunk(group.size, dim)[group.rank]

    monkeypatch.setattr(expert, "scatter_tokens", own)
    assert "losses" in [name.split()[0] for name in compare(Layout(tp=2, expert_tp=2), {"V3": Case()})["V3"]]


@pytest.mark.parametrize("layout", [Layout(dp=4, ep=4), Layout(dp=2, tp=2, ep=2)], ids=str)
def test_the_bytes_sent_are_those_of_the_formula(layout: Layout) -> None:
    cases = [Case(), Case(recompute="full", dtype=torch.bfloat16), Case(model=replace(MODEL, capacity_factor=0.5), steady=True)]
    on_one_device(cases[1])  # what recomputation imports, the children inherit
    by_rank = on_ranks(layout.num_ranks, lambda rank: [on_layout(case, layout) for case in cases])
    for rank in range(layout.num_ranks):
        at, ranks = layout.coordinates(rank), layout.group_of(rank, "ep")
        for index, case in enumerate(cases):
            # Rows from each rank of the group to each: [n, n, layers].
            taken = torch.stack([taken_by(by_rank[other][index]).unflatten(1, (layout.ep, -1)).sum(2).t() for other in ranks])
            taken[range(layout.ep), range(layout.ep)] = 0
            sent = sum(
                expert_bytes(
                    case.model,
                    layout,
                    rows_out=int(out),
                    rows_in=int(into),
                    element_bytes=case.dtype.itemsize,
                    recompute=case.recompute,
                ).total
                for out, into in zip(taken[at.ep].sum(0), taken[:, at.ep].sum(0), strict=True)
            )
            assert by_rank[rank][index].traffic["ep"][0] == sent


def taken_by(result: Result) -> Tensor:
    """Rows to each expert [layers, E]."""
    return result.load - result.dropped


def test_a_balanced_router_sends_the_mean_number_of_rows() -> None:
    layout, total = Layout(dp=4, ep=4), 0
    by_rank = on_ranks(4, lambda rank: on_layout(Case(), layout))
    for rank, result in enumerate(by_rank):
        own = result.load.unflatten(1, (4, -1))[:, rank].sum()
        total += int(result.load.sum() - own)
    # Two mixtures and four ranks of one sequence each; which ranks' experts are chosen is chance, but not by much.
    assert total == pytest.approx(2 * 4 * mean_rows(MODEL, layout, tokens=LENGTH), rel=0.2)
