"""Estimates: terms that add up, directions that must hold, and DeepSeek-V3's own run."""

from __future__ import annotations

import itertools
import re
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quintet.cost.memory import step_memory
from quintet.errors import SpecError, UsageError
from quintet.plan.estimate import Estimate, bounds, cost, estimate, goodput, terms, utilization
from quintet.plan.explain import FORMULAS, compare, explain
from quintet.plan.page import Scaling, _in_flight, page
from quintet.plan.rehearse import rehearse
from quintet.plan.setup import Setup, of_run
from quintet.plan.software import GENERATIONS, generation
from quintet.plan.stages import blocks
from quintet.spec import parse
from quintet.spec.cluster import Cluster, named
from quintet.spec.layout import Layout
from quintet.spec.run import Recompute, Run

RECIPES = Path(__file__).parents[2] / "recipes"


@cache
def recipe(name: str) -> Run:
    return parse.read(RECIPES / f"{name}.toml")


def setup_of(name: str = "v3-16b", *, software: str = "deepseek", precision: str = "bf16", batch: int = 512, **changes: object) -> Setup:
    base = of_run(
        recipe(name),
        software=generation(software),
        batch_sequences=max(batch, 128),
        precision=precision,  # type: ignore[arg-type]
    )
    return replace(base, batch_sequences=batch, **changes)  # type: ignore[arg-type]


def deepseek() -> Estimate:
    layout = replace(recipe("v3-671b").layout, schedule="dualpipe")
    setup = setup_of("v3-671b", precision="fp8", batch=15360, layout=layout, moments_bytes=2)
    return estimate(setup, named("h800", num_gpus=2048))


layouts = st.sampled_from(
    [
        Layout(dp=8, ep=8),
        Layout(dp=8, ep=8, zero=1),
        Layout(dp=8, zero=3),
        Layout(dp=2, tp=4, zero=1),
        Layout(dp=4, tp=2, ep=4, expert_tp=2, zero=1),
        Layout(dp=2, cp=4, ep=8, zero=1),
        Layout(dp=2, pp=4, ep=2, zero=1),
    ]
)


@settings(max_examples=30, deadline=None)
@given(layout=layouts, recompute=st.sampled_from(["none", "selective", "full"]), software=st.sampled_from(list(GENERATIONS)))
def test_terms_add_up_and_nothing_is_negative_but_what_overlap_saves(layout: Layout, recompute: Recompute, software: str) -> None:
    found = estimate(setup_of(layout=layout, recompute=recompute, software=software), named("h100", num_gpus=8))
    values = terms(found)
    assert values["time.total"] == pytest.approx(sum(v for name, v in values.items() if name.startswith("time.") and name != "time.total"))
    assert values["memory.total"] == pytest.approx(sum(v for n, v in values.items() if n.startswith("memory.") and n != "memory.total"))
    assert all(value >= 0 for name, value in values.items() if name != "time.overlap")
    assert sum(bounds(found).values()) == pytest.approx(found.seconds)


@settings(max_examples=20, deadline=None)
@given(layout=layouts, what=st.sampled_from(["link", "network", "memory_bandwidth", "compute"]), factor=st.floats(1.1, 8))
def test_a_faster_cluster_is_never_slower(layout: Layout, what: str, factor: float) -> None:
    cluster = replace(named("h100", num_gpus=8), domain=4)
    setup = setup_of(layout=layout)
    assert estimate(setup, cluster.scaled({what: factor})).seconds <= estimate(setup, cluster).seconds * (1 + 1e-9)


@given(layout=layouts)
@settings(max_examples=10, deadline=None)
def test_recomputation_trades_time_for_memory(layout: Layout) -> None:
    none, selective, full = (
        estimate(setup_of(layout=layout, recompute=policy), named("h100", num_gpus=8)) for policy in ("none", "selective", "full")
    )
    assert none.seconds <= selective.seconds <= full.seconds
    assert none.fullest.activations > selective.fullest.activations > full.fullest.activations


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(dp=8, zero=1), Layout(dp=8, ep=4, zero=1), Layout(dp=4, tp=2, ep=2, zero=2), Layout(dp=8, zero=3)]
)
def test_states_are_those_that_the_runtime_holds(layout: Layout) -> None:
    run = recipe("v3-16b")
    own = step_memory(run.model, run.train, sequence_length=4096, device="cuda", layout=layout)
    planned = estimate(setup_of(layout=layout), named("h100", num_gpus=layout.num_ranks)).memory[0]
    for name in ("weights", "gradients", "master_weights", "moments"):
        assert getattr(planned, name) == pytest.approx(getattr(own, name), rel=0.02), name


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_activations_of_our_model_are_near_those_of_the_memory_formulas(recompute: Recompute) -> None:
    run, layout = recipe("v3-16b"), Layout(dp=8, ep=8, zero=1)
    train = replace(run.train, recompute=recompute)
    own = step_memory(run.model, train, sequence_length=4096, device="cuda", layout=layout)
    planned = estimate(setup_of(layout=layout, recompute=recompute), named("h100", num_gpus=8)).memory[0]
    assert planned.activations == pytest.approx(own.activations, rel=0.1)


def test_v3_in_bf16_needs_what_was_published_for_256_devices() -> None:
    """arXiv 2603.07685, GB per device at PP4 x VPP4 x EP64: weights and gradients 36.4, optimizer 32.1, activations 131."""
    layout = Layout(pp=4, dp=64, ep=64, zero=1, schedule="interleaved", chunks=4)
    found = estimate(
        setup_of("v3-671b", batch=2048, layout=layout, recompute="none", software="bridge 26"),
        named("h100", num_gpus=256),
    )
    usual = sorted(found.memory, key=lambda rank: rank.weights)[1]  # the paper's cut is not told; ends have vocabularies besides
    assert (usual.weights + usual.gradients) / 1e9 == pytest.approx(36.4, rel=0.08)
    assert (usual.master_weights + usual.moments) / 1e9 == pytest.approx(32.1, rel=0.08)
    assert sum(rank.activations for rank in found.memory) / 4e9 == pytest.approx(131, rel=0.1)


def test_deepseek_v3_fits_and_takes_what_it_took() -> None:
    found = deepseek()
    assert found.fits
    assert found.seconds == pytest.approx(19.926, rel=0.12)
    hours = 1e12 / found.tokens_per_second / 3600
    assert hours == pytest.approx(180e3, rel=0.12)
    assert utilization(found).mfu_causal == pytest.approx(0.3894, rel=0.12)
    # The trace of a pair was taken with balanced routing, the run was not.
    balanced = replace(found.setup, software=replace(found.setup.software, imbalance=0.0))
    block = blocks(balanced, found.cluster, paired=True).moe
    work = 4 * (block.compute_forward + block.compute_input + block.compute_weight)
    assert work == pytest.approx(118.2e-3, rel=0.03)
    assert 8 * block.all_to_all == pytest.approx(80.4e-3, rel=0.05)
    assert estimate(balanced, found.cluster).timed.pipeline.pair == pytest.approx(129e-3, rel=0.02)
    assert found.timed.pipeline.pair == pytest.approx(139e-3, rel=0.07)  # 13.95 s of pairs in the step, 100.4 on each rank
    assert found.step.gradients + found.step.weights + found.step.optimizer == pytest.approx(0.29, rel=0.25)


def test_work_outside_of_overlapped_pairs_has_the_whole_device() -> None:
    setup = deepseek().setup
    cluster = named("h800", num_gpus=2048)
    alone, paired = blocks(setup, cluster).moe, blocks(setup, cluster, paired=True).moe
    assert alone.products == pytest.approx(paired.products * setup.software.cores)
    assert alone.dispatch == pytest.approx(paired.dispatch * setup.software.all_to_all)
    assert alone.attention == paired.attention


def test_a_simulated_pipeline_is_near_its_closed_form() -> None:
    found = deepseek()
    assert rehearse(found).makespan == pytest.approx(found.timed.pipeline.total, rel=0.08)
    with pytest.raises(SpecError, match="nothing to simulate"):
        rehearse(estimate(setup_of(layout=Layout(dp=8)), named("h100", num_gpus=8)))


def test_failures_cost_more_the_more_devices_there_are() -> None:
    setup = setup_of(layout=Layout(dp=64, ep=8, zero=1))
    few, many = (estimate(setup, replace(named("h100", num_gpus=64), failures_per_device_year=rate)) for rate in (0.1, 10.0))
    assert goodput(many).share < goodput(few).share < 1
    assert goodput(estimate(setup, replace(few.cluster, failures_per_device_year=0.0))).share == 1
    assert cost(many, tokens=1e12).dollars > cost(few, tokens=1e12).dollars


def test_a_batch_that_is_too_small_is_refused() -> None:
    with pytest.raises(SpecError, match=r"a step has 4 sequences, but layout.dp \(8\) x micro_batch \(1\) takes 8"):
        setup_of(batch=4, layout=Layout(dp=8))


@settings(max_examples=10, deadline=None)
@given(layout=layouts)
def test_every_figure_has_a_formula(layout: Layout) -> None:
    found = estimate(setup_of(layout=layout), named("h100", num_gpus=8))
    for name in terms(found):
        value, formula = explain(found, name).splitlines()
        assert value.startswith(f"{name} = ")
        assert len(formula.strip()) > 5
    assert {name.split(".")[0] for name in FORMULAS} == {"time", "memory", "block"}


def test_an_unknown_figure_answers_did_you_mean() -> None:
    found = estimate(setup_of(layout=Layout(dp=8)), named("h100", num_gpus=8))
    with pytest.raises(UsageError, match=r"did you mean 'memory.activations'"):
        explain(found, "memory.activation")
    assert explain(found, "memory").count("\n    ") == len(fields(found.fullest)) + 1


def test_comparing_tells_the_largest_difference_first() -> None:
    cluster = named("h100", num_gpus=8)
    one, other = (estimate(setup_of(layout=layout), cluster) for layout in (Layout(dp=8), Layout(dp=8, zero=3)))
    rows = compare(one, other)
    totals = {name.split(".")[0]: first for name, first, _ in rows if name.endswith(".total")}
    weights = [abs(first - second) / totals[name.split(".")[0]] for name, first, second in rows]
    assert weights == sorted(weights, reverse=True)
    assert weights[0] > 0.1


def test_a_page_shows_every_part(tmp_path: Path) -> None:
    cluster: Cluster = named("h100", num_gpus=8)
    found = estimate(setup_of(layout=Layout(dp=2, pp=4, ep=2, zero=1, schedule="zbv")), cluster)
    other = estimate(setup_of(layout=Layout(dp=8, ep=8, zero=1)), cluster)
    text = page(found, [other], title="a <plan>", scaling=Scaling(weak=[found], strong=[other]), notes=["a note"])
    for part in (
        "a &lt;plan&gt;",
        "Memory of each pipeline rank",
        "rank 3",
        "zbv: 4 ranks",
        "Roofline",
        "Scaling",
        "a note",
        "Assumptions",
    ):
        assert part in text
    assert text.count("<section>") == 1
    assert text.count("<section hidden>") == 1, "one candidate is shown, the other can be selected"
    first, second = re.findall(r"<section.*?</section>", text, re.DOTALL)
    assert first.count("<svg") == 4, "memory, the timeline, memory meanwhile, the roofline"
    assert second.count("<svg") == 2, "without a pipeline no timeline"
    assert text.count("<svg") == text.count("</svg>") == 2 + 4 + 2


def test_memory_over_time_begins_with_states_peaks_at_the_rank_s_total_and_ends_where_it_began() -> None:
    found = estimate(setup_of(layout=Layout(dp=2, pp=4, ep=2, zero=1, schedule="1f1b")), named("h100", num_gpus=8))
    timeline = rehearse(found, num_microbatches=8).timeline
    for rank in range(4):
        shares = [share for _, share in _in_flight(timeline, rank)]
        assert (shares[0], max(shares), shares[-1]) == (0, 1, 0)
        assert min(shares) == 0, "what was never kept is not freed"
        steps = {round(abs(b - a) * (4 - rank)) for a, b in itertools.pairwise(shares)}
        assert steps == {0, 1}, "1F1B keeps P - rank micro-batches, which come and go one by one"


def test_fp32_holds_its_weights_once_and_keeps_twice_the_activations() -> None:
    layout = Layout(dp=8, ep=8, zero=1)
    bf16, fp32 = (estimate(setup_of(layout=layout, precision=p), named("h100", num_gpus=8)).memory[0] for p in ("bf16", "fp32"))
    assert fp32.weights == 2 * bf16.weights and fp32.master_weights == 0
    assert fp32.activations == pytest.approx(2 * bf16.activations, rel=0.05)
