"""`quintet watch` shows a run from its files alone, live, as lines or as a picture, and ends as the run ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from quintet.cli.main import main
from quintet.cli.watch import follow, past
from quintet.monitor.metrics import Event, Message
from quintet.monitor.sinks import JsonLines
from quintet.monitor.status import StatusFile, read_status, write_status
from quintet.train.directory import held
from tests.monitor.events import evaluated, record, saved


@pytest.fixture
def directory(root: Path, tmp_path: Path) -> Path:
    (tmp_path / "recipe.toml").write_text((root / "recipes" / "laptop.toml").read_text())
    return tmp_path


def write(directory: Path, *events: Event, exit_code: int | None = None) -> None:
    """What a process that trains leaves: its events, and a verdict where it has ended."""
    status, lines = StatusFile(directory, resumed=True, every_seconds=0), JsonLines(directory / "metrics.jsonl")
    for event in events:
        lines.write(event)
        status.write(event)
    if exit_code is not None:
        status.finish(exit_code, "as it had to be")
    lines.close()


def followed(directory: Path, happenings: list[Callable[[], None]], *, terminal: bool) -> tuple[int, str]:
    """The exit code and the output of watching, where at each wait the next thing happens."""
    output = StringIO()
    console = Console(file=output, force_terminal=terminal, width=100)
    return follow(directory, console, wait=lambda _: happenings.pop(0)()), output.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_is_followed_from_before_its_first_step_to_its_end(directory: Path, terminal: bool) -> None:
    happenings = [
        lambda: write(directory, record(1)),
        lambda: write(directory, Message(text="a new phase"), record(2), saved(2)),
        lambda: write(directory, record(3), exit_code=75),
    ]
    code, text = followed(directory, happenings, terminal=terminal)
    assert (code, happenings) == (75, [])
    assert [word in text for word in ("step 1/10", "a new phase", "step 2/10", "step 3/10")] == [True] * 4
    assert "interrupted: as it had to be; quintet resume" in text


def test_watching_begins_with_what_was_before_and_goes_back_with_a_resumed_run(directory: Path) -> None:
    write(directory, *(record(step) for step in range(1, 7)))

    def resumed() -> None:
        (directory / "metrics.jsonl").unlink()
        write(directory, *(record(step) for step in range(1, 4)))

    happenings = [resumed, lambda: write(directory, record(4), exit_code=0)]
    code, text = followed(directory, happenings, terminal=True)
    shown = [line.split("step ")[1].split("/")[0] for line in text.splitlines() if "step " in line and "/10" in line]
    assert (code, list(dict.fromkeys(shown))) == (0, ["6", "3", "4"])


def test_a_look_shows_the_panel_and_how_the_run_ended(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(directory, record(9), evaluated(9), exit_code=12)
    assert main(["watch", str(directory), "--once"]) == 0
    text = capsys.readouterr().out
    assert "step 9/10" in text and "stdlib 4.2500" in text and "failed, " in text


def test_a_run_whose_process_was_killed_is_told_from_one_that_is_slow(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(directory, record(1))
    status = read_status(directory)
    assert status is not None
    write_status(directory, replace(status, updated=time.time() - 60))
    with held(directory):
        assert main(["watch", str(directory), "--once"]) == 0
    assert "last news 1m 00s ago ─" in capsys.readouterr().out
    assert main(["watch", str(directory), "--once"]) == 0
    assert "last news 1m 00s ago; no process here trains it ─" in capsys.readouterr().out


def test_a_run_without_a_step_is_waited_for(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(directory), "--once"]) == 0
    assert "waiting for the first step" in (text := capsys.readouterr().out) and "not begun yet" in text


def test_the_picture_holds_the_panel(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(directory, record(4))
    assert main(["watch", str(directory), "--svg", str(tmp_path / "live.svg")]) == 0
    picture = (tmp_path / "live.svg").read_text()
    assert picture.startswith("<svg") and "step&#160;4/10" in picture and "@font-face" not in picture
    assert main(["watch", str(directory), "--svg", str(tmp_path / "none" / "live.svg")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path)]) == 2
    assert "is not a run's directory: it has no recipe.toml" in capsys.readouterr().err


def test_events_were_as_long_ago_as_the_steps_after_them_took() -> None:
    assert past([record(1), saved(1), record(2, seconds=4.0), record(3, seconds=2.0)], 100.0) == [94.0, 94.0, 98.0, 100.0]
