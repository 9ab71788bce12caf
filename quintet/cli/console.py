"""The console on stderr, where people read along: that they leave, or that a log's disk is full, ends no work."""

from __future__ import annotations

import errno
import os
import sys
from typing import IO, Any, cast

from rich.console import Console


def stderr() -> Console:
    """A console on stderr to which printing never fails."""
    if sys.stderr is None:  # closed by whoever started us
        return Console(stderr=True, quiet=True)
    return Console(file=cast(IO[str], _Forgiving(sys.stderr)))


class _Forgiving:
    """A stream whose writes are lost where they fail. A closed pipe or terminal becomes /dev/null, which takes what is left, too."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._do(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._do(self._stream.flush)

    def _do(self, work: Any) -> None:
        try:
            work()
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
