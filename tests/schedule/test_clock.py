"""The walk through a schedule, against the longest path through a graph that is made from `needs` alone."""

from __future__ import annotations

from dataclasses import replace
from graphlib import TopologicalSorter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quintet.errors import SpecError
from quintet.schedule import Op, Schedule, build
from quintet.schedule.clock import Durations, Timeline, unit, walk
from quintet.schedule.op import Work, does, needs
from tests.schedule.schedules import schedules


def longest_path(schedule: Schedule, durations: Durations) -> dict[Work, float]:
    """When each work ends: after all that it needs and its predecessor on the rank, and a message's latency if it comes from another."""
    maker = {op: work for row in schedule.table for work in row for op in does(work)}
    rank_of = {work: rank for rank, row in enumerate(schedule.table) for work in row}
    inputs = {work: {maker[op] for op in needs(work, num_stages=schedule.num_stages)} for row in schedule.table for work in row}
    before = {work: earlier for row in schedule.table for earlier, work in pairwise(row)}
    graph = {work: needed | ({before[work]} if work in before else set()) for work, needed in inputs.items()}
    ends: dict[Work, float] = {}
    for work in TopologicalSorter(graph).static_order():
        arrivals = [ends[one] + durations.latency * (rank_of[one] != rank_of[work]) for one in inputs[work]]
        start = max([0.0, *arrivals, *([ends[before[work]]] if work in before else [])])
        ends[work] = start + seconds(work, durations)
    return ends


def seconds(work: Work, durations: Durations) -> float:
    lists = {"F": durations.forward, "B": durations.backward, "I": durations.backward_input, "W": durations.weight}
    if isinstance(work, Op):
        return lists[work.kind][work.stage]
    return durations.pair[work.forward.stage, work.backward.stage]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Schedule, Durations]:
    schedule = draw(schedules(most_ranks=5, most_microbatches=10))
    n = schedule.num_stages
    lists = [tuple(draw(st.lists(st.integers(1, 9).map(float), min_size=n, max_size=n))) for _ in range(4)]
    pair = {(f, b): float(draw(st.integers(1, 9))) for row in schedule.stages for _, f in row for _, b in row}
    latency = draw(st.sampled_from([0.0, 0.5, 2.0]))
    forward, backward, backward_input, weight = lists
    return schedule, Durations(
        forward=forward, backward=backward, backward_input=backward_input, weight=weight, pair=pair, latency=latency
    )


@given(case=cases())
def test_every_op_ends_at_the_end_of_its_longest_path(case: tuple[Schedule, Durations]) -> None:
    schedule, durations = case
    timeline = walk(schedule, durations)
    expected = longest_path(schedule, durations)
    assert timeline.ends == [[expected[work] for work in row] for row in schedule.table]
    assert timeline.makespan == max(expected.values())


def gaps(timeline: Timeline, rank: int) -> list[float]:
    return [start - end for start, end in zip(timeline.starts[rank], [0.0, *timeline.ends[rank]], strict=False)]


def test_what_is_under_way_is_told_apart_from_what_is_not_computed_yet() -> None:
    schedule = build("gpipe", 2, 1)
    timeline = walk(schedule, replace(unit(schedule), latency=0.25))
    assert gaps(timeline, 1) == [1.25, 0.0]
    assert timeline.waits == [0.25, 0.25]


def test_messages_of_one_link_follow_each_other() -> None:
    schedule = build("gpipe", 2, 3)
    timeline = walk(schedule, replace(unit(schedule), wire=2.0))
    assert timeline.starts[1][:3] == [3.0, 5.0, 7.0]


def test_a_pair_of_unknown_cost_takes_the_sum() -> None:
    schedule = build("dualpipe", 2, 4)
    timeline = walk(schedule, unit(schedule))
    lengths = {str(w): e - s for w, s, e in zip(schedule.table[0], timeline.starts[0], timeline.ends[0], strict=True)}
    assert lengths["(1F3;0B0)"] == 3.0


def test_ranks_that_wait_for_each_other_are_named_with_what_they_wait_for() -> None:
    table = ((Op("F", 0, 0), Op("B", 0, 0), Op("F", 0, 1), Op("B", 0, 1)), (Op("F", 1, 1), Op("B", 1, 1), Op("F", 1, 0), Op("B", 1, 0)))
    schedule = Schedule(name="crossed", num_microbatches=2, routes=((0, 1),), table=table)
    with pytest.raises(SpecError, match="crossed cannot finish: rank 0 waits at 0B0 for 1I0; rank 1 waits at 1F1 for 0F1"):
        walk(schedule, unit(schedule))
