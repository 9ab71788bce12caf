"""Schedules as text: written, read back equal, refused where they are none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given

from quintet.errors import SpecError
from quintet.schedule import Schedule, build
from quintet.schedule.text import dumps, loads, read
from tests.schedule.schedules import schedules


@given(schedule=schedules())
def test_a_schedule_is_read_back_equal(schedule: Schedule) -> None:
    assert loads(dumps(schedule), origin="text") == schedule


def test_the_text_can_be_read_by_eye() -> None:
    tree = json.loads(dumps(build("dualpipe", 2, 4)))
    assert tree["routes"] == ["0 1", "1 0"]
    assert tree["table"][0] == "0F0 1F2 0F1 1B2 (1F3;0B0) 1B3 0I1 0W1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": ["0F0 0X0"]}, "x.json: '0X0' is no op; write 2F0, 2B0, 2I0, 2W0 or (2F5;5B3)"),
        ({"table": ["(0B0;0F1)"]}, "'(0B0;0F1)' is no op"),
        ({"routes": ["0 1"], "table": ["0F0 0B0"]}, "routes name rank 1, but the table has ranks 0 to 0"),
        ({"routes": []}, "must be one or more lists of ranks"),
        ({"routes": ["0", "0"], "num_microbatches": 3}, "num_microbatches (3) must be a positive multiple of the number of routes (2)"),
        ({"num_microbatches": "many"}, "x.json is no schedule: Expected `int`, got `str`"),
    ],
)
def test_what_is_no_schedule_is_refused(change: dict[str, object], message: str) -> None:
    tree = json.loads(dumps(build("gpipe", 1, 1))) | change
    with pytest.raises(SpecError) as error:
        loads(json.dumps(tree), origin="x.json")
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", "1", "null"])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match=r"x.json is no schedule: .*quintet schedule --save"):
        loads(text, origin="x.json")

HOSTILE = {
    "deep": "[" * 100_000,
    "deeper": '{"routes":' * 50_000,
    "infinite": '{"name": "x", "num_microbatches": Infinity, "routes": ["0"], "table": ["0F0 0B0"]}',
    "a float": '{"name": "x", "num_microbatches": 1.5, "routes": ["0"], "table": ["0F0 0B0"]}',
    "a word": '{"name": "x", "num_microbatches": "1", "routes": ["0"], "table": ["0F0 0B0"]}',
    "another field": '{"name": "x", "num_microbatches": 1, "routes": ["0"], "table": ["0F0 0B0"], "more": 1}',
    "markup": '{"name": "[red]x[/nope]", "num_microbatches": 1, "routes": ["0"], "table": ["0F0 0B0"]}',
    "an escape": '{"name": "\\u001b", "num_microbatches": 1, "routes": ["0"], "table": ["0F0 0B0"]}',
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_is_no_schedule(text: str) -> None:
    with pytest.raises(SpecError, match=r"here(:| is no schedule)"):
        loads(text, origin="here")


def test_a_file_that_has_the_name_of_another_schedule_gets_a_name_of_its_own() -> None:
    assert loads(dumps(build("zbv", 2, 4)), origin="here").name == "zbv"
    assert loads(dumps(replace(build("zbv", 2, 4), name="1f1b")), origin="here").name == "1f1b-from-file"


def test_what_is_no_file_is_not_read() -> None:
    with pytest.raises(SpecError, match="must be a file of at most 256 MB"):
        read(Path("/dev/zero"))
