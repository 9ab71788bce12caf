"""Signals that stop a run: heard at any time, heeded between steps, so that the last checkpoint is whole."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from quintet.monitor.interrupt import raise_if_heard

_STOPPING = b"\nstopping after this step and its checkpoint; a third signal ends the run at once\n"


class Stop:
    """Set by SIGTERM, SIGINT and SIGHUP (the terminal was closed); the loop looks between steps, so neither a step nor a save is cut
    in two."""

    def __init__(self, *, tell: bool, alone: bool) -> None:
        """tell: say on stderr that a signal was heard. alone: no other rank would be left behind by a Ctrl-C that ends the first step at
        once; it may compile for a minute, and there is nothing to lose. `at_once` is set to False when that step is done."""
        self.num_signals, self.tell, self.at_once = 0, tell, alone

    def __bool__(self) -> bool:
        """Whether the loop shall stop."""
        return self.num_signals > 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """A signal came."""
        self.num_signals += number != signal.SIGHUP or not self.num_signals  # of which kernel and shell send several
        if self.at_once and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.num_signals == 1 and self.tell and sys.__stderr__ is not None:  # else 2 may be any file by now
            with suppress(OSError):  # not by way of the console, which may just be at work
                os.write(2, _STOPPING)
        if self.num_signals >= 3:  # somebody insists: leave at once, the last complete checkpoint stays
            os._exit(128 + number)


@contextmanager
def stop_signals(*, tell: bool, alone: bool) -> Iterator[Stop]:
    """Collect signals instead of being ended by them. Raises KeyboardInterrupt for one that was swallowed before."""
    raise_if_heard()
    stop = Stop(tell=tell, alone=alone)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    if before[signal.SIGHUP] is signal.SIG_IGN:  # nohup: the run outlives its terminal
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, stop)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
