"""Closed forms of a pipeline against its simulation, and the counts that they take from schedules."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quintet.errors import SpecError
from quintet.plan.costs import Costs
from quintet.plan.memory import peaks_in_flight
from quintet.plan.pipeline_time import pairs_per_microbatch, pipeline_time
from quintet.plan.simulate import simulate
from quintet.plan.stages import StageTime
from quintet.schedule import build
from quintet.schedule.check import in_flight
from quintet.schedule.held import peak
from quintet.spec.layout import Layout


def equal(num_stages: int, *, forward: float, backward_input: float, weight: float) -> list[StageTime]:
    return [StageTime(forward=forward, input=backward_input, weight=weight, all_to_all=0.0, all_to_all_again=0.0)] * num_stages


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["gpipe", "1f1b"]),
    ranks=st.integers(2, 8),
    microbatches=st.integers(1, 24),
    times=st.tuples(*[st.floats(0.1, 3.0)] * 3),
)
def test_one_f_one_b_and_gpipe_are_exact(name: str, ranks: int, microbatches: int, times: tuple[float, float, float]) -> None:
    f, i, w = times
    layout = Layout(pp=ranks, schedule=name)  # type: ignore[arg-type]
    closed = pipeline_time(layout, microbatches, equal(ranks, forward=f, backward_input=i, weight=w), hop=0.0, p2p_hidden=1.0)
    simulated = simulate(build(name, ranks, microbatches), Costs(forward=f, backward_input=i, weight=w))
    assert closed.total == pytest.approx(simulated.makespan)


@pytest.mark.parametrize(("name", "chunks"), [("interleaved", 2), ("zb1p", 1), ("zbv", 2), ("interleaved", 4)])
@pytest.mark.parametrize(("ranks", "microbatches"), [(4, 16), (8, 32)])
def test_other_closed_forms_are_within_three_percent(name: str, chunks: int, ranks: int, microbatches: int) -> None:
    stages = equal(ranks * chunks, forward=1 / chunks, backward_input=1 / chunks, weight=1 / chunks)
    layout = Layout(pp=ranks, schedule=name, chunks=max(2, chunks))  # type: ignore[arg-type]
    closed = pipeline_time(layout, microbatches, stages, hop=0.0, p2p_hidden=1.0)
    simulated = simulate(build(name, ranks, microbatches, chunks=chunks), Costs())
    assert closed.total == pytest.approx(simulated.makespan, rel=0.03)


@settings(max_examples=20, deadline=None)
@given(name=st.sampled_from(["dualpipe", "dualpipev"]), half=st.integers(1, 5), more=st.integers(0, 12))
def test_pairs_are_as_many_as_the_schedule_has(name: str, half: int, more: int) -> None:
    ranks, microbatches = 2 * half, 4 * half + 2 * more
    table = build(name, ranks, microbatches).table
    pairs = sum(work.kind == "FB" for row in table for work in row)
    forwards = sum(op.kind == "F" for row in table for work in row for op in work.ops)
    assert pairs_per_microbatch(name, ranks, microbatches) == pytest.approx(pairs / forwards)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["gpipe", "1f1b", "interleaved", "zb1p", "interleaved-zb", "zbv", "dualpipev", "dualpipe"]),
    ranks=st.integers(2, 8),
    microbatches=st.integers(2, 60),
    chunks=st.integers(2, 3),
)
def test_micro_batches_in_flight_are_those_of_the_whole_schedule(name: str, ranks: int, microbatches: int, chunks: int) -> None:
    try:
        schedule = build(name, ranks, microbatches, chunks=chunks)
    except SpecError:
        return
    stages = range(schedule.num_stages)
    moments = peaks_in_flight(name, ranks, microbatches, chunks)
    for put_off in (0.0, 0.5, 1.0, 2.5):  # of a micro-batch, beside one that is not
        sizes = {"kept": dict.fromkeys(stages, 1.0), "put_off": dict.fromkeys(stages, put_off)}
        assert [max(k + put_off * p for k, p in of_rank) for of_rank in moments] == [peak(row, **sizes) for row in schedule.table]
    assert tuple(max(k + p for k, p in of_rank) for of_rank in moments) == in_flight(schedule)
