"""Checkpoints in stores that are not S3: one in memory, one of files with folders; and files that go up at the same time."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from quintet.checkpoint import place as places
from quintet.checkpoint import retention
from quintet.checkpoint import save as saving
from quintet.checkpoint.background import Saver, Written
from quintet.checkpoint.contents import convert, differences
from quintet.checkpoint.load import latest, list_checkpoints, load, verify
from quintet.checkpoint.pieces import Pieces
from quintet.checkpoint.place import Place, Remote, RemoteWriter
from quintet.checkpoint.save import save
from quintet.errors import CheckpointError, UsageError
from quintet.spec.run import Checkpoint
from tests.checkpoint.states import blank, small_state
from tests.ranks import on_ranks

EXTRAS = {"recipe.toml": "x"}
METHODS = ("cat_file", "pipe_file", "open", "ls", "rm_file", "mkdir")


class Shelf(LocalFileSystem):
    """Files in folders that must be made, reached by URLs as a server of files would be; a copy is not among what it can do."""

    protocol = "shelf"

    def cp_file(self, path1: str, path2: str, **more: Any) -> None:
        raise NotImplementedError

    def mv(self, path1: str, path2: str, **more: Any) -> None:
        os.rename(path1, path2)

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **{**more, "auto_mkdir": False})


fsspec.register_implementation("shelf", Shelf, clobber=True)


@pytest.fixture(params=["memory", "shelf"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    """A folder in an empty store, which has to be made where folders are; tries follow each other at once."""
    monkeypatch.setattr(places, "_FIRST_WAIT", 0.0)
    yield Remote(f"shelf://{tmp_path}/runs/first" if request.param == "shelf" else "memory://runs/first")
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def loaded(path: Place) -> dict[str, Any]:
    state = blank(small_state())
    return state | load(state, path)


def failing(patch: pytest.MonkeyPatch, store: Remote, act: Callable[[str, int], None]) -> list[str]:
    """`act` stands before every request to the store, and hears its kind and number; returns the kinds of all."""
    kinds: list[str] = []
    system, _ = store.system()

    def standing_before(name: str, real: Any) -> Any:
        def call(self: Any, *args: Any, **more: Any) -> Any:
            kinds.append(name)
            act(name, len(kinds))
            return real(self, *args, **more)

        return call

    for name in METHODS:
        patch.setattr(type(system), name, standing_before(name, getattr(type(system), name)))
    return kinds


def keeps_pins_and_prunes(store: Remote) -> None:
    """A background saver and retention do in a store what they do in a folder."""
    saver = Saver(store, Checkpoint(keep_last=1))
    for step in (1, 2, 3):
        saver.save(small_state(step), step=step, extras=EXTRAS, rounded={})
        saver.finish()
        (told,) = saver.told()
        assert isinstance(told, Written) and told.problem is None and told.num_bytes > 0
        if step == 1:
            retention.pin(store / "step-00000001")
    assert [(found.step, found.pinned) for found in list_checkpoints(store)] == [(1, True), (3, False)]
    retention.unpin(store / "step-00000001")
    assert retention.prune(store, Checkpoint(keep_last=1)) == [store / "step-00000001"]


def test_a_store_of_any_kind_keeps_checkpoints_whole_pinned_and_pruned(store: Remote) -> None:
    keeps_pins_and_prunes(store)
    assert list(store.entries()) == ["step-00000003"]  # no empty folders are left either
    assert loaded(latest(store, verify_content=True))["norm"].tolist() == [3] * 4
    with pytest.raises(CheckpointError, match="holds other content"):
        save(small_state(4), store, step=3, extras=EXTRAS)


def test_damage_there_is_found_and_what_is_saved_anew_moves_the_damaged_one_aside(store: Remote, tmp_path: Path) -> None:
    path = save(small_state(), store, step=1, extras=EXTRAS)
    for begins in ("data", "manifest.json", "recipe.toml"):
        (victim,) = [path / name for name in path.entries() if name.startswith(begins)]
        content = bytearray(victim.read())
        content[len(content) // 3] ^= 4
        victim.write(bytes(content))
        with pytest.raises(CheckpointError, match="damaged"):
            verify(path)
        assert save(small_state(), store, step=1, extras=EXTRAS) == path
        verify(path)
    assert sorted(store.entries()) == ["step-00000001", *(f"step-00000001.corrupt-{i}" for i in range(3))]
    here = convert(path, tmp_path / "here", codec="raw")
    assert list(differences(here, convert(here, store / "again", codec="planes"))) == []


def test_a_connection_lost_at_any_request_is_made_up_for_and_told(store: Remote, caplog: pytest.LogCaptureFixture) -> None:
    store.make_folder()
    with pytest.MonkeyPatch.context() as patch:
        kinds = failing(patch, store, lambda kind, number: None)
        loaded(save(small_state(), store / "count", step=1, extras=EXTRAS))
    assert {"pipe_file", "open", "ls", "cat_file"} <= set(kinds)
    for at in range(1, len(kinds) + 1):
        caplog.clear()

        def lose(kind: str, number: int, at: int = at) -> None:
            if number == at:
                raise ConnectionResetError("connection reset by peer")

        with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
            failing(patch, store, lose)
            assert loaded(save(small_state(2), store / str(at), step=1, extras=EXTRAS))["norm"].tolist() == [2] * 4
        (record,) = caplog.records
        assert "connection reset by peer; try 2 of 6 follows in" in record.getMessage()
        assert store.url in record.getMessage()


def test_a_write_that_is_cut_off_in_an_object_that_grows_is_completed(store: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    system, _ = store.system()
    real, cut = type(system).pipe_file, itertools.count()

    def pipe_file(self: Any, path: str, value: bytes, **more: Any) -> None:
        if path.endswith("manifest.json") and not next(cut):
            real(self, path, value[: len(value) // 2], **more)
            raise ConnectionResetError("cut off")
        real(self, path, value, **more)

    monkeypatch.setattr(type(system), "pipe_file", pipe_file)
    assert loaded(save(small_state(3), store, step=1, extras=EXTRAS))["norm"].tolist() == [3] * 4
    assert next(cut) > 1


def test_a_store_that_refuses_for_good_is_one_clear_error(store: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    system, _ = store.system()

    def refuse(kind: str, number: int) -> None:
        raise PermissionError("not yours")

    failing(monkeypatch, store, refuse)
    with pytest.raises(CheckpointError, match=r"not yours.*permission is missing"):
        save(small_state(), store, step=1)
    monkeypatch.setattr(type(system), "ls", lambda *args, **more: (_ for _ in ()).throw(NotImplementedError))
    with pytest.raises(CheckpointError, match="cannot do that"):
        latest(store)


def test_ranks_share_a_store_of_files_with_folders(tmp_path: Path) -> None:
    full, root = torch.arange(40000.0).reshape(-1, 4), Remote(f"shelf://{tmp_path}/runs/first")

    def work(rank: int) -> bool:
        mine = full[5000 * rank : 5000 * (rank + 1)].clone()
        path = save({"w": Pieces(full.shape, [((5000 * rank, 0), mine)], dtype=full.dtype)}, root, step=1)
        target = {"w": torch.zeros_like(full)}
        load(target, path)
        return torch.equal(target["w"], full)

    assert on_ranks(2, work) == [True, True]


def test_what_a_rank_saves_goes_up_in_several_files_at_a_time_and_only_one_that_fails_is_begun_anew(
    store: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "FILE", 40000)
    state = {"w": torch.randn(100, 300), "x": torch.randn(7, 5), "y": torch.randn(5000)}
    together, real, begun = threading.Barrier(3), RemoteWriter.__enter__, itertools.count()

    def enter(self: RemoteWriter) -> RemoteWriter:
        number = next(begun)
        if number < 3:
            together.wait(30)
        if number == 3:
            raise ConnectionResetError("cut off")
        return real(self)

    monkeypatch.setattr(RemoteWriter, "__enter__", enter)
    path = save(state, store, step=1, codec="raw")
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    load(target, path)
    assert all(torch.equal(target[name], tensor) for name, tensor in state.items())
    files = sorted(file.path.split("-")[1] for file in verify(path).files)
    assert files == ["00000", "00001", "00002", "00003"] and next(begun) == len(files) + 1
    assert save(state, store, step=1, codec="raw") == path and len(path.entries()) == len(files) + 1


class Unreachable(Shelf):
    """A server that nobody answers for."""

    protocol = "unreachable"
    tried = 0

    def __init__(self, *args: Any, **more: Any) -> None:
        type(self).tried += 1
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))


def test_a_server_that_does_not_answer_is_asked_again_and_then_told_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("unreachable", Unreachable, clobber=True)
    monkeypatch.setattr(places, "_FIRST_WAIT", 0.0)
    with pytest.raises(CheckpointError, match=r"Connection refused \(6 tries\).*check the URL, the credentials and the network"):
        list_checkpoints(Remote("unreachable://host/runs"))
    assert Unreachable.tried == 6


def test_a_checkpoint_is_not_written_into_another(tmp_path: Path) -> None:
    path = save(small_state(), tmp_path, step=1)
    with pytest.raises(UsageError, match=r"step-00000001 has the name of a checkpoint; name the folder"):
        convert(path, path, codec="raw")
    verify(path)


def test_a_checkpoint_of_more_files_than_may_be_open_is_read_and_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "FILE", 400)
    full = torch.arange(16000.0)
    save({"w": full}, Remote(f"shelf://{tmp_path}"), step=1)
    path = tmp_path / "step-00000001"
    assert len(list(path.iterdir())) > 150

    def work(rank: int) -> bool:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
        target = {"w": torch.zeros_like(full)}
        load(target, path)
        verify(path)
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        with pytest.raises(CheckpointError, match=r"Too many open files.*raise it"):
            load(target, path)
        return torch.equal(target["w"], full)

    assert on_ranks(1, work) == [True]
