"""What is refused of a pipeline before anything starts, and what runs instead."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quintet.errors import SpecError
from quintet.parallel.stages import program, seconds_by_stage
from quintet.schedule import Op, Pair
from quintet.spec import parse
from quintet.spec.layout import Layout
from quintet.train.foresee import require_schedule

V3 = parse.read(Path(__file__).parents[2] / "recipes/v3-671b.toml")


def test_a_schedule_that_was_asked_for_wants_its_micro_batches_in_the_smallest_batch() -> None:
    with pytest.raises(SpecError) as error:
        require_schedule(replace(V3, layout=replace(V3.layout, schedule="dualpipe")))
    assert "batches of 3072 sequences, which make 24 micro-batches" in str(error.value)
    assert "takes at least 32; raise phases.batch to 3969 or more" in str(error.value)
    longer = replace(V3, phases=tuple(replace(phase, batch=("3969",)) for phase in V3.phases))
    require_schedule(replace(longer, layout=replace(V3.layout, schedule="dualpipe")))


def test_the_default_takes_pairs_where_there_are_enough_micro_batches_and_experts_to_exchange() -> None:
    require_schedule(V3)
    assert V3.layout.num_microbatches(3072, 1) == 24 and program(V3.layout, 24).schedule.name == "zbv"
    assert program(V3.layout, 32).schedule.name == "dualpipev"
    assert program(Layout(pp=2), 8).schedule.name == "zbv"
    assert program(Layout(pp=2, dp=2, ep=2), 2, evaluation=True).schedule.name == "zbv"


FOUND = str(Path(__file__).parents[2] / "docs/images/found.json")


def test_steps_of_as_many_micro_batches_go_by_the_schedule_of_a_file_and_others_by_its_name() -> None:
    layout = Layout(pp=4, schedule="dualpipe", schedule_file=FOUND)
    assert program(layout, 16).schedule.name == "found" and program(layout, 18).schedule.name == "dualpipe"
    with_file = replace(V3, layout=replace(layout, dp=2), phases=tuple(replace(phase, batch=("32",)) for phase in V3.phases))
    require_schedule(with_file)
    other = replace(with_file, phases=tuple(replace(phase, batch=("linear from 36 to 40 until 50%", "hold")) for phase in V3.phases))
    with pytest.raises(SpecError) as error:
        require_schedule(other)
    assert "is for 16 micro-batches, but steps have 18 to 20" in str(error.value) and "a batch of 32 sequences" in str(error.value)


@pytest.mark.parametrize(
    ("layout", "told"),
    [
        (Layout(pp=2, schedule="dualpipe", schedule_file=FOUND), "is for 4 ranks, but layout.pp is 2"),
        (Layout(pp=4, schedule="zb1p", schedule_file=FOUND), "zb1p on [[0, 1, 2, 3]]; set layout.schedule to dualpipe"),
        (Layout(pp=4, schedule_file="nowhere.json"), "'nowhere.json' cannot be read"),
        (Layout(pp=4, schedule_file=__file__), "is no schedule"),
    ],
)
def test_a_file_that_does_not_suit_the_layout_is_refused(layout: Layout, told: str) -> None:
    with pytest.raises(SpecError) as error:
        require_schedule(replace(V3, layout=layout))
    assert told in str(error.value)


def test_the_time_of_a_stage_is_what_it_takes_outside_of_pairs() -> None:
    F, B, I, W = (Op(kind, 1, 0) for kind in "FBIW")  # type: ignore[arg-type]
    other = Op("F", 0, 3)
    times = [(F, 0.0, 1.0), (F, 1.0, 4.0), (F, 4.0, 6.0), (Pair(other, B), 6.0, 60.0), (B, 60.0, 64.0), (other, 64.0, 65.0)]
    assert seconds_by_stage(times) == {1: 2.0 + 4.0}, "stage 0 was never seen backward"
    assert seconds_by_stage([(F, 0.0, 1.0), (I, 1.0, 3.0), (W, 3.0, 6.0)]) == {1: 6.0}
