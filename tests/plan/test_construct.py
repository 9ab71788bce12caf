"""Constructed schedules: right, within memory, no slower than any named one, and never below the bound."""

from __future__ import annotations

import random

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from quintet.errors import SpecError
from quintet.plan.bound import lower_bound
from quintet.plan.construct import MOVES, _Annealing, _repeated, numbered, search, tokens
from quintet.plan.costs import DEEPSEEK_V3, Costs
from quintet.plan.greedy import Policy, greedy
from quintet.plan.simulate import simulate
from quintet.schedule import Schedule, build, check
from quintet.schedule.zero_bubble import v_route
from tests.schedule.schedules import schedules

times = st.floats(0.2, 3.0)
costs_strategy = st.builds(
    Costs,
    forward=times,
    backward_input=times,
    weight=times,
    pair=st.floats(0.5, 1.1),
    p2p_latency=st.sampled_from([0.0, 0.3]),
    profile=st.sampled_from([(), (1.0, 1.0, 2.0), (3.0, 1.0)]),
    kept_for_weight=st.sampled_from([0.5, 1.0, 2.5]),
)


@settings(max_examples=30)
@given(schedule=schedules(most_ranks=6, most_microbatches=12), costs=costs_strategy)
def test_no_named_schedule_is_below_the_bound(schedule: Schedule, costs: Costs) -> None:
    found = simulate(schedule, costs)
    assert found.makespan >= lower_bound(schedule, costs) - 1e-9
    assert found.makespan >= lower_bound(schedule, costs, memory=max(found.peak_activations)) - 1e-9


@given(ranks=st.integers(1, 8), extra=st.integers(0, 12))
def test_the_bound_is_reached_by_zbv_where_nothing_can_be_paired(ranks: int, extra: int) -> None:
    schedule = build("zbv", ranks, 2 * ranks + extra)
    assert simulate(schedule, Costs()).makespan == pytest.approx(lower_bound(schedule, Costs()))


@given(
    seed=st.integers(0, 10_000),
    ranks=st.integers(1, 5),
    microbatches=st.integers(1, 12),
    halves=st.integers(3, 16),
    kept_for_weight=st.sampled_from([0.5, 1.0, 4.0]),
)
def test_a_greedy_schedule_is_right_and_keeps_to_its_memory(
    seed: int, ranks: int, microbatches: int, halves: int, kept_for_weight: float
) -> None:
    memory, costs = halves / 2, Costs(pair=0.8, kept_for_weight=kept_for_weight)
    schedule = greedy(v_route(ranks), microbatches, costs, limit=memory, policy=Policy.drawn(random.Random(seed), ranks))
    assert schedule is not None
    check(schedule)
    assert max(simulate(schedule, costs).peak_activations) <= memory + 1e-9


@given(schedule=schedules(names=("1f1b", "interleaved", "zb1p", "zbv", "dualpipe", "dualpipev"), most_ranks=6, most_microbatches=12))
def test_tokens_are_the_schedule_without_its_numbers(schedule: Schedule) -> None:
    assert numbered(schedule, tokens(schedule)).table == schedule.table


@given(schedule=schedules(names=("zbv", "dualpipe", "dualpipev"), most_ranks=4, most_microbatches=8), seed=st.integers(0, 10_000))
def test_moves_keep_all_work(schedule: Schedule, seed: int) -> None:
    rng = random.Random(seed)
    row = tokens(schedule)[0]

    def work(tokens_: list[tuple[tuple[str, int], ...]]) -> list[tuple[str, int]]:
        halves = [(half, n) for token in tokens_ for kind, n in token for half in ("IW" if kind == "B" else kind)]
        return sorted(halves)

    for move in MOVES:
        changed = move(row, rng.randrange(len(row)), rng)
        assert changed is None or work(changed) == work(row)  # type: ignore[arg-type]


@given(extra=st.integers(0, 20), ranks=st.sampled_from([2, 4, 6]))
def test_a_middle_that_is_repeated_makes_the_schedule_for_more_microbatches(extra: int, ranks: int) -> None:
    for name, directions in (("dualpipev", 1), ("dualpipe", 2)):
        short = build(name, ranks, 2 * ranks + 2)
        long = build(name, ranks, 2 * ranks + 2 + extra * directions)
        timeline = simulate(short, Costs()).timeline
        rows = [
            _repeated(row, starts, timeline.makespan / 2, extra) for row, starts in zip(tokens(short), timeline.starts, strict=True)
        ]
        assert numbered(long, rows).table == long.table


def test_rows_that_cannot_be_are_told() -> None:
    annealing = _Annealing(build("zbv", 2, 3), Costs(), 2.0, random.Random(0))
    forward, backward, gradient, weight = ((("F", 0),), (("B", 0),), (("I", 0),), (("W", 0),))
    assert annealing._fits(0, [forward, backward, forward, gradient, weight])
    assert not annealing._fits(0, [backward, forward])
    assert not annealing._fits(0, [(("F", 0), ("B", 0))])
    assert not annealing._fits(0, [forward, weight, gradient])
    assert annealing._fits(0, [forward] * 4)
    assert not annealing._fits(0, [forward] * 5)


@settings(max_examples=4, phases=[Phase.generate])  # shrinking would search for minutes
@given(costs=costs_strategy, once=st.booleans())
def test_what_is_found_is_right_and_no_slower_than_what_is_named(costs: Costs, once: bool) -> None:
    found = search(3, 7, costs, memory=6.0, seconds=0.2, once=once)
    check(found.simulation.timeline.schedule)
    assert max(found.simulation.peak_activations) <= 6.0 + 1e-9
    assert found.named is not None
    assert found.bound - 1e-9 <= found.simulation.makespan <= found.named.makespan + 1e-9


def test_a_search_beats_dualpipe_at_deepseeks_costs_and_equal_memory() -> None:
    found = search(4, 8, DEEPSEEK_V3, memory=5.0, seconds=2.0)
    assert found.named is not None and found.named.timeline.schedule.name == "dualpipe"
    assert found.simulation.makespan < 0.99 * found.named.makespan


def test_long_steps_keep_what_short_ones_gained() -> None:
    found = search(2, 200, Costs(pair=0.75), memory=3.0, seconds=1.0)
    assert found.named is not None
    assert found.simulation.makespan <= found.named.makespan


def test_where_no_named_schedule_fits_one_is_built() -> None:
    found = search(4, 8, Costs(pair=0.8), memory=2.0, seconds=0.4)
    assert found.named is None
    assert max(found.simulation.peak_activations) <= 2.0


@pytest.mark.parametrize("kept_for_weight", [2.0, 4.0])
@pytest.mark.parametrize("memory", [4.0, 6.0])
def test_put_off_weight_gradients_that_keep_more_stay_within_memory(memory: float, kept_for_weight: float) -> None:
    found = search(4, 8, Costs(pair=0.75, kept_for_weight=kept_for_weight), memory=memory, seconds=0.3)
    assert max(found.simulation.peak_activations) <= memory + 1e-9


def test_too_little_memory_is_refused() -> None:
    with pytest.raises(SpecError, match=r"memory \(0.5\) holds no schedule of 4 ranks; choose at least 1"):
        search(4, 8, Costs(), memory=0.5, seconds=0.1)
