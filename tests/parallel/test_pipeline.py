"""The runtime moves what each op needs to where it is needed, in the order of the table, whatever the schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quintet.parallel.mesh import make_mesh
from quintet.parallel.pipeline import Pipeline, Turns
from quintet.parallel.recorder import Recorder
from quintet.schedule import NAMES, Schedule, add_transfers, build, check, fewest_microbatches, forward_only
from quintet.spec.layout import ARRANGEMENT, Layout
from tests.ranks import on_ranks


@dataclass
class Counting:
    """A stage whose numbers tell where they have been: forward x -> 3 x + stage + 1, backward g -> 2 g + stage + 1."""

    stage: int
    num_stages: int
    log: list[str]
    turns: int = 0
    """How often work is set aside."""
    results: list[tuple[str, float]] = field(default_factory=list)
    empty: Sequence[int] = ()
    """Micro-batches without elements."""

    def room(self, microbatch: int) -> Tensor:
        return torch.empty(0 if microbatch in self.empty else 1, 2)

    def forward(self, microbatch: int, x: Tensor | None) -> Turns[Tensor | None]:
        for turn in range(self.turns):
            self.log.append(f"{self.stage}F{microbatch}.{turn}")
            yield
        self.log.append(f"{self.stage}F{microbatch}")
        x = torch.full_like(self.room(microbatch), microbatch) if x is None else x
        y = 3 * x + self.stage + 1
        if self.stage == self.num_stages - 1:
            self.results.append((f"F{microbatch}", float(y.sum())))
            return None
        return y

    def backward(self, microbatch: int, gradient: Tensor | None, *, put_off: bool) -> Turns[Tensor | None]:
        for turn in range(self.turns):
            self.log.append(f"{self.stage}B{microbatch}.{turn}")
            yield
        self.log.append(f"{self.stage}{'I' if put_off else 'B'}{microbatch}")
        gradient = torch.full_like(self.room(microbatch), microbatch) if gradient is None else gradient
        gradient = 2 * gradient + self.stage + 1
        if self.stage == 0:
            self.results.append((f"B{microbatch}", float(gradient.sum())))
            return None
        return gradient

    def weights(self, microbatch: int) -> None:
        self.log.append(f"{self.stage}W{microbatch}")


def expected(kind: str, microbatch: int, num_stages: int, numel: int = 2) -> tuple[str, float]:
    value = float(microbatch)
    for stage in range(num_stages) if kind == "F" else reversed(range(num_stages)):
        value = (3 if kind == "F" else 2) * value + stage + 1
    return f"{kind}{microbatch}", value * numel


def run(
    schedule: Schedule, *, evaluation: bool = False, turns: int = 0, empty: Sequence[int] = ()
) -> list[tuple[list[str], list[tuple[str, float]]]]:
    """Per rank, what its stages logged and the results that came out there."""
    program = add_transfers(forward_only(schedule)) if evaluation else check(schedule).program

    def work(rank: int) -> tuple[list[str], list[tuple[str, float]]]:
        log: list[str] = []
        mesh = make_mesh(Layout(pp=schedule.num_ranks, schedule="1f1b", node_size=schedule.num_ranks))
        stages = {stage: Counting(stage, schedule.num_stages, log, turns, empty=empty) for _, stage in schedule.stages[rank]}
        pipeline = Pipeline(mesh["pp"], stages, Recorder(rank, range(schedule.num_ranks)))
        for _ in range(2):  # a second step finds everything as the first did
            pipeline.run(program)
        return log, [result for stage in stages.values() for result in stage.results]

    return on_ranks(schedule.num_ranks, work)


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_brings_each_micro_batch_through_all_stages_and_back(name: str) -> None:
    schedule = build(name, 4, fewest_microbatches(name, 4) + 2)
    found = run(schedule)
    results = sorted(result for _, results in found for result in results)
    wanted = [expected(kind, m, schedule.num_stages) for kind in "FB" for m in range(schedule.num_microbatches)]
    assert results == sorted(2 * wanted)
    for rank, (log, _) in enumerate(found):
        assert log == 2 * [str(op) for work in schedule.table[rank] for op in reversed(work.ops)]


@settings(max_examples=4)
@given(st.sampled_from(NAMES), st.integers(2, 5), st.integers(0, 3), st.booleans())
def test_any_number_of_ranks_and_micro_batches(name: str, num_ranks: int, more: int, evaluation: bool) -> None:
    if ARRANGEMENT[name] == "mirror":  # type: ignore[index]
        num_ranks, more = 2 * (num_ranks // 2), 2 * (more // 2)
    schedule = build(name, num_ranks, fewest_microbatches(name, num_ranks) + more)
    results = sorted(result for _, results in run(schedule, evaluation=evaluation) for result in results)
    wanted = [expected(kind, m, schedule.num_stages) for kind in ("F" if evaluation else "FB") for m in range(schedule.num_microbatches)]
    assert results == sorted(2 * wanted)


def test_in_a_pair_both_take_turns_and_the_backward_begins() -> None:
    schedule = build("dualpipev", 2, 6)
    log = run(schedule, turns=2)[0][0]
    forward, backward = next(work.ops for work in schedule.table[0] if len(work.ops) == 2)
    begin = log.index(f"{backward}.0")
    assert log[begin : begin + 6] == [f"{backward}.0", f"{forward}.0", f"{backward}.1", f"{forward}.1", f"{backward}", f"{forward}"]


def test_a_micro_batch_without_sequences_is_not_sent() -> None:
    schedule = build("dualpipe", 2, 4)
    results = dict(result for _, results in run(schedule, empty=(3,)) for result in results)
    assert results == dict(expected(kind, m, 2, numel=0 if m == 3 else 2) for kind in "FB" for m in range(4))


def test_layouts_say_of_every_schedule_where_its_stages_lie() -> None:
    assert set(ARRANGEMENT) == set(NAMES)
    for name in ARRANGEMENT:
        for pp in (2, 4, 6):
            layout = Layout(pp=pp, schedule=name, chunks=3)
            schedule = build(name, pp, 2 * pp, chunks=3)
            assert layout.num_stages == schedule.num_stages
            assert [layout.stages_at(place) for place in range(pp)] == [tuple(sorted({s for _, s in held})) for held in schedule.stages]
            assert tuple(layout.place_of(stage) for stage in range(layout.num_stages)) == schedule.routes[0]
