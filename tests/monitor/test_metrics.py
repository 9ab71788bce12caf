"""Events are values: their figures, their JSON lines, and what a kill or a resume does to the file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quintet.errors import DataError
from quintet.monitor.metrics import Event, Message, Tail, from_json, read_events, to_json, truncate_after
from quintet.monitor.sinks import JsonLines
from tests.monitor.events import evaluated, events, record, saved


def write(path: Path, *items: Event) -> None:
    sink = JsonLines(path)
    for item in items:
        sink.write(item)
    sink.close()


def test_balanced_load_has_no_variation_and_no_violation() -> None:
    balanced = record(1, expert_load=((0.25, 0.25, 0.25, 0.25),))
    assert balanced.expert_load_cv == 0
    assert balanced.max_violation == 0


def test_load_figures_are_those_of_a_hand_calculation() -> None:
    # Layer 1: mean 1/4, all on one of four: deviation sqrt(3)/4, CV sqrt(3), worst 4 times the mean. Layer 2 is balanced.
    skewed = record(1, expert_load=((1.0, 0.0, 0.0, 0.0), (0.25, 0.25, 0.25, 0.25)))
    assert skewed.expert_load_cv == pytest.approx(math.sqrt(3) / 2)
    assert skewed.max_violation == pytest.approx(3)


def test_a_dense_model_has_no_load_figures() -> None:
    dense = record(1, expert_load=())
    assert (dense.expert_load_cv, dense.max_violation) == (0, 0)


@given(events)
def test_an_event_comes_back_equal_from_strict_json(event: Event) -> None:
    assert from_json(json.loads(json.dumps(to_json(event), allow_nan=False))) == event


def test_a_loss_that_is_not_a_number_survives_in_strict_json() -> None:
    text = json.dumps(to_json(record(1, loss=math.nan, grad_norm=math.inf)), allow_nan=False)
    back = from_json(json.loads(text))
    assert math.isnan(getattr(back, "loss"))  # noqa: B009
    assert getattr(back, "grad_norm") == math.inf  # noqa: B009


def test_an_unknown_kind_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'recrod' is not a kind of event \(did you mean 'record'\?\)"):
        from_json({"kind": "recrod"})


def test_a_field_that_does_not_fit_is_named() -> None:
    with pytest.raises(DataError, match="num_bytes"):
        from_json({"kind": "saved", "step": 1, "path": "x", "seconds": 1.0})


@settings(max_examples=20)
@given(st.lists(events, max_size=5))
def test_a_file_of_events_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, items: list[Event]) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    path.touch()
    write(path, *items)
    assert read_events(path) == items


@pytest.mark.parametrize("torn", [b'{"kind":"rec', b"{", b'{"kind":"message","text":"whole but for the newline"}'])
def test_a_torn_last_line_is_left_out_and_a_resumed_run_writes_over_it(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, record(1), saved(1))
    with path.open("ab") as file:
        file.write(torn)
    assert read_events(path) == [record(1), saved(1)]
    write(path, record(2))
    assert read_events(path) == [record(1), saved(1), record(2)]


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, 200_000])
def test_a_torn_line_of_any_length_is_cut_off(tmp_path: Path, size: int) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"x" * size)
    write(path, record(1))
    assert read_events(path) == [record(1)]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind":"message","text":"a"}\nnonsense\n{"kind":"message","text":"b"}\n')
    with pytest.raises(DataError, match="line 2: not JSON"):
        read_events(path)


def test_a_missing_file_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no metrics at"):
        read_events(tmp_path / "metrics.jsonl")


def test_a_resumed_run_tells_one_history(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    past = [record(1), record(2), evaluated(2), saved(2), Message(text="saved")]
    write(path, *past, record(3), Message(text="of the lost history"), evaluated(3))
    truncate_after(path, 2)
    assert read_events(path) == past
    write(path, record(3, loss=1.0))
    assert read_events(path) == [*past, record(3, loss=1.0)]


def test_a_checkpoint_that_was_complete_beside_a_later_step_stays_told(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, record(1), record(2), record(3), saved(2), record(4), saved(4))
    truncate_after(path, 2)
    assert read_events(path) == [record(1), record(2), saved(2)]


def test_truncating_takes_a_torn_line_and_leaves_a_missing_file_missing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    truncate_after(path, 1)
    assert not path.exists()
    write(path, record(1))
    with path.open("ab") as file:
        file.write(b'{"kind":')
    truncate_after(path, 5)
    assert path.read_bytes().endswith(b"}\n")


def test_a_growing_file_is_read_by_whole_lines_and_from_the_beginning_after_a_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == ([], True)
    lines = [json.dumps(to_json(record(step))) + "\n" for step in range(1, 5)]
    path.write_text(lines[0] + lines[1][:9])
    assert tail.read() == ([record(1)], True)
    path.write_text("".join(lines[:3]))
    assert tail.read() == ([record(2), record(3)], False)
    assert tail.read() == ([], False)
    truncate_after(path, 1)
    assert tail.read() == ([record(1)], True)
    with path.open("a") as file:
        file.write(lines[3])
    assert tail.read() == ([record(4)], False)
    path.unlink()
    assert tail.read() == ([], True)
