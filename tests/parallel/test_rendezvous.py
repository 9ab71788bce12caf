"""Ranks that meet, differ, stay away, die or fall silent: each is named, once, and nobody waits for ever."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from quintet.errors import DataError, QuintetError, UsageError
from quintet.parallel import rendezvous
from quintet.parallel.collectives import all_reduce
from quintet.parallel.rendezvous import Ranks, joined, started
from quintet.spec.layout import Layout
from tests.processes import Fate, launch

CPU = torch.device("cpu")


def meet(
    rank: int,
    body: Callable[[Ranks], None] = lambda ranks: None,
    *,
    about: dict[str, str] | None = None,
    count: int = 3,
    seconds: float = 20,
) -> None:
    """One rank of three replicas, from meeting to parting."""
    with joined(Layout(dp=count), about=about or {}, device=CPU, seconds=seconds, arrival=1.2) as ranks:
        assert ranks.mesh.rank == rank
        with ranks.losses_named():
            body(ranks)


def codes(fates: list[Fate]) -> list[int]:
    return [fate.code for fate in fates]


def quiet(fates: list[Fate]) -> bool:
    return not any(fate.told for fate in fates)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_ranks_meet_agree_and_part(tmp_path: Path) -> None:
    def body(ranks: Ranks) -> None:
        done = tmp_path / "done"
        found = ranks.lead_first("work", lambda: str(done.write_text("x")) if ranks.is_lead else done.read_text())
        assert found == ("1" if ranks.is_lead else "x")
        ranks.agree("colour", "blue")
        assert all_reduce(torch.ones(2), ranks.mesh["dp"]).tolist() == [3, 3]

    fates = launch(3, lambda rank: meet(rank, body), tmp_path)
    assert codes(fates) == [0, 0, 0] and quiet(fates)


def test_a_number_of_processes_that_the_layout_does_not_take(tmp_path: Path) -> None:
    fates = launch(2, lambda rank: meet(rank), tmp_path)
    assert codes(fates) == [2, 2]
    assert "the layout (dp=3) takes 3 ranks (pp 1 x dp 3 x cp 1 x tp 1), but 2 processes were started" in fates[0].told
    assert all(fate.seconds < 1.5 for fate in fates)


def test_ranks_that_are_about_something_else_are_named_by_rank_0_alone(tmp_path: Path) -> None:
    fates = launch(3, lambda rank: meet(rank, about={"[train] in the recipe": "0a1b" if rank < 2 else "2c3d"}), tmp_path)
    assert codes(fates) == [2, 2, 2] and quiet(fates[1:])
    assert fates[0].told == (
        "rank 2 of 3: another [train] in the recipe than rank 0's (2c3d against 0a1b); start all ranks with the same files, options and "
        "versions\n"
    )


def test_a_rank_that_never_arrives_is_named_within_the_time(tmp_path: Path) -> None:
    fates = launch(3, lambda rank: meet(rank), tmp_path, absent=[1])
    assert codes(fates) == [76, 76] and quiet(fates[1:])
    assert fates[0].told.startswith("rank 1 of 3 (node 0) did not arrive within 1 s; look at what they said")
    assert max(fate.seconds for fate in fates) < 1.5 + rendezvous.PARTING_SECONDS + 2


def test_a_rank_that_is_late_is_named_long_before_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "NOTICE_SECONDS", 0.2)

    def work(rank: int) -> None:
        late: list[str] = []
        if rank == 2:
            time.sleep(0.6)
        with joined(Layout(dp=3), about={}, device=CPU, seconds=5, arrival=9, notice=late.append):
            print("\n".join(late))

    fates = launch(3, work, tmp_path)
    assert codes(fates) == [0, 0, 0]
    assert fates[0].told.strip() == "still waiting for rank 2 of 3 (node 0); giving up where none arrives for 9 s"
    assert not fates[1].told.strip()


def test_ranks_that_arrive_one_after_the_other_may_take_longer_together_than_one_alone(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        time.sleep(0.8 * rank)
        meet(rank, count=4)  # each within 1.2 s of the one before

    fates = launch(4, work, tmp_path)
    assert codes(fates) == [0] * 4 and quiet(fates)


def test_a_rank_that_hangs_before_it_agrees_is_named_with_what_it_owes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "NOTICE_SECONDS", 0.2)

    def work(rank: int) -> None:
        with joined(Layout(dp=2), about={}, device=CPU, seconds=1.5, notice=print) as ranks:
            if rank == 1:
                time.sleep(4)
                die()
            ranks.agree("prepared data", "ab")

    fates = launch(2, work, tmp_path)
    assert codes(fates) == [76, -9]
    notice, verdict = fates[0].told.splitlines()[:2]
    assert notice == "still waiting for rank 1 of 2 (node 0) with its prepared data; giving up where none arrives for 2 s"
    assert verdict.startswith("rank 1 of 2 (node 0) did not arrive with its prepared data within 2 s")


def test_a_rank_that_is_killed_at_its_start_is_named_too(tmp_path: Path) -> None:
    fates = launch(3, lambda rank: die() if rank == 2 else meet(rank), tmp_path)
    assert codes(fates) == [76, 76, -9]
    assert "rank 2 of 3 (node 0) did not arrive" in fates[0].told


def test_without_rank_0_the_others_say_where_they_looked(tmp_path: Path) -> None:
    fates = launch(3, lambda rank: meet(rank), tmp_path, absent=[0])
    assert codes(fates) == [76, 76]
    assert "cannot reach rank 0 at MASTER_ADDR localhost, MASTER_PORT" in fates[0].told
    assert max(fate.seconds for fate in fates) < 8


def test_a_wrong_address_is_told(tmp_path: Path) -> None:
    fates = launch(2, lambda rank: meet(rank, count=2), tmp_path, absent=[0], environment={"MASTER_PORT": "1"})
    assert codes(fates) == [76] and "MASTER_PORT 1 within 1 s" in fates[0].told


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_address_is_told(missing: str, tmp_path: Path) -> None:
    fates = launch(2, lambda rank: meet(rank, count=2), tmp_path, environment={missing: ""})
    assert codes(fates) == [2, 2]
    assert "rank 1 of 2 does not know where rank 0 is: " in fates[1].told and f"{missing} is missing" in fates[1].told


@pytest.mark.parametrize(("rank", "count"), [("", "2"), ("2", "2"), ("-1", "2"), ("x", "2"), ("0", "two"), ("0", "0")])
def test_ranks_that_make_no_sense_are_refused(rank: str, count: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", count)
    with pytest.raises(UsageError, match=r"RANK is (missing|'.*'), WORLD_SIZE is '.*': ranks are numbered from 0 to WORLD_SIZE - 1"):
        started()


def test_nothing_is_needed_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with joined(Layout(), about={}, device=CPU, seconds=1) as ranks:
        assert ranks.store is None and ranks.is_lead and ranks.first_to_tell("x") and ranks.first_to_tell("x")
        ranks.agree("colour", "blue")
    assert not dist.is_initialized()


def test_a_rank_that_is_killed_ends_the_others_at_once_and_they_say_what_they_waited_in(tmp_path: Path) -> None:
    def body(ranks: Ranks) -> None:
        if ranks.mesh.rank == 1:
            die()
        try:
            all_reduce(torch.ones(2), ranks.mesh["dp"])
        except RuntimeError as error:
            error.add_note("step 7")
            raise

    fates = launch(3, lambda rank: meet(rank, body), tmp_path)
    assert codes(fates) == [76, -9, 76]
    for rank in (0, 2):
        assert f"rank {rank} waited in step 7, collectives.all_reduce for a rank that is gone or hangs: " in fates[rank].told
        assert "onnection" in fates[rank].told
        assert "GLHF" not in fates[rank].told and ".cc" not in fates[rank].told
        assert fates[rank].seconds < 5


def test_a_rank_that_hangs_is_given_up_after_the_time(tmp_path: Path) -> None:
    def body(ranks: Ranks) -> None:
        if ranks.mesh.rank == 1:
            time.sleep(3)
            die()
        all_reduce(torch.ones(2), ranks.mesh["dp"])

    fates = launch(3, lambda rank: meet(rank, body, seconds=1), tmp_path)
    assert codes(fates) == [76, -9, 76]
    assert fates[0].seconds < 4 and "rank 0 waited in collectives.all_reduce" in fates[0].told and "imed out" in fates[0].told


def test_groups_of_an_axis_give_up_after_the_time_too(tmp_path: Path) -> None:
    """torch gives a new group 30 minutes, whatever the default group has."""

    def work(rank: int) -> None:
        with joined(Layout(dp=2, tp=2), about={}, device=CPU, seconds=1, arrival=5) as ranks, ranks.losses_named():
            if rank == 1:
                time.sleep(4)
                die()
            all_reduce(torch.ones(2), ranks.mesh["tp"])
            time.sleep(1)

    fates = launch(4, work, tmp_path, seconds=20)
    assert fates[0].code == 76 and fates[0].seconds < 6 and "imed out" in fates[0].told


def test_where_rank_0_fails_the_others_leave_quietly_with_its_exit_code(tmp_path: Path) -> None:
    def fail() -> None:
        raise DataError("no text")

    fates = launch(3, lambda rank: meet(rank, lambda ranks: ranks.lead_first("work", fail)), tmp_path)
    assert codes(fates) == [10, 10, 10] and quiet(fates[1:]) and fates[0].told == "no text\n"


def test_rank_0_may_take_long_but_not_fall_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_BEAT_SECONDS", 0.1)

    def body(ranks: Ranks) -> None:
        ranks.lead_first("first", lambda: time.sleep(1.2) if ranks.is_lead else None)
        if ranks.is_lead:
            time.sleep(2)
        ranks.lead_first("second", lambda: None)

    fates = launch(2, lambda rank: meet(rank, body, count=2, seconds=0.7), tmp_path)
    assert fates[1].code == 76
    assert "rank 1 waits for rank 0 (second) and has heard nothing of it for 1 s" in fates[1].told


def test_rank_0_that_is_killed_while_the_others_wait_for_it_ends_them(tmp_path: Path) -> None:
    fates = launch(3, lambda rank: meet(rank, lambda ranks: ranks.lead_first("work", die)), tmp_path)
    assert codes(fates) == [-9, 76, 76]
    assert all("rank" in fate.told and fate.seconds < 6 for fate in fates[1:])


def test_a_rank_that_does_not_agree_is_named(tmp_path: Path) -> None:
    fates = launch(3, lambda rank: meet(rank, lambda ranks: ranks.agree("prepared data", "ab" if rank else "cd")), tmp_path)
    assert codes(fates) == [2, 2, 2] and quiet(fates[1:])
    assert fates[0].told.startswith("ranks 1, 2 of 3: another prepared data than rank 0's (ab against cd)")


def test_what_befalls_all_ranks_is_told_once(tmp_path: Path) -> None:
    def body(ranks: Ranks) -> None:
        error = DataError("the same everywhere")
        raise error if ranks.first_to_tell(str(error)) else SystemExit(error.exit_code)

    fates = launch(3, lambda rank: meet(rank, body), tmp_path)
    assert codes(fates) == [10, 10, 10]
    # torch's own warnings, such as of a connection that closes, begin with the rank in brackets.
    told = ["".join(line for line in fate.told.splitlines() if not line.startswith("[")) for fate in fates]
    assert sorted(told) == ["", "", "the same everywhere"]


def test_another_error_is_not_taken_for_a_lost_rank() -> None:
    ranks = Ranks(SimpleNamespace(rank=0), dist.HashStore())  # type: ignore[arg-type, attr-defined]
    with pytest.raises(RuntimeError, match="shapes"), ranks.losses_named():
        raise RuntimeError("shapes differ")
    with pytest.raises(QuintetError, match=r"rank 0 waited in the meeting .* hangs: Timed out waiting 1 ms;"), ranks.losses_named():
        raise RuntimeError("[../x.cc:12] Timed out waiting 1 ms. More\nand more")
