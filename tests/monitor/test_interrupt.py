"""Ctrl-C that nobody heard is told to who asks next."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import pytest

from quintet.monitor.interrupt import raise_if_heard, remembered


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_that_was_swallowed_is_raised_again_where_somebody_asks() -> None:
    with remembered():
        raise_if_heard()
        with contextlib.suppress(BaseException):
            interrupt()
        with pytest.raises(KeyboardInterrupt):
            raise_if_heard()
    raise_if_heard()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_one_that_is_heard_ends_the_work_as_ever() -> None:
    with pytest.raises(KeyboardInterrupt), remembered():
        interrupt()


def test_where_interrupts_are_ignored_they_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with remembered():
            interrupt()
            raise_if_heard()
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_leave_the_handler_alone() -> None:
    seen: list[object] = []

    def work() -> None:
        with remembered():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
