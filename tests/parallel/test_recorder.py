"""What a rank tells of itself, and what others make of it when one of them falls silent."""

from __future__ import annotations

import json
import time

import pytest
import torch.distributed as dist

from quintet.errors import RankError
from quintet.parallel import recorder
from quintet.parallel.recorder import SHOWN, Recorder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "TELL_SECONDS", 0.01)


def heard(store: dist.Store, rank: int, text: str, *, ago: float) -> None:
    store.set(f"step-{rank}", json.dumps((time.time() - ago, text)))


def fail(message: str = "Connection closed by peer") -> None:
    raise RuntimeError(message)


def test_who_was_silent_for_longest_is_named_with_what_it_did() -> None:
    store = dist.HashStore()
    one = Recorder(1, range(3), store)
    heard(store, 0, "in step 7, waits at zero.publish", ago=0.001)
    heard(store, 2, "in step 7", ago=9.0)
    with pytest.raises(RankError) as error, one.during("step 7"):
        fail("[/a/b.cc:78] Timed out waiting 8000ms. More")
    first, *lines, last = str(error.value).splitlines()
    assert first == "rank 1 waits in step 7, the meeting of the ranks, for a rank that is gone or hangs: Timed out waiting 8000ms"
    assert [line.partition(", heard")[0] for line in lines] == [
        "  rank 0: in step 7, waits at zero.publish",
        "  rank 1: in step 7, waits at the meeting of the ranks",
        "  rank 2: in step 7",
    ]
    assert last.startswith("look first at rank 2, which was silent for longest, then start all of them again")


def test_of_many_ranks_the_most_silent_are_listed() -> None:
    store = dist.HashStore()
    one = Recorder(0, range(100), store)
    for rank in range(1, 100):
        heard(store, rank, "in step 7", ago=rank)
    with pytest.raises(RankError) as error, one.during("step 7"):
        fail()
    text = str(error.value)
    assert "rank 99: in step 7, heard 99.0 s ago" in text and "rank 50:" not in text
    assert f"and {100 - SHOWN} more, which were heard since" in text and "look first at rank 99" in text


def test_a_rank_that_was_never_heard_is_the_first_to_look_at() -> None:
    one = Recorder(0, range(2), dist.HashStore())
    with pytest.raises(RankError, match="rank 1: was not heard\nlook first at rank 1"), one.during("step 1"):
        fail()


def test_an_error_of_its_own_stays_what_it_is_and_says_when() -> None:
    one = Recorder(0, range(2), dist.HashStore())
    with pytest.raises(RuntimeError, match="shapes") as error, one.during("step 7"):
        fail("shapes differ")
    assert error.value.__notes__ == ["step 7"]


def test_the_others_hear_what_a_rank_does_and_what_it_has_done() -> None:
    store = dist.HashStore()
    one = Recorder(0, range(2), store)

    def told() -> str:
        one.tell()
        text: str = json.loads(store.get("step-0"))[1]
        return text

    with one.during("step 3"):
        assert told() == "in step 3"
        one.begin_row()
        one.begin("0F1", 4)
        assert told() == "in step 3, at 0F1 (place 4 in row 1)"
    with one.during("the evaluation of step 3"):
        assert told() == "in the evaluation of step 3"
    assert told() == "behind the evaluation of step 3"


def test_a_rank_that_falls_silent_is_named_once_and_again_only_after_it_was_heard() -> None:
    store, now, news = dist.HashStore(), [0.0], dict[int, tuple[float, float]]()
    one = Recorder(0, range(4), store, clock=lambda: now[0])

    def silent(at: float) -> list[int]:
        now[0] = at
        return one._fallen_silent(news)

    heard(store, 1, "in step 7", ago=900)  # by a clock that is wrong, which does not matter
    heard(store, 3, recorder._LEFT, ago=0)
    assert silent(0) == silent(10) == []
    assert silent(11) == [1, 2] and silent(12) == []
    heard(store, 1, "in step 8", ago=890)
    assert silent(13) == silent(23) == []
    assert silent(24) == [1]


def test_who_comes_to_its_end_says_so_and_who_fails_leaves_its_last_word() -> None:
    store = dist.HashStore()
    one = Recorder(0, range(2), store)
    with pytest.raises(RuntimeError), one.telling():
        one.doing = "in step 3"
        one.tell()
        raise RuntimeError("full")
    assert json.loads(store.get("step-0"))[1] == "in step 3"
    with one.telling():
        pass
    assert json.loads(store.get("step-0"))[1] == recorder._LEFT
