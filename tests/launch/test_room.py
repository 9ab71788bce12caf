"""What a machine has no room for is refused, with what there is, what it would take, and the way round."""

from __future__ import annotations

import pytest

from quintet.errors import UsageError
from quintet.launch.room import PROCESS_BYTES, require_room
from quintet.monitor import machine


@pytest.fixture(autouse=True)
def two_cores_and_8_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "num_cores", lambda: 2)
    monkeypatch.setattr(machine, "free_memory", lambda: 8 * 10**9)


def test_sixteen_ranks_a_core_are_started_and_one_more_is_not() -> None:
    require_room(32, tensor_bytes=10**6, most=None, what="it", remedy="use fewer")
    with pytest.raises(UsageError, match=r"it takes 33 ranks, each a process .* 2 cores are for 32 \(16 each\); use fewer"):
        require_room(33, tensor_bytes=0, most=None, what="it", remedy="use fewer")


def test_memory_counts_every_rank_and_its_process() -> None:
    each = 8 * 10**9 // 4 - PROCESS_BYTES
    require_room(4, tensor_bytes=each, most=None, what="it", remedy="")
    with pytest.raises(UsageError, match=r"it takes about 7\.45 GiB of memory on 4 ranks, of which 7\.45 GiB are free here; use less"):
        require_room(4, tensor_bytes=each + 1, most=None, what="it", remedy="use less")


def test_who_says_how_many_is_believed_up_to_that() -> None:
    require_room(2048, tensor_bytes=10**12, most=2048, what="it", remedy="")
    with pytest.raises(UsageError, match="it takes 2,048 ranks, and --max-ranks allows 2,047"):
        require_room(2048, tensor_bytes=0, most=2047, what="it", remedy="")
