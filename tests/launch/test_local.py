"""Ranks on this machine: results in order, the first error that means something, and nobody left behind."""

from __future__ import annotations

import os
import time

import pytest

from quintet.errors import RankError, UsageError
from quintet.launch.local import run_on_ranks


def place(factor: int) -> tuple[int, int]:
    return factor * int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def refuse_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        raise UsageError("no")
    raise RankError("rank 0 lost rank 1")


def die_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        os._exit(7)
    time.sleep(600)


def break_on_rank_0() -> None:
    raise ZeroDivisionError("here")


def test_results_come_back_in_the_order_of_the_ranks() -> None:
    heard: list[int] = []
    assert run_on_ranks(3, place, (10,), preload=[], on_result=heard.append) == [(0, 3), (10, 3), (20, 3)]
    assert sorted(heard) == [0, 1, 2]


def test_the_error_that_others_only_suffer_from_is_not_the_one_that_is_told() -> None:
    with pytest.raises(UsageError, match="no"):
        run_on_ranks(2, refuse_on_rank_1, (), preload=[])


def test_a_rank_that_dies_is_named_and_the_others_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quintet.launch.local._GRACE_SECONDS", 0.1)
    with pytest.raises(RankError, match=r"rank 1 died \(exit code 7\)"):
        run_on_ranks(2, die_on_rank_1, (), preload=[])


def test_what_breaks_on_a_rank_is_told_with_its_trace() -> None:
    with pytest.raises(RankError, match=r"rank 0 failed:\n.*\n(.*\n)*ZeroDivisionError: here"):
        run_on_ranks(1, break_on_rank_0, (), preload=[])
