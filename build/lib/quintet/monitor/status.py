"""A run's verdict in one small file, status.json, for people and for the programs that restart runs.

The file is replaced atomically. A disk that is full by the time of the verdict has no room for a second file; then the first one is
overwritten where it lies, which needs no room: it never takes more than the one block (4,096 bytes) that it was given when the run began.
(File systems that never overwrite in place, such as btrfs and ZFS, may refuse that too.)
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal

import msgspec

from quintet.errors import DONE, INTERRUPTED, KEYBOARD_INTERRUPT, DataError, GivenUp, QuintetError, UsageError
from quintet.monitor.metrics import Event, Record

Verdict = Literal["running", "done", "interrupted", "failed"]
_BLOCK = 4096


@dataclass(frozen=True, kw_only=True)
class Status:
    """Where a run stands."""

    verdict: Verdict
    """running, done, interrupted (by a signal, resumable) or failed."""
    exit_code: int | None
    """Exit code of the process (see `errors`); absent while it runs."""
    step: int
    """Optimizer steps done."""
    num_steps: int | None
    """Steps of the whole run; absent before the first record."""
    message: str
    """What happened, in one sentence."""
    remedy: str | None
    """What to do, mostly a command; absent when nothing is to do."""
    pid: int
    """Process that wrote this."""
    started: float
    """When that process began, in seconds since 1970."""
    updated: float
    """When this was written, in seconds since 1970."""


def verdict_of(exit_code: int) -> Verdict:
    """done for 0, interrupted for 75 and 130, failed for anything else."""
    return "done" if exit_code == DONE else "interrupted" if exit_code in (INTERRUPTED, KEYBOARD_INTERRUPT) else "failed"


def write_status(run_directory: Path, status: Status) -> None:
    """Replace status.json whole: a reader sees the old or the new one, never a part. Raises OSError.

    Where that is refused and `status` is a verdict, the file is overwritten in one write.
    """
    content, path = _encoded(status), run_directory / "status.json"
    temporary = run_directory / f".status.json.{os.getpid()}"
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:
        if status.verdict == "running":
            raise
        _overwrite(path, content)
    finally:
        temporary.unlink(missing_ok=True)


def _encoded(status: Status) -> bytes:
    """The status as JSON that fits into one block; a long message loses its middle."""
    content = msgspec.json.format(msgspec.json.encode(status)) + b"\n"
    if len(content) > _BLOCK:
        keep = _BLOCK // 16  # a character takes six bytes at most
        status = replace(status, message=f"{status.message[:keep]} ... {status.message[-keep:]}")
        content = msgspec.json.format(msgspec.json.encode(status)) + b"\n"
    return content


def _overwrite(path: Path, content: bytes) -> None:
    """Put `content` over a file's beginning, and blanks over the rest of it, without asking the disk for room."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(descriptor, content.ljust(os.fstat(descriptor).st_size), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_status(run_directory: Path) -> Status | None:
    """The run's status, or None where none was written; raises DataError for a file that is no status."""
    path = run_directory / "status.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Status)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise DataError(f"{path} is not a run's status: {error}; delete it, the next resume writes a new one") from None


class StatusFile:
    """A sink that keeps status.json up to date while a run goes on, and as a context manager ends it with a verdict.

    A run that is refused because its directory belongs to another leaves that one's status alone: before the first event, only a
    directory that did not exist when this was made, or that is being resumed (`resumed`), is written to.
    """

    def __init__(
        self, run_directory: Path, *, resumed: bool = False, every_seconds: float = 5.0, clock: Callable[[], float] = time.time
    ) -> None:
        self._directory, self._every, self._clock = run_directory, every_seconds, clock
        self._resumed, self._ours = resumed, resumed or not run_directory.exists()
        self._began = False
        self._status = Status(
            verdict="running",
            exit_code=None,
            step=0,
            num_steps=None,
            message="training",
            remedy=None,
            pid=os.getpid(),
            started=clock(),
            updated=-math.inf,
        )

    def write(self, event: Event) -> None:
        self._ours = self._began = True
        if isinstance(event, Record):
            self._status = replace(self._status, step=event.step, num_steps=event.num_steps)
        if self._clock() - self._status.updated >= self._every:
            self._put(self._status)

    def close(self) -> None:
        """Nothing to finish: the verdict comes with `finish`."""

    def finish(self, exit_code: int, message: str) -> None:
        """Write the verdict that `exit_code` means, with the command that continues the run where there is one."""
        if not (self._ours and self._directory.is_dir()):
            return
        verdict = verdict_of(exit_code)
        remedy = None if verdict == "done" else f"quintet resume {shlex.quote(str(self._directory))}"
        if exit_code == GivenUp.exit_code:
            remedy = "do not restart it as it is: read the message, change the recipe, then start a new run"
        self._put(replace(self._status, verdict=verdict, exit_code=exit_code, message=message, remedy=remedy))

    def __enter__(self) -> StatusFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, UsageError) and self._resumed and not self._began:
            return  # such as: another process trains here, and this is its file
        if isinstance(error, QuintetError):
            self.finish(error.exit_code, str(error))
        elif isinstance(error, KeyboardInterrupt):
            self.finish(KEYBOARD_INTERRUPT, "interrupted before training began")
        elif error is not None:
            self.finish(1, f"{type(error).__name__}: {error}")

    def _put(self, status: Status) -> None:
        self._status = replace(status, updated=self._clock())
        # A full disk must not end a run that could go on; the verdict is also the exit code.
        with contextlib.suppress(OSError):
            write_status(self._directory, self._status)
