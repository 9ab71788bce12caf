"""Ctrl-C that is not lost: Python's KeyboardInterrupt vanishes where it meets code that ignores every exception.

Imports that try something out, finalizers and callbacks from C are such code, and loading torch passes through many of them. So the handler
also remembers, and whoever is about to begin long work asks.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class _Remembering:
    """Raises KeyboardInterrupt as Python's own handler does, and counts."""

    def __init__(self) -> None:
        self.num_heard = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.num_heard += 1
        raise KeyboardInterrupt


@contextmanager
def remembered() -> Iterator[None]:
    """Remember each SIGINT within, if this is the main thread and Python's own handler is in its place: not where it is ignored."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _Remembering())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def raise_if_heard() -> None:
    """Raise KeyboardInterrupt if there was a SIGINT before, whatever became of it."""
    handler = signal.getsignal(signal.SIGINT)
    if isinstance(handler, _Remembering) and handler.num_heard:
        raise KeyboardInterrupt
