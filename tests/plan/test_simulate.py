"""The simulator: published figures, formulas, exposed communication and memory."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pytest import approx

from quintet.cost.memory import step_memory
from quintet.errors import SpecError
from quintet.plan.costs import DEEPSEEK_V3, Costs, Layer
from quintet.plan.formulas import formula
from quintet.plan.simulate import Simulation, held_by, simulate
from quintet.schedule import NAMES, build
from quintet.schedule.held import peak
from quintet.spec import parse
from quintet.spec.layout import PipelineName


def simulated(name: str, ranks: int, microbatches: int, costs: Costs) -> Simulation:
    return simulate(build(name, ranks, microbatches), costs)


# DeepSeek-V3's published step: PP16, 120 micro-batches, 19.9 s.


def test_the_step_anatomy_of_deepseek_v3() -> None:
    parts = simulated("dualpipe", 16, 120, DEEPSEEK_V3).anatomy
    assert parts["F"] == approx(1.13, rel=0.01)
    assert parts["B"] + parts["I"] == approx(1.99, rel=0.01)
    assert parts["W"] == approx(0.48, rel=0.01)
    assert parts["FB"] == approx(13.95, rel=0.01)
    # Published 2.06 s: the schedule and its messages account for more than half; docs/pipeline.md has the rest.
    assert 1.0 < parts["bubble"] < 2.06
    assert sum(parts.values()) == approx(simulated("dualpipe", 16, 120, DEEPSEEK_V3).makespan)


def test_a_last_stage_a_fifth_heavier_would_explain_the_rest_of_the_published_bubble() -> None:
    costs = replace(DEEPSEEK_V3, profile=(*(1.0,) * 15, 1.2))
    assert simulated("dualpipe", 16, 120, costs).anatomy["bubble"] == approx(2.06, rel=0.01)


def test_at_the_published_costs_dualpipe_is_above_85_percent_and_40_percent_below_1f1b() -> None:
    dual, plain = (simulated(name, 16, 120, DEEPSEEK_V3) for name in ("dualpipe", "1f1b"))
    assert 1 - dual.mean_bubble > 0.85
    assert dual.mean_bubble < 0.6 * plain.mean_bubble
    assert dual.anatomy["bubble"] < 0.6 * plain.anatomy["bubble"]


# Known from measurements of other programs: bubble in %, F = I = W, and with pairs at 0.75.


@pytest.mark.parametrize(
    ("name", "pair", "p4m16", "p4m20", "p8m16", "p8m20"),
    [
        ("1f1b", 1.0, 15.8, 13.0, 30.4, 25.9),
        ("interleaved", 1.0, 8.6, 7.0, 17.9, 14.9),
        ("interleaved-zb", 1.0, 3.0, 2.4, 6.8, 5.5),
        ("zbv", 1.0, 3.0, 2.4, 6.8, 5.5),
        ("dualpipev", 1.0, 5.9, 4.8, 12.7, 10.4),
        ("dualpipe", 1.0, 4.0, 3.2, 11.1, 9.1),
        ("dualpipev", 0.75, 3.9, 3.2, 7.3, 6.1),
        ("dualpipe", 0.75, 3.0, 2.5, 6.9, 5.7),
    ],
)
def test_bubbles_are_those_of_an_independent_simulation(
    name: str, pair: float, p4m16: float, p4m20: float, p8m16: float, p8m20: float
) -> None:
    for ranks, microbatches, percent in ((4, 16, p4m16), (4, 20, p4m20), (8, 16, p8m16), (8, 20, p8m20)):
        assert 100 * simulated(name, ranks, microbatches, Costs(pair=pair)).mean_bubble == approx(percent, abs=0.06)


# Formulas.


@pytest.mark.parametrize("name", NAMES)
@given(half=st.integers(1, 6), rounds=st.integers(2, 5))
def test_formulas_are_exact_for_equal_times(name: str, half: int, rounds: int) -> None:
    found = simulated(name, 2 * half, 2 * half * rounds, Costs())
    published = formula(found.timeline.schedule, Costs(), pair=3.0)
    assert found.anatomy["bubble"] == approx(published.bubble)
    if published.activations is not None:
        assert max(found.peak_activations) == approx(published.activations)


times = st.floats(0.5, 2.0)


@given(forward=times, backward_input=times, weight=times, half=st.integers(1, 5), extra=st.integers(0, 4))
def test_1f1b_is_exact_for_all_times(forward: float, backward_input: float, weight: float, half: int, extra: int) -> None:
    costs = Costs(forward=forward, backward_input=backward_input, weight=weight)
    found = simulated("1f1b", 2 * half, 4 * half + extra, costs)
    assert found.anatomy["bubble"] == approx(formula(found.timeline.schedule, costs, pair=0.0).bubble, abs=1e-9)


@given(forward=times, pair=st.floats(0.7, 1.0), half=st.integers(1, 5), extra=st.integers(0, 4))
def test_dualpipes_formula_is_an_upper_bound_if_a_pair_gains(forward: float, pair: float, half: int, extra: int) -> None:
    costs = Costs(forward=forward, backward_input=forward, weight=forward, pair=pair)
    found = simulated("dualpipe", 2 * half, 4 * half + 2 * extra, costs)
    bound = formula(found.timeline.schedule, costs, pair=3 * pair * forward).bubble
    assert found.anatomy["bubble"] <= bound + 1e-9
    middle = max(found.bubble) * found.makespan
    assert middle == approx(bound, abs=1e-9)


# Communication and memory.


def test_a_message_that_arrives_while_the_rank_works_costs_nothing() -> None:
    free = simulated("gpipe", 2, 4, Costs())
    assert simulated("gpipe", 2, 4, Costs(p2p_latency=0.5)).makespan == free.makespan + 2 * 0.5
    assert simulated("gpipe", 2, 4, Costs(p2p_latency=0.5)).exposed_p2p == [0.5, 0.5]


def test_messages_wait_for_their_link() -> None:
    slow = Costs(message_bytes=8.0, p2p_bandwidth=4.0)
    assert simulated("gpipe", 2, 3, slow).timeline.starts[1][:3] == [3.0, 5.0, 7.0]


def test_all_to_all_shows_in_single_ops_and_is_hidden_in_pairs() -> None:
    layer = Layer(
        attention_forward=1,
        attention_backward_input=2,
        attention_weight=1,
        mlp_forward=3,
        mlp_backward_input=3,
        mlp_weight=3,
        dispatch_bytes=1,
        combine_bytes=2,
    )
    costs = Costs(layer=layer, layers=1, all_to_all_bandwidth=1.0)
    plain, dual = simulated("1f1b", 4, 16, costs), simulated("dualpipe", 4, 16, costs)
    assert plain.exposed_all_to_all == approx([16 * 6.0] * 4)
    pairs = [sum(work.kind == "FB" for work in row) for row in dual.timeline.schedule.table]
    assert dual.exposed_all_to_all == approx([(16 - one) * 6.0 for one in pairs])
    assert dual.makespan < plain.makespan


def test_activations_are_counted_in_bytes_of_uneven_stages() -> None:
    found = simulated("gpipe", 2, 3, Costs(profile=(1.0, 3.0), activation_bytes=100.0))
    assert found.peak_activations == approx([150.0, 450.0])


def test_what_an_input_gradient_frees_is_counted_at_once() -> None:
    assert max(simulated("zb1p", 4, 8, Costs(kept_for_weight=1.0)).peak_activations) == approx(4.0)
    # The last rank keeps one forward and three halves.
    assert simulated("zb1p", 4, 8, Costs(kept_for_weight=0.5)).peak_activations == approx([4.0, 3.5, 3.0, 2.5])


def test_peak_memory_adds_what_is_there_all_the_time_and_dualpipe_holds_it_twice_but_for_the_optimizer() -> None:
    costs = Costs(weight_bytes=2.0, gradient_bytes=4.0, optimizer_bytes=12.0)
    plain, dual = simulated("1f1b", 4, 8, costs), simulated("dualpipe", 4, 8, costs)
    assert plain.peak_memory == approx([18 + kept for kept in (4, 3, 2, 1)])
    assert dual.held.states[0] == {"weights": 4.0, "gradients": 8.0, "optimizer": 12.0}
    assert max(dual.peak_memory) == approx(2 * 2 + 2 * 4 + 12 + 5)


def test_uneven_stages_hold_uneven_states() -> None:
    found = simulated("gpipe", 2, 3, Costs(profile=(1.0, 3.0), weight_bytes=100.0, activation_bytes=0.0))
    assert found.peak_memory == approx([50.0, 150.0])


@pytest.mark.parametrize("name", NAMES)
def test_by_a_recipe_every_rank_keeps_what_cost_says_of_its_place(name: PipelineName) -> None:
    run = parse.read(Path(__file__).parents[2] / "recipes" / "v3-16b.toml")
    found = held_by(build(name, 4, 8), run, sequence_length=4096)
    layout = replace(run.layout, pp=4, schedule=name)
    for place in range(4):
        counted = step_memory(run.model, run.train, sequence_length=4096, layout=layout, place=place, moments=run.optimizer.moments)
        kept = peak(build(name, 4, 8).table[place], kept=found.kept, put_off=found.put_off)
        assert (sum(found.states[place].values()) + kept, kept) == (counted.total, counted.activations)


def test_where_layers_are_recomputed_putting_weights_off_keeps_what_recomputing_freed() -> None:
    run = parse.read(Path(__file__).parents[2] / "recipes" / "v3-16b.toml")
    full = replace(run, train=replace(run.train, recompute="full"))
    held = held_by(build("zb1p", 4, 8), full, sequence_length=4096)
    assert held.put_off[1] > 5 * held.kept[1]


def test_a_schedule_whose_stages_no_layout_has_is_refused() -> None:
    run = parse.read(Path(__file__).parents[2] / "recipes" / "v3-16b.toml")
    odd = replace(build("1f1b", 2, 2), routes=((1, 0),), table=build("1f1b", 2, 2).table[::-1])
    with pytest.raises(SpecError, match=r"1f1b has its stages on the ranks \[\[1, 0\]\], which no layout has"):
        held_by(odd, run, sequence_length=4096)
    with pytest.raises(SpecError, match=r"must be at most model\.num_layers"):
        held_by(build("zbv", 64, 2), run, sequence_length=4096)


def test_64_ranks_and_1024_microbatches_take_less_than_two_seconds() -> None:
    schedule = build("dualpipev", 64, 1024)
    begin = time.process_time()
    simulate(schedule, DEEPSEEK_V3)
    assert time.process_time() - begin < 2.0
