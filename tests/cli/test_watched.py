"""What surrounds training and generation: the verdict in status.json, refusals, and text that is printed as it is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quintet.cli.generate import pieces
from quintet.cli.main import main
from quintet.cli.options import refuse_broken_text
from quintet.cli.watched import watched
from quintet.errors import CheckpointError, NumericsError, UsageError
from quintet.monitor.metrics import read_events
from quintet.monitor.sinks import Fanout
from quintet.monitor.status import Status, read_status
from quintet.spec import parse
from quintet.spec.run import Run
from tests.monitor.events import record


@pytest.fixture
def run(root: Path) -> Run:
    return parse.read(root / "recipes" / "laptop.toml")


def status_of(directory: Path) -> Status:
    status = read_status(directory)
    assert status is not None
    return status


@pytest.mark.parametrize(("exit_code", "verdict", "told"), [(0, "done", ""), (75, "interrupted", "continue with: quintet resume")])
def test_the_exit_code_is_returned_and_stands_in_the_status(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], exit_code: int, verdict: str, told: str
) -> None:
    def call(sinks: Fanout) -> int:
        sinks.write(record(1))
        return exit_code

    assert watched(run, tmp_path, call) == exit_code
    assert (status_of(tmp_path).verdict, status_of(tmp_path).exit_code) == (verdict, exit_code)
    assert read_events(tmp_path / "metrics.jsonl") == [record(1)]
    out, err = capsys.readouterr()
    assert out == ""
    assert "step 1/10" in err and told in err


def test_an_error_while_training_passes_on_and_stands_in_the_status(run: Run, tmp_path: Path) -> None:
    def call(sinks: Fanout) -> int:
        sinks.write(record(1))
        raise NumericsError("step 2: loss nan")

    with pytest.raises(NumericsError):
        watched(run, tmp_path, call)
    assert (status_of(tmp_path).exit_code, status_of(tmp_path).message) == (12, "step 2: loss nan")


def test_a_resume_without_a_checkpoint_is_told_in_the_runs_own_status(run: Run, tmp_path: Path) -> None:
    def call(sinks: Fanout) -> int:
        raise CheckpointError("no checkpoint")

    with pytest.raises(CheckpointError):
        watched(run, tmp_path, call, resumed=True)
    assert status_of(tmp_path).exit_code == 11


def test_resuming_what_is_no_run_is_a_checkpoint_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resume", str(tmp_path)]) == 11
    assert "is not a run: it has no recipe.toml" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def decode_bytes(ids: Sequence[int]) -> str:
    """A tokenizer whose tokens are single bytes."""
    return bytes(ids).decode(errors="replace")


@given(st.text())
def test_text_arrives_whole_even_where_a_character_is_several_tokens(text: str) -> None:
    assert "".join(pieces(text.encode(errors="replace"), decode_bytes)) == text.encode(errors="replace").decode()


def test_a_character_is_printed_with_its_last_byte_and_what_is_no_text_does_not_block() -> None:
    assert list(pieces("aé".encode(), decode_bytes)) == ["a", "é"]
    assert list(pieces(b"\xf0\x9f", decode_bytes)) == ["\ufffd"]
    assert "".join(pieces(b"\xff" * 5 + b"a", decode_bytes)).endswith("a")


@given(st.text())
def test_a_prompt_of_any_text_passes(text: str) -> None:
    refuse_broken_text("--prompt", text)


def test_a_prompt_that_is_not_utf_8_is_a_usage_error_with_the_byte() -> None:
    prompt = b"caf\xe9".decode(errors="surrogateescape")  # as Python hands over the bytes of a command line
    with pytest.raises(UsageError, match=r"--prompt is not UTF-8 text: b'\\xe9' after 'caf'"):
        refuse_broken_text("--prompt", prompt)
