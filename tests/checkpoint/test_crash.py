"""A save that is killed or refused by the disk, at whichever system call, leaves what was there before."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quintet.checkpoint import durable
from quintet.checkpoint.load import latest, list_checkpoints, load, verify
from quintet.checkpoint.save import save
from quintet.errors import CheckpointError
from tests.checkpoint.states import blank, small_state

CALLS = ("write", "fsync", "rename", "open", "close", "mkdir")


class Fault:
    """Stands in for one function of `os` and acts at its n-th call under the root."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, *, at: int, act: Callable[[], None]) -> None:
        self.calls = 0
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == at:
                act()
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)


def _refuse(code: int) -> Callable[[], None]:
    def act() -> None:
        raise OSError(code, os.strerror(code))

    return act


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _count(root: Path, name: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        fault = Fault(patch, name, at=-1, act=lambda: None)
        save(small_state(2.0), root, step=2, extras={"recipe.toml": "x"})
    return fault.calls


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_a_refusal_at_any_call_is_one_clear_error_and_loses_nothing(tmp_path: Path, name: str, code: int) -> None:
    refused = 0
    for at in range(1, _count(tmp_path / "count", name) + 1):
        root = tmp_path / str(at)
        older = save(small_state(1.0), root, step=1)
        with pytest.MonkeyPatch.context() as patch:
            Fault(patch, name, at=at, act=_refuse(code))
            try:
                save(small_state(2.0), root, step=2, extras={"recipe.toml": "x"})
            except CheckpointError as error:
                refused += 1
                remedy = {errno.ENOSPC: "free some space", errno.EIO: "check the disk"}[code]
                assert os.strerror(code) in str(error) and remedy in str(error)
        verify(older)
        assert [path.name for path in root.iterdir() if path.name.startswith(".tmp-")] == []
        assert all(found.problem is None for found in list_checkpoints(root))
        verify(save(small_state(2.0), root, step=2, extras={"recipe.toml": "x"}))
    assert refused >= 1


@pytest.mark.parametrize("name", CALLS)
def test_kill_9_at_any_call_leaves_the_old_or_the_new_checkpoint_whole(tmp_path: Path, name: str) -> None:
    outcomes = set()
    for at in range(1, _count(tmp_path / "count", name) + 1):
        root = tmp_path / str(at)
        save(small_state(1.0), root, step=1)
        child = os.fork()
        if child == 0:
            Fault(pytest.MonkeyPatch(), name, at=at, act=_die)
            save(small_state(2.0), root, step=2, extras={"recipe.toml": "x"})
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        found = latest(root, verify_content=True)
        state = blank(small_state())
        load(state, found)
        assert state["norm"].tolist() == [float(found.name[-1])] * 4
        outcomes.add(found.name)
        # The next save sweeps the leftovers and goes through.
        save(small_state(3.0), root, step=3)
        assert [path.name for path in root.iterdir() if path.name.startswith(".")] == []
    assert "step-00000001" in outcomes


def test_a_refusal_while_a_long_file_is_synced_early_makes_the_save_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind an error of a sync the next one may succeed, and the bytes be lost."""
    monkeypatch.setattr(durable, "_EARLY", 10)
    fault = Fault(monkeypatch, "fdatasync", at=1, act=_refuse(errno.EIO))
    with pytest.raises(CheckpointError, match="Input/output error"):
        save(small_state(), tmp_path, step=1)
    assert fault.calls >= 1 and list(tmp_path.iterdir()) == []
    verify(save(small_state(), tmp_path, step=1))


LONG = {"w": torch.arange(30001.0), "x": torch.arange(50, dtype=torch.uint8)}
"""More than seven of the buffers below, and no whole number of pages."""


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_a_refusal_of_any_part_of_a_long_file_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(durable, "_BUFFER", 16384)
    with pytest.MonkeyPatch.context() as patch:
        fault = Fault(patch, "write", at=-1, act=lambda: None)
        older = save(LONG, tmp_path, step=1, codec="raw")
    assert fault.calls >= 9
    for at in range(1, fault.calls + 1):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError, match=os.strerror(code)):
            Fault(patch, "write", at=at, act=_refuse(code))
            save(LONG, tmp_path, step=2, codec="raw")
        assert list(tmp_path.iterdir()) == [older]
    verify(save(LONG, tmp_path, step=2, codec="raw"))


@pytest.mark.parametrize("portion", ["third", "pages", "cannot", "refuses"])
def test_short_writes_and_disks_that_are_always_cached_make_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, portion: str
) -> None:
    monkeypatch.setattr(durable, "_BUFFER", 16384)
    real, control, lengths = os.write, fcntl.fcntl, list[int]()

    def write(fd: int, data: memoryview) -> int:
        direct = bool(control(fd, fcntl.F_GETFL) & os.O_DIRECT)
        if portion == "refuses" and direct:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        most = {"third": max(1, len(data) // 3), "pages": 4096}.get(portion, len(data))
        lengths.append(real(fd, data[:most]))
        return lengths[-1]

    def unable(fd: int, command: int, flags: int = 0) -> int:
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return control(fd, command, flags)

    monkeypatch.setattr(os, "write", write)
    if portion == "cannot":
        monkeypatch.setattr(fcntl, "fcntl", unable)
    target = {name: torch.zeros_like(tensor) for name, tensor in LONG.items()}
    path = save(LONG, tmp_path, step=1, codec="raw")
    load(target, path)
    assert all(torch.equal(target[name], LONG[name]) for name in LONG)
    assert sum(lengths) == sum(file.stat().st_size for file in path.iterdir())


def test_leftovers_are_ignored_by_loading_and_swept_by_saving_but_a_living_save_is_not_disturbed(tmp_path: Path) -> None:
    save(small_state(), tmp_path, step=1)
    (tmp_path / ".tmp-step-00000002-1-0").mkdir()
    (tmp_path / ".tmp-step-00000002-1-0" / "data-00000.bin").write_bytes(b"half")
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        real = os.fsync

        def wait(fd: int) -> None:
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            real(fd)

        pytest.MonkeyPatch().setattr(os, "fsync", wait)
        save(small_state(9.0), tmp_path, step=9)
        os._exit(0)
    os.read(ready[0], 1)
    assert latest(tmp_path).name == "step-00000001"
    save(small_state(2.0), tmp_path, step=2)
    assert [path.name[:18] for path in tmp_path.iterdir() if path.name.startswith(".tmp-")] == [".tmp-step-00000009"]
    os.write(go[1], b"x" * 100)
    assert os.waitpid(child, 0)[1] == 0
    assert latest(tmp_path, verify_content=True).name == "step-00000009"


def test_an_interrupt_during_a_save_stays_an_interrupt_and_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    Fault(monkeypatch, "fsync", at=1, act=interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(small_state(), tmp_path, step=1)
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"saving .* failed"):
        save(small_state(), tmp_path / "file" / "checkpoints", step=1)
