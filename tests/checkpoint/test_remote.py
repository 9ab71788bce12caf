"""Checkpoints in an object store, a local server that speaks S3: whole or not there, whatever fails on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import s3fs
import torch

from quintet.checkpoint import place as places
from quintet.checkpoint import retention
from quintet.checkpoint.background import Failed, Saver
from quintet.checkpoint.contents import convert, differences
from quintet.checkpoint.load import candidates, latest, list_checkpoints, load, read_extra, verify
from quintet.checkpoint.pieces import Pieces
from quintet.checkpoint.place import Remote, place
from quintet.checkpoint.save import save
from quintet.cli.main import main
from quintet.errors import CheckpointError, UsageError
from quintet.spec.run import Checkpoint
from tests.checkpoint.states import blank, small_state
from tests.checkpoint.test_stores import keeps_pins_and_prunes
from tests.ranks import on_ranks
from tests.train import runs

EXTRAS = {"recipe.toml": "x"}


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow each other at once."""
    monkeypatch.setattr(places, "_FIRST_WAIT", 0.0)


class Requests:
    """Stands before every request that s3fs makes, and acts at the n-th; counts them by kind."""

    def __init__(self, patch: pytest.MonkeyPatch, act: Callable[[str, int], None]) -> None:
        self.kinds: list[str] = []
        real = s3fs.S3FileSystem._call_s3

        async def call(system: Any, method: str, *args: Any, **kwargs: Any) -> Any:
            self.kinds.append(method)
            act(method, len(self.kinds))
            return await real(system, method, *args, **kwargs)

        patch.setattr(s3fs.S3FileSystem, "_call_s3", call)
        patch.setattr(s3fs.S3FileSystem, "call_s3", s3fs.core.sync_wrapper(call))


def uploads(bucket: Remote) -> list[Any]:
    """Uploads in parts that were begun and neither ended nor given up."""
    system, path = bucket.system()
    return list(system.call_s3("list_multipart_uploads", Bucket=path.split("/")[0]).get("Uploads", []))


def loaded(path: places.Place) -> dict[str, Any]:
    state = blank(small_state())
    return state | load(state, path)


def test_ranks_save_to_a_store_and_others_load_each_byte_of_it_once(bucket: Remote, tmp_path: Path) -> None:
    full, norm = torch.arange(60000.0).reshape(-1, 3), torch.ones(5000)

    def save_shards(rank: int) -> None:
        begin, end = 10000 * rank, 10000 * (rank + 1)
        state = {"w": Pieces(full.shape, [((begin, 0), full[begin:end].clone())], dtype=full.dtype), "norm": norm, "step": 5}
        assert save(state, bucket, step=5, extras=EXTRAS) == bucket / "step-00000005"

    def load_all(rank: int) -> int:
        target = {"w": torch.zeros(20000, 3), "norm": torch.zeros(5000)}
        asked = 0
        real = Remote.read_range

        def read_range(self: Remote, offset: int, length: int) -> bytes:
            nonlocal asked
            asked += length
            return real(self, offset, length)

        pytest.MonkeyPatch().setattr(Remote, "read_range", read_range)
        assert load(target, bucket / "step-00000005") == {"step": 5}
        assert torch.equal(target["w"], full) and torch.equal(target["norm"], norm)
        return asked

    on_ranks(2, save_shards)
    manifest = verify(bucket / "step-00000005")
    asked = on_ranks(3, load_all)
    assert sum(asked) == sum(file.size for file in manifest.files if file.blake3 is None) and max(asked) < sum(asked)


def test_a_long_file_goes_up_in_parts(bucket: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "PART", 5 << 20)
    state = {"w": torch.randn(3_000_000)}
    path = save(state, bucket, step=1, codec="raw")
    (data,) = [path / name for name in path.entries() if name.endswith(".bin")]
    system, inner = data.system()
    assert system.info(inner)["ETag"].strip('"').endswith("-3")  # the number of parts
    target = {"w": torch.zeros(3_000_000)}
    load(target, path)
    assert torch.equal(target["w"], state["w"])


def test_a_request_that_fails_is_made_again_and_one_that_always_fails_ends_the_save_alone(
    bucket: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "PART", 5 << 20)
    state = {"w": torch.randn(2_000_000)}
    older = save(state, bucket, step=1, codec="raw")
    failed: set[str] = set()

    def once(method: str, number: int) -> None:
        if method not in failed:
            failed.add(method)
            raise ConnectionResetError("cut off")

    with monkeypatch.context() as patch:
        Requests(patch, once)
        path = save(state, bucket, step=2, codec="raw", extras=EXTRAS)
    assert {"upload_part", "create_multipart_upload", "complete_multipart_upload", "abort_multipart_upload", "put_object"} <= failed
    verify(path)
    assert sum(name.endswith(".bin") for name in path.entries()) == 1 and uploads(bucket) == []

    def always(method: str, number: int) -> None:
        if method == "upload_part":
            raise ConnectionResetError("cut off")

    with monkeypatch.context() as patch:
        Requests(patch, always)
        with pytest.raises(CheckpointError, match=r"saving s3://.*step-00000003.* failed: cut off \(6 tries\).*check the URL"):
            save(state, bucket, step=3, codec="raw")
    assert [found.path for found in list_checkpoints(bucket)] == [older, path] and uploads(bucket) == []
    assert (bucket / "step-00000003").entries() == {}


def test_a_connection_lost_at_any_request_of_an_upload_in_parts_is_made_up_for(bucket: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "PART", 5 << 20)
    state = {"w": torch.randn(2_000_000)}
    with monkeypatch.context() as patch:
        seen = Requests(patch, lambda method, number: None)
        save(state, bucket / "count", step=1, codec="raw")
    assert seen.kinds.count("upload_part") == 2
    for at in range(1, len(seen.kinds) + 1):

        def lose(method: str, number: int, at: int = at) -> None:
            if number == at:
                raise ConnectionResetError("cut off")

        with monkeypatch.context() as patch:
            Requests(patch, lose)
            path = save(state, bucket / str(at), step=1, codec="raw")
        verify(path)
        assert len(path.entries()) == 2 and uploads(bucket) == []


def test_kill_9_at_any_request_leaves_the_old_or_the_new_checkpoint_whole(bucket: Remote) -> None:
    with pytest.MonkeyPatch.context() as patch:
        seen = Requests(patch, lambda method, number: None)
        save(small_state(2.0), bucket / "count", step=2, extras=EXTRAS)
    outcomes = set()
    for at in range(1, len(seen.kinds) + 1):
        root = bucket / str(at)
        save(small_state(1.0), root, step=1)
        child = os.fork()
        if child == 0:

            def die(method: str, number: int, at: int = at) -> None:
                if number == at:
                    os.kill(os.getpid(), signal.SIGKILL)

            Requests(pytest.MonkeyPatch(), die)
            save(small_state(2.0), root, step=2, extras=EXTRAS)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        found = latest(root, verify_content=True)
        assert loaded(found)["norm"].tolist() == [float(found.name[-1])] * 4
        outcomes.add(found.name)
        # The same step goes through, and what the dead one left goes with the next removal, or with it.
        again = save(small_state(2.0), root, step=2, extras=EXTRAS)
        save(small_state(3.0), root, step=3, extras=EXTRAS)
        assert retention.prune(root, Checkpoint(keep_last=1)) and list(root.entries()) == ["step-00000003"], again
    assert outcomes == {"step-00000001", "step-00000002"} or outcomes == {"step-00000001"}


def test_damage_of_any_object_is_found_and_the_one_before_is_taken(bucket: Remote) -> None:
    older = save(small_state(1.0), bucket, step=1, extras=EXTRAS)
    for step, name in enumerate(("data", "manifest.json", "recipe.toml"), start=2):
        path = save(small_state(step), bucket, step=step, extras=EXTRAS)
        (victim,) = [path / each for each in path.entries() if each.startswith(name)]
        content = bytearray(victim.read())
        content[len(content) // 2] ^= 8
        victim.write(bytes(content))
        with pytest.raises(CheckpointError, match="damaged"):
            verify(path)
        with pytest.raises(CheckpointError, match="damaged"):
            verify(latest(bucket))
            loaded(latest(bucket))
    told: list[str] = []
    assert candidates(bucket, told.append) == [bucket / "step-00000002", older] and len(told) == 2
    assert latest(bucket, verify_content=True, report=lambda text: None) == older
    cut = save(small_state(9), bucket, step=9)
    (data,) = [cut / each for each in cut.entries() if each.startswith("data")]
    data.remove()
    assert "is missing" in (list_checkpoints(bucket)[-1].problem or "")
    # Saved anew, the damaged one is moved aside.
    verify(save(small_state(9), bucket, step=9))
    assert "step-00000009.corrupt-0" in bucket.entries()


def test_a_step_is_saved_once_and_never_overwritten(bucket: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(small_state(1.0), bucket, step=1, extras=EXTRAS)
    before = path.entries()
    assert save(small_state(1.0), bucket, step=1, extras=EXTRAS) == path and path.entries() == before
    with pytest.raises(CheckpointError, match="holds other content"):
        save(small_state(2.0), bucket, step=1, extras=EXTRAS)
    assert path.entries() == before
    # Two at the same moment: the second one's look comes before the first one's manifest.
    blind = bucket / "race" / "step-00000001"
    save(small_state(1.0), bucket / "race", step=1)
    real = Remote.entries
    looks = iter([True])
    monkeypatch.setattr(Remote, "entries", lambda self: {} if self == blind and next(looks, False) else real(self))
    with pytest.raises(CheckpointError, match="saved by somebody else meanwhile"):
        save(small_state(2.0), bucket / "race", step=1)
    assert loaded(blind)["norm"].tolist() == [1, 1, 1, 1] and len(real(blind)) == 2
    verify(blind)


def test_a_background_saver_reads_back_prunes_and_respects_pins(bucket: Remote) -> None:
    keeps_pins_and_prunes(bucket)


def test_a_store_that_stores_something_else_fails_the_save(bucket: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    real = places.RemoteWriter.write
    monkeypatch.setattr(places.RemoteWriter, "write", lambda self, data: real(self, bytes(len(data))))
    saver = Saver(bucket, Checkpoint())
    saver.save(small_state(), step=1, extras=EXTRAS, rounded={})
    saver.finish()
    (told,) = saver.told()
    assert isinstance(told, Failed) and "damaged" in str(told.error)
    assert list_checkpoints(bucket) == [] and (bucket / "step-00000001").entries() == {}


def test_a_checkpoint_moves_between_a_folder_and_a_store(bucket: Remote, tmp_path: Path) -> None:
    here = save(small_state(), tmp_path, step=1, extras=EXTRAS)
    there = convert(here, bucket, codec="raw")
    assert list(differences(here, there)) == []
    back = convert(there, tmp_path / "back", codec="planes")
    assert list(differences(here, back)) == [] and verify(back).values == verify(here).values


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3://", "names no folder"),
        ("nosuch://bucket/x", "that fsspec knows"),
        ("gs://bucket/x", r"install it: .*quintet\[gs\]"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_at_once(url: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Remote(url).system()


def test_a_url_of_files_is_a_path() -> None:
    assert place("file:///a/b") == Path("/a/b") and place("a/b") == Path("a/b") and place("s3://b/c/") == Remote("s3://b/c")
    assert (Remote("s3://b/c") / "d").parent == Remote("s3://b/c") and (Remote("s3://b/c") / "d").name == "d"


def test_a_run_whose_checkpoints_are_in_a_store_resumes_from_there_bit_for_bit(
    bucket: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.make_quick(monkeypatch)
    plain = runs.tiny_run(runs.corpus(tmp_path / "corpus"), tmp_path / "runs")
    from quintet.data.prepare import prepare

    prepare(plain.data, vocab_size=plain.model.vocab_size, seed=0)
    plain = replace(plain, train=replace(plain.train, steps=6))
    run = replace(plain, name="stored", checkpoint=Checkpoint(directory=bucket.url, every=2, keep_last=2))
    assert runs.train(plain) == 0
    assert runs.train(run, runs.At(3, lambda: runs.send(signal.SIGTERM))) == 75
    assert not (runs.where(run) / "checkpoints").exists()
    assert runs.resume(run) == 0
    root = bucket / "stored"
    assert [found.step for found in list_checkpoints(root)] == [4, 6]
    assert list(differences(runs.where(plain) / "checkpoints" / "step-00000006", root / "step-00000006")) == []
    assert runs.records(run) == runs.records(plain)
    with pytest.raises(UsageError, match="holds the checkpoints of another run"):
        runs.train(replace(run, directory=str(tmp_path / "elsewhere")))

    def told(*words: str) -> Any:
        capsys.readouterr()
        assert main([*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    described = told("info", root.url)
    assert described["progress"]["checkpoints"] == [4, 6] and described["name"] == "stored"
    assert described["parameters"] == told("info", str(runs.where(plain)))["parameters"]
    assert told("evaluate", root.url)["losses"] == told("evaluate", str(runs.where(plain)))["losses"]
    assert told("evaluate", f"{root}/step-00000004")["step"] == 4
    # The run's directory is lost: what a new one needs is in the store.
    shutil.rmtree(runs.where(run))
    assert main(["resume", root.url]) == 11
    assert "put recipe.toml and tokenizer.json of its newest checkpoint into a directory" in " ".join(capsys.readouterr().err.split())
    runs.where(run).mkdir()
    for name in ("recipe.toml", "tokenizer.json"):
        (runs.where(run) / name).write_text(read_extra(root / "step-00000006", name).replace("steps = 6", "steps = 8"))
    assert runs.resume(run) == 0
    assert [found.step for found in list_checkpoints(root)] == [6, 8]
