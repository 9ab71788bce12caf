"""A save beside training holds the state of its step, is one at a time, and its failure is heard; so too on ranks that talk meanwhile."""

from __future__ import annotations

import errno
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from quintet.checkpoint import background
from quintet.checkpoint.background import Failed, Saver, Written
from quintet.checkpoint.load import latest, list_checkpoints, load, verify
from quintet.checkpoint.pieces import Pieces
from quintet.errors import CheckpointError
from quintet.spec.run import Checkpoint
from tests.checkpoint.states import blank, small_state
from tests.ranks import on_ranks


class Gate:
    """Holds the copying thread until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        real = background._copy

        def wait(source: Tensor, target: Tensor) -> None:
            self.open.wait(30)
            real(source, target)

        monkeypatch.setattr(background, "_copy", wait)


def begin(saver: Saver, state: dict[str, Any], step: int, **more: Any) -> None:
    saver.save(state, step=step, extras={"recipe.toml": "x"}, rounded={}, **more)


def loaded(directory: Path) -> dict[str, Any]:
    state = blank(small_state())
    load(state, directory)
    return state


def test_what_is_saved_is_the_state_of_its_step_although_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, saver, state = Gate(monkeypatch), Saver(tmp_path, Checkpoint()), small_state(1.0)
    begin(saver, state, 1)
    assert list_checkpoints(tmp_path) == []  # save has returned, and nothing is there yet
    opener = threading.Timer(0.05, gate.open.set)
    opener.start()
    saver.settle()
    assert gate.open.is_set()  # settle has waited for the copy
    state["norm"].fill_(9)
    state["loader"]["epoch"] = 9
    saver.finish()
    assert loaded(tmp_path / "step-00000001")["norm"].tolist() == [1] * 4
    assert load(blank(small_state()), tmp_path / "step-00000001")["loader"]["epoch"] == 1
    (written,) = saver.told()
    assert isinstance(written, Written) and written.path == tmp_path / "step-00000001" and written.stall_seconds > 0
    assert written.num_bytes == sum(file.stat().st_size for file in written.path.iterdir())
    assert saver.told() == []


def test_a_state_that_changes_before_it_is_copied_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver, state = Saver(tmp_path, Checkpoint()), small_state(1.0)
    begin(saver, state, 1, wait=True)
    gate = Gate(monkeypatch)
    begin(saver, state, 2)
    state["norm"].add_(1)  # without settle
    gate.open.set()
    saver.finish()
    _, failed = saver.told()
    assert isinstance(failed, Failed) and "changed while it was copied; call Saver.settle" in str(failed.error)
    assert latest(tmp_path, verify_content=True).name == "step-00000001"


def test_the_buffers_of_one_save_are_those_of_the_next(tmp_path: Path) -> None:
    saver, state = Saver(tmp_path, Checkpoint(keep_last=9)), small_state(0.0)
    places = []
    for step in range(1, 4):
        state["norm"].add_(1)
        begin(saver, state, step)
        saver.settle()
        places.append([buffer.data_ptr() for buffer in saver._buffers.values()])
    saver.finish()
    assert places[0] == places[1] == places[2]
    assert [loaded(tmp_path / f"step-0000000{step}")["norm"][0].item() for step in (1, 2, 3)] == [1, 2, 3]


def test_a_save_waits_for_the_one_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writing, most = [0], [0]
    real = background.write

    def write(*arguments: Any, **named: Any) -> Path:
        writing[0] += 1
        most[0] = max(most[0], writing[0])
        try:
            return real(*arguments, **named)
        finally:
            writing[0] -= 1

    monkeypatch.setattr(background, "write", write)
    saver = Saver(tmp_path, Checkpoint(keep_last=2))
    for step in range(1, 6):
        begin(saver, small_state(step), step, wait=step == 5)
    assert most == [1]
    assert [told.step for told in saver.told() if isinstance(told, Written)] == [1, 2, 3, 4, 5]
    assert [found.step for found in list_checkpoints(tmp_path)] == [4, 5]


def refuse_data(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    real = os.fsync

    def fsync(fd: int) -> None:
        if any(f"step-{step:08d}" in os.readlink(f"/proc/self/fd/{fd}") for step in steps):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)


def test_failures_are_told_and_tolerated_so_often_and_a_success_makes_up_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_data(monkeypatch, 2, 4, 5)
    saver = Saver(tmp_path, Checkpoint(tolerated_failures=1, keep_last=9))
    for step in range(1, 6):
        begin(saver, small_state(step), step)
    with pytest.raises(CheckpointError, match=r"2 saves failed one after the other, last that of step 5: saving .* Input/output error"):
        begin(saver, small_state(6), 6)
    told = saver.told()
    assert [(type(each), each.step) for each in told] == [(Written, 1), (Failed, 2), (Written, 3), (Failed, 4), (Failed, 5)]
    assert [found.step for found in list_checkpoints(tmp_path) if found.problem is None] == [1, 3]


def test_what_was_written_is_read_back_before_it_counts_and_before_anything_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that lies: what it has stored differs from what it was given."""
    saver = Saver(tmp_path, Checkpoint(keep_last=1))
    begin(saver, small_state(1), 1, wait=True)
    real = os.fsync

    def fsync(fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)
        if path.suffix == ".bin":
            content = bytearray(path.read_bytes())
            content[5] ^= 1
            path.write_bytes(content)

    monkeypatch.setattr(os, "fsync", fsync)
    begin(saver, small_state(2), 2)
    saver.finish()
    _, failed = saver.told()
    assert isinstance(failed, Failed) and "is damaged" in str(failed.error)
    assert [found.step for found in list_checkpoints(tmp_path)] == [1]
    verify(tmp_path / "step-00000001")


def test_checkpoints_that_cannot_be_removed_do_not_make_the_new_one_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(tmp_path, Checkpoint(keep_last=1))
    begin(saver, small_state(1), 1, wait=True)

    def prune(*arguments: Any) -> list[Path]:
        raise CheckpointError("no")

    monkeypatch.setattr(background, "prune", prune)
    begin(saver, small_state(2), 2, wait=True)
    _, written = saver.told()
    assert isinstance(written, Written) and written.problem == "no"


def halves(rank: int, count: int, value: float) -> dict[str, Any]:
    """A master whose rows are shared out, its rounding, whole on every rank, and a value."""
    master = torch.full((4 * count, 3), value) + torch.arange(3) / 7
    rows = slice(4 * rank, 4 * rank + 4)
    return {
        "master": Pieces(master.shape, [((4 * rank, 0), master[rows].clone())], dtype=torch.float32),
        "weight": master.bfloat16(),
        "step": value,
    }


def test_ranks_that_hold_other_parts_than_before_plan_anew(tmp_path: Path) -> None:
    def work(rank: int) -> list[int]:
        saver = Saver(tmp_path, Checkpoint(), group=dist.new_group(backend="gloo"))
        for step, held in ((1, rank), (2, 1 - rank)):
            saver.save(halves(held, 2, float(step)), step=step, extras={}, rounded={"weight": "master"}, wait=True)
            saver.plan_anew()
        return [told.step for told in saver.told()]

    assert on_ranks(2, work) == [[1, 2]] * 2
    places = [[piece.offsets for piece in verify(tmp_path / f"step-0000000{i}").tensors["master"].pieces] for i in (1, 2)]
    assert places == [[(0, 0), (4, 0)], [(4, 0), (0, 0)]]


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_save_beside_training_and_beside_their_own_collectives(tmp_path: Path, count: int) -> None:
    def work(rank: int) -> list[int]:
        saver = Saver(tmp_path, Checkpoint(keep_last=9), group=dist.new_group(backend="gloo"))
        for step in range(1, 6):
            state = halves(rank, count, float(step))
            saver.save(state, step=step, extras={}, rounded={"weight": "master"}, wait=step == 5)
            for _ in range(20):  # forward and backward
                total = torch.tensor([float(rank)])
                dist.all_reduce(total)
                assert total.item() == count * (count - 1) / 2
            saver.settle()
            for offsets in state["master"].boxes:
                state["master"].boxes[offsets].zero_()
            state["weight"].zero_()
        return [told.step for told in saver.told() if isinstance(told, Written)]

    assert on_ranks(count, work) == [[1, 2, 3, 4, 5]] * count
    for step in range(1, 6):
        state = {"master": torch.zeros(4 * count, 3), "weight": torch.zeros(4 * count, 3, dtype=torch.bfloat16), "step": None}
        assert load(state, tmp_path / f"step-{step:08d}") == {"step": float(step)}
        assert torch.equal(state["master"], (torch.full((4 * count, 3), float(step)) + torch.arange(3) / 7))
        assert torch.equal(state["weight"], state["master"].bfloat16())
        manifest = verify(tmp_path / f"step-{step:08d}")
        assert len(manifest.tensors["master"].pieces) == count and manifest.tensors["weight"].pieces == ()


def test_a_rank_whose_disk_is_full_fails_the_save_on_every_rank_and_the_next_one_goes_through(tmp_path: Path) -> None:
    def work(rank: int) -> list[str]:
        saver = Saver(tmp_path, Checkpoint(), group=dist.new_group(backend="gloo"))
        if rank == 1:
            real = os.write

            def refuse(fd: int, data: Any) -> int:
                if "step-00000002" in os.readlink(f"/proc/self/fd/{fd}"):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real(fd, data)

            pytest.MonkeyPatch().setattr(os, "write", refuse)
        for step in (1, 2, 3):
            saver.save(halves(rank, 2, float(step)), step=step, extras={}, rounded={"weight": "master"})
            saver.settle()
        saver.finish()
        return [f"{told.step}: {told.error}" if isinstance(told, Failed) else str(told.step) for told in saver.told()]

    for told in on_ranks(2, work):
        assert [line[:1] for line in told] == ["1", "2", "3"]
        assert "on rank 1 failed: No space left on device" in told[1]
    assert [found.step for found in list_checkpoints(tmp_path) if found.problem is None] == [1, 3]
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


CALLS = ("write", "fsync", "rename", "open", "preadv", "mkdir", "unlink")


def die_at(name: str, number: int) -> list[int]:
    """Kill this process at its call of that number; -1 only counts."""
    calls, real = [0], getattr(os, name)

    def call(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)

    pytest.MonkeyPatch().setattr(os, name, call)
    return calls


@pytest.mark.parametrize("name", CALLS)
def test_kill_9_at_any_call_beside_training_leaves_the_old_or_the_new_checkpoint_whole(tmp_path: Path, name: str) -> None:
    """Saving, reading back and pruning: with keep_last = 1 the older one is deleted behind the commit."""

    def child(root: Path, number: int) -> int:
        pid = os.fork()
        if pid == 0:
            calls = die_at(name, number)
            saver = Saver(root, Checkpoint(keep_last=1))
            begin(saver, small_state(2.0), 2)
            saver.finish()
            os._exit(calls[0])
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def prepared(root: Path) -> Path:
        begin(Saver(root, Checkpoint()), small_state(1.0), 1, wait=True)
        return root

    count = child(prepared(tmp_path / "count"), -1)
    assert count > 0
    for number in range(1, count + 1):
        root = prepared(tmp_path / str(number))
        assert child(root, number) == -signal.SIGKILL
        found = latest(root, verify_content=True)
        assert loaded(found)["norm"].tolist() == [float(found.name[-1])] * 4
        begin(Saver(root, Checkpoint(keep_last=1)), small_state(3.0), 3, wait=True)
        assert [path.name for path in root.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize(("rank", "name", "number"), [(0, "mkdir", 1), (0, "rename", 1), (0, "fsync", 2), (1, "write", 1), (1, "fsync", 1)])
def test_a_rank_that_dies_while_it_saves_fails_the_save_of_the_others_and_leaves_what_was_there(
    tmp_path: Path, rank: int, name: str, number: int
) -> None:
    def old(own: int) -> None:
        saver = Saver(tmp_path, Checkpoint(), group=dist.new_group(backend="gloo"))
        saver.save(halves(own, 3, 1.0), step=1, extras={}, rounded={"weight": "master"}, wait=True)

    def work(own: int) -> None:
        saver = Saver(tmp_path, Checkpoint(), group=dist.new_group(backend="gloo"))
        if own == rank:
            die_at(name, number)
        saver.save(halves(own, 3, 2.0), step=2, extras={}, rounded={"weight": "master"})
        saver.finish(20)
        (failed,) = saver.told()
        assert isinstance(failed, Failed)
        (tmp_path / f"{own}.heard").touch()

    on_ranks(3, old)
    with pytest.raises(AssertionError):  # of on_ranks: the dead one brings no result
        on_ranks(3, work)
    assert sorted(path.name for path in tmp_path.glob("*.heard")) == [f"{other}.heard" for other in range(3) if other != rank]
    assert latest(tmp_path, verify_content=True).name == "step-00000001"


def test_a_slow_rank_is_waited_for_and_the_checkpoint_is_whole(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        saver = Saver(tmp_path, Checkpoint(), group=dist.new_group(backend="gloo"))
        if rank == 1:
            real, waited = os.fsync, threading.Event()

            def slow(fd: int) -> None:
                waited.wait(0.3)
                real(fd)

            pytest.MonkeyPatch().setattr(os, "fsync", slow)
        saver.save(halves(rank, 2, 1.0), step=1, extras={}, rounded={"weight": "master"})
        saver.settle()
        saver.finish()
        (written,) = saver.told()
        assert isinstance(written, Written)

    on_ranks(2, work)
    verify(tmp_path / "step-00000001")
