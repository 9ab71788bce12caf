"""A file that grows by whole pieces, and that a full disk does not turn into the end of a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path


def warn(text: str) -> None:
    """Tell a person on stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


class Appender:
    """Appends each piece whole, or, when it cannot be written, drops it and takes its beginning back.

    The first failure is told by `warn`; how many pieces are missing is told at the end. The file is opened by the first piece.
    """

    def __init__(self, path: Path, *, warn: Callable[[str], None] = warn) -> None:
        self._path, self._warn = path, warn
        self._descriptor: int | None = None
        self._dropped = 0

    def write(self, piece: bytes) -> None:
        """Append; never raises OSError."""
        try:
            if self._descriptor is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            _write_whole(self._descriptor, piece)
        except OSError as error:
            if not self._dropped:
                self._warn(f"cannot write {self._path} ({error.strerror}): what belongs there is dropped until it can; the run goes on")
            self._dropped += 1

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Close; safe to call twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if self._dropped:
            self._warn(f"{self._dropped} entries are missing from {self._path}")
            self._dropped = 0


def _write_whole(descriptor: int, piece: bytes) -> None:
    end = os.fstat(descriptor).st_size
    rest = memoryview(piece)
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except OSError:
        os.ftruncate(descriptor, end)
        raise


def drop_torn_line(path: Path) -> None:
    """Cut the file behind its last newline: what follows is the beginning of a line that a kill cut off."""
    if not path.exists():
        return
    with path.open("rb") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
    if end < size:
        os.truncate(path, end)
