"""`quintet watch`: the live view of a run that trains in another process, read from the run's files."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from quintet.cli.console import stderr
from quintet.cli.options import RunPath, Switch, read
from quintet.errors import KEYBOARD_INTERRUPT, UsageError
from quintet.monitor.live import Live
from quintet.monitor.metrics import Event, Record, Tail
from quintet.monitor.sinks import Plain
from quintet.monitor.status import Status, read_status
from quintet.monitor.units import duration
from quintet.spec import parse
from quintet.train.directory import METRICS, RECIPE, is_held

LOOK_EVERY = 0.5
"""Seconds between two looks at the files."""
GONE_SECONDS = 15.0
"""Without news, after which it is asked whether the run's process still holds its directory."""
PICTURE_WIDTH = 110
"""Characters in a line of the picture."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Watch a run that trains in another process, wherever its files can be seen; ends as it ends, with its exit code."""

    run: RunPath
    """The run's directory."""
    once: Switch = False
    """Show how it stands, and end."""
    svg: Path | None = None
    """Write how it stands as a picture into this file, and end."""


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    given = read(Arguments, arguments, command="watch")
    if not (given.run / RECIPE).is_file():
        raise UsageError(f"{given.run} is not a run's directory: it has no {RECIPE}; runs are made by quintet train")
    if given.svg is not None:
        _write_picture(given.run, given.svg)
    elif given.once:
        Console().print(View(given.run, Console()).look().panel())
    else:
        try:
            return follow(given.run, Console())
        except KeyboardInterrupt:
            stderr().print("no longer watching; the run goes on", highlight=False)
            return KEYBOARD_INTERRUPT
    return 0


class View:
    """The live view of a run that its files tell of. While it trains time goes on; when it has ended time stands still."""

    def __init__(self, run_directory: Path, console: Console) -> None:
        self._directory, self._tail = run_directory, Tail(run_directory / METRICS)
        self.status: Status | None = None
        self.live = Live(console, title=parse.read(run_directory / RECIPE).name, clock=self._now)

    def look(self) -> Live:
        """Take in what is new in the files: at first, and after a resume, without drawing; later events are drawn as they come."""
        self.status = read_status(self._directory)  # before the events, so that none comes after the verdict
        events, from_beginning = self._tail.read()
        if from_beginning:
            for event, when in zip(events, past(events, self.status.updated if self.status else self._now()), strict=True):
                self.live.take(event, when)
        else:
            for event in events:
                self.live.write(event)
        if self.status is not None:
            self.live.began = self.status.started
        self.live.note = self._note()
        return self.live

    def _note(self) -> str:
        if self.status is None:
            return "not begun yet"
        seconds = time.time() - self.status.updated
        if self.status.exit_code is not None:
            return f"{self.status.verdict}, {duration(seconds)} ago"
        gone = seconds > GONE_SECONDS and not is_held(self._directory)
        return f"last news {duration(seconds)} ago" + ("; no process here trains it" if gone else "")

    def _now(self) -> float:
        return time.time() if self.status is None or self.status.exit_code is None else self.status.updated


def follow(run_directory: Path, console: Console, *, wait: Callable[[float], object] = time.sleep) -> int:
    """Show the run on `console` until its status is a verdict, and return its exit code: live on a terminal, else a line per event."""
    status = (_draw if console.is_terminal else _list)(run_directory, console, wait)
    remedy = f"; {status.remedy}" if status.remedy else ""
    console.print(f"{status.verdict}: {status.message}{remedy}", markup=False, highlight=False, soft_wrap=True)
    assert status.exit_code is not None
    return status.exit_code


def _draw(run_directory: Path, console: Console, wait: Callable[[float], object]) -> Status:
    view = View(run_directory, console)
    try:
        while True:
            view.look().refresh()
            if view.status is not None and view.status.exit_code is not None:
                return view.status
            wait(LOOK_EVERY)
    finally:
        view.live.close()


def _list(run_directory: Path, console: Console, wait: Callable[[float], object]) -> Status:
    tail, plain = Tail(run_directory / METRICS), Plain(console)
    while True:
        status = read_status(run_directory)
        for event in tail.read()[0]:
            plain.write(event)
        if status is not None and status.exit_code is not None:
            return status
        wait(LOOK_EVERY)


def past(events: Sequence[Event], until: float) -> list[float]:
    """About when each event was, from the seconds that records tell, the last one at `until`: evaluations and starts are not counted."""
    times = list[float]()
    for event in reversed(events):
        times.append(until)
        until -= event.seconds if isinstance(event, Record) else 0.0
    return times[::-1]


def _write_picture(run_directory: Path, path: Path) -> None:
    """Raises UsageError where the file cannot be written."""
    console = Console(record=True, width=PICTURE_WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(View(run_directory, console).look().panel())
    picture = console.export_svg(title=f"quintet watch {run_directory}")
    picture = re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL)  # a picture asks nothing of the network
    try:
        path.write_text(picture, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; give --svg a file in a folder that exists and may be written") from None
    print(path)
