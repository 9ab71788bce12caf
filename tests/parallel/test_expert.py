"""Expert parallelism computes what one device computes, however unevenly tokens choose, and sends the bytes that it says."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quintet.cost.expert_comm import expert_bytes, mean_rows, ranks_per_token
from quintet.model.crossing import straight
from quintet.parallel import expert
from quintet.parallel.expert import AllToAllDispatch, Flight, apply_expert
from quintet.parallel.mesh import make_mesh
from quintet.spec.layout import Layout
from tests.model.build import build
from tests.parallel.rows import rows_between
from tests.parallel.shards import LENGTH, MODEL, Case, compare, cut, on_layout, on_one_device
from tests.ranks import on_ranks

CASES = {
    "V3": Case(),
    "few experts": Case(steady=True),
    "a rank without rows": Case(num_sequences=3, model=replace(MODEL, tie_embeddings=True)),
    "selective recompute": Case(recompute="selective", model=replace(MODEL, num_shared_experts=0)),
    "full recompute, few experts, two MTP modules": Case(recompute="full", steady=True, model=replace(MODEL, num_mtp_modules=2)),
    # Without the balance loss, which counts the best experts without bias: rounding may turn one of them into another.
    "bf16": Case(dtype=torch.bfloat16, steady=True, balance=0.0),
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
    wait = expert._Back.wait

    def rolled(back: expert._Back) -> Tensor:
        arrived = wait(back)
        return torch.cat((arrived[:-1].roll(1, 0), arrived[-1:]))  # the last one may be spare

    monkeypatch.setattr(expert._Back, "wait", rolled)
    found = [name.split()[0] for name in compare(Layout(dp=2, ep=2), {"V3": Case()})["V3"]]
    assert "layers.1.ffn_norm.weight" in found and "losses" not in found


def test_the_comparison_finds_terms_of_split_experts_that_are_not_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert, "sum_in_order", lambda terms: terms[0].clone())
    assert "losses" in [name.split()[0] for name in compare(Layout(tp=2, expert_tp=2), {"V3": Case()})["V3"]]


LAYOUTS_OF_BYTES = [Layout(dp=4, ep=4), Layout(dp=2, tp=2, ep=2), Layout(dp=2, tp=2, ep=2, expert_tp=2)]


@pytest.mark.parametrize("layout", LAYOUTS_OF_BYTES, ids=str)
def test_the_bytes_sent_are_those_of_the_formula(layout: Layout) -> None:
    cases = [Case(), Case(recompute="full", dtype=torch.bfloat16), Case(model=replace(MODEL, capacity_factor=0.5), steady=True)]
    on_one_device(cases[1])  # what recomputation imports, the children inherit
    by_rank = on_ranks(layout.num_ranks, lambda rank: [on_layout(case, layout) for case in cases])
    for rank, index in itertools.product(range(layout.num_ranks), range(len(cases))):
        case, sent = cases[index], 0.0
        for layer in range(2):  # recomputation notes the same rows again
            rows = rows_between(layout, rank, [results[index].rows[layer] for results in by_rank])
            size = case.dtype.itemsize
            sent += expert_bytes(
                case.model, layout, rows_out=rows.out, rows_in=rows.into, element_bytes=size, recompute=case.recompute
            ).total
        assert by_rank[rank][index].traffic["ep"][0] == sent
        assert len(by_rank[rank][index].rows) == (4 if case.recompute == "full" else 2)


def test_a_balanced_router_sends_the_mean_number_of_rows() -> None:
    layout = Layout(dp=4, ep=4)
    by_rank = on_ranks(4, lambda rank: on_layout(Case(num_sequences=16), layout))
    total = sum(rows_between(layout, rank, [result.rows[layer] for result in by_rank]).out for rank in range(4) for layer in range(2))
    # Two mixtures and four ranks of four sequences each; which ranks' experts are chosen is chance, but not by much.
    assert total == pytest.approx(2 * 4 * mean_rows(MODEL, layout, tokens=4 * LENGTH), rel=0.1)


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_a_token_goes_to_as_many_ranks_as_random_choices_say(ranks: int) -> None:
    model = replace(MODEL, num_routed_experts=32, num_experts_per_token=5, num_groups=8, num_groups_per_token=3)
    generator = torch.Generator().manual_seed(0)
    groups = torch.rand(4000, 8, generator=generator).topk(3).indices
    scores = torch.zeros(4000, 8).scatter_(1, groups, 1.0).repeat_interleave(4, 1) + torch.rand(4000, 32, generator=generator)
    homes = scores.topk(5).indices // (32 // ranks)
    found = sum(len(set(chosen)) for chosen in homes.tolist()) / 4000
    assert ranks_per_token(model, Layout(dp=ranks, ep=ranks)) == pytest.approx(found, rel=0.02)


def with_own_token(flight: Flight) -> Flight:
    """The same message, at which a graph of its own begins."""
    return replace(flight, token=flight.token.detach().requires_grad_())


@pytest.mark.parametrize("layout", [Layout(dp=2, ep=2), Layout(dp=2, tp=2, ep=2, expert_tp=2)], ids=str)
def test_a_graph_cut_at_the_flights_yields_the_gradients_of_the_whole(layout: Layout) -> None:
    """Piece by piece, as a pipeline runs them: each backward ends with a message on its way, and the next one waits for it."""

    def work(rank: int) -> list[float]:
        mesh, errors = make_mesh(layout), []
        net = build(MODEL, dtype=torch.float32)
        cut(net, layout, mesh.rank)
        apply_expert(net, mesh)
        layer = next(iter(net.moe_layers().values()))
        dispatch = layer.dispatch
        assert isinstance(dispatch, AllToAllDispatch)
        x = torch.randn(9, MODEL.hidden_size, generator=torch.Generator().manual_seed(rank), requires_grad=True)

        def leaf() -> tuple[Tensor, list[Tensor]]:
            own = x.detach().requires_grad_()
            return own, [own, *layer.experts.parameters(), layer.router.weight]

        own, wanted = leaf()
        out, *_ = straight(dispatch(own, layer.router(own), layer.experts, lambda: ()))
        expected = torch.autograd.grad(out.square().sum(), wanted)

        own, wanted = leaf()
        routing = layer.router(own)
        route = dispatch.prepare(routing.experts)
        there = dispatch.start_dispatch(own, routing, route)
        arrived = dispatch.finish_dispatch(begin := with_own_token(there))
        back = dispatch.start_combine(dispatch.compute(arrived, layer.experts), arrived.copies, route)
        found = dispatch.finish_combine(end := with_own_token(back))
        assert torch.equal(found, out)
        for parameter in wanted:
            parameter.grad = None
        found.square().sum().backward()
        assert back.back.pending is not None, "the message is on its way"
        back.token.backward(end.token.grad)
        assert back.back.pending is None and there.back.pending is not None
        there.token.backward(begin.token.grad)
        for parameter, gradient in zip(wanted, expected, strict=True):
            assert parameter.grad is not None
            errors.append(float((parameter.grad - gradient).norm() / gradient.norm()))
        return errors

    assert all(error < 1e-6 for errors in on_ranks(layout.num_ranks, work) for error in errors)
