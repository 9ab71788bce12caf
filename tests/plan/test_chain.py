"""The chain that a step waited for, and what its length is made of."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quintet.errors import SpecError
from quintet.plan.chain import chain, difference
from quintet.plan.costs import Costs
from quintet.plan.simulate import simulate
from quintet.schedule import NAMES, build
from quintet.schedule.clock import Timeline
from quintet.schedule.op import does, needs
from quintet.schedule.table import Schedule


def late(schedule: Schedule, costs: Costs, *, turn: float, message: float, longer: float, rng: random.Random) -> Timeline:
    """A step whose ops all take up to `longer` seconds more, and begin a `turn` after the one before and a `message` after their input."""
    paper = simulate(schedule, costs).timeline
    starts: list[list[float]] = [[] for _ in schedule.table]
    ends: list[list[float]] = [[] for _ in schedule.table]
    done: dict[object, tuple[float, int]] = {}
    places = [(rank, i) for rank, row in enumerate(schedule.table) for i in range(len(row))]
    for begin, end, rank, i in sorted((paper.starts[rank][i], paper.ends[rank][i], rank, i) for rank, i in places):
        work = schedule.table[rank][i]
        ready = [ends[rank][-1] + turn] if i else [0.01]
        ready += [when + (message if at != rank else turn) for when, at in (done[op] for op in needs(work, num_stages=schedule.num_stages))]
        starts[rank].append(max(ready))
        ends[rank].append(max(ready) + end - begin + longer * rng.random())
        done |= {op: (ends[rank][-1], rank) for op in does(work)}
    return Timeline(schedule=schedule, starts=starts, ends=ends, waits=[0.0] * schedule.num_ranks)


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(NAMES), ranks=st.integers(1, 5), microbatches=st.integers(1, 12), seed=st.integers(0, 99))
def test_the_parts_of_a_difference_add_up(name: str, ranks: int, microbatches: int, seed: int) -> None:
    try:
        schedule = build(name, ranks, microbatches)
    except SpecError:
        return
    costs, rng = Costs(pair=0.75), random.Random(seed)
    measured = late(schedule, costs, turn=0.001, message=0.004, longer=0.02, rng=rng)
    found = difference(measured, simulate(schedule, costs).timeline)
    parts = found.ops + found.turns + found.messages + found.start + found.other_chain
    assert parts == pytest.approx(found.measured - found.simulated)
    assert min(found.ops, found.turns, found.messages, found.start, -found.other_chain) >= -1e-9
    assert found.num_ops == 1 + found.num_turns + found.num_messages
    assert 0 <= found.ops <= 0.02 * found.num_ops
    assert found.start == pytest.approx(0.01)


@pytest.mark.parametrize("name", NAMES)
def test_on_paper_the_chain_has_no_gaps_and_is_the_longest(name: str) -> None:
    paper = simulate(build(name, 4, 8), Costs(forward=1.0, backward_input=1.5, weight=0.5, pair=0.8)).timeline
    links = chain(paper)
    assert [link.gap for link in links] == pytest.approx([0.0] * len(links))
    found = difference(paper, paper)
    assert (found.ops, found.turns, found.messages, found.other_chain) == pytest.approx((0.0, 0.0, 0.0, 0.0), abs=1e-9)


def test_a_slow_message_is_told_as_such() -> None:
    schedule = build("gpipe", 2, 1)  # 0F0, 1F0, 1B0, 0B0
    measured = Timeline(schedule=schedule, starts=[[0.0, 5.5], [1.5, 2.5]], ends=[[1.0, 7.5], [2.5, 4.5]], waits=[0.0, 0.0])
    found = difference(measured, simulate(schedule, Costs()).timeline)
    assert (found.num_ops, found.num_turns, found.num_messages) == (4, 1, 2)
    assert (found.messages, found.turns, found.ops) == pytest.approx((1.5, 0.0, 0.0))
    assert "2 messages +1500.0 ms (+750.00 each)" in str(found)
