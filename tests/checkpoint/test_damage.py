"""A damaged checkpoint is never loaded: it is refused with its reason, and the newest whole one is found instead."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3

from quintet.checkpoint.load import latest, list_checkpoints, load, verify
from quintet.checkpoint.manifest import NAME
from quintet.checkpoint.save import save
from quintet.errors import CheckpointError
from tests.checkpoint.states import blank, small_state


def _two(root: Path) -> tuple[Path, Path]:
    extras = {"recipe.toml": "seed = 0\n"}
    return save(small_state(1.0), root, step=1, extras=extras), save(small_state(2.0), root, step=2, extras=extras)


def _truncate(directory: Path) -> None:
    os.truncate(directory / "data-00000.bin", 70)


def _empty(directory: Path) -> None:
    os.truncate(directory / "data-00000.bin", 0)


def _lose(directory: Path) -> None:
    (directory / "data-00000.bin").unlink()


def _lose_manifest(directory: Path) -> None:
    (directory / NAME).unlink()


def _truncate_manifest(directory: Path) -> None:
    os.truncate(directory / NAME, 100)


def _empty_manifest(directory: Path) -> None:
    os.truncate(directory / NAME, 0)


def _add(directory: Path) -> None:
    (directory / "data-00001.bin").write_bytes(b"stale")


def _link(directory: Path) -> None:
    (directory / "data-00000.bin").rename(directory.parent / "elsewhere")
    (directory / "data-00000.bin").symlink_to(directory.parent / "elsewhere")


def _pipe(directory: Path) -> None:
    (directory / NAME).unlink()
    os.mkfifo(directory / NAME)


def _rename(directory: Path) -> None:
    directory.rename(directory.with_name("step-00000003"))


def _take_manifest_of_the_other(directory: Path) -> None:
    shutil.copy(directory.with_name("step-00000001") / NAME, directory / NAME)


def _replace_by_link(directory: Path) -> None:
    directory.rename(directory.parent / "elsewhere")
    directory.symlink_to(directory.parent / "elsewhere")


STRUCTURAL: list[tuple[Callable[[Path], None], str]] = [
    (_truncate, "data-00000.bin has 70 bytes instead of 112"),
    (_empty, "data-00000.bin has 0 bytes instead of 112"),
    (_lose, "data-00000.bin is missing"),
    (_lose_manifest, "manifest.json is missing"),
    (_truncate_manifest, "manifest.json is damaged"),
    (_empty_manifest, "manifest.json is damaged"),
    (_add, "data-00001.bin does not belong to it"),
    (_link, "data-00000.bin is not a plain file"),
    (_pipe, "not a plain file"),
    (_rename, "manifest.json is of step 2, but the directory's name is step-00000003"),
    (_take_manifest_of_the_other, "manifest.json is of step 1, but the directory's name is step-00000002"),
    (_replace_by_link, "is a symbolic link"),
]


@pytest.mark.parametrize(("damage", "reason"), STRUCTURAL, ids=lambda value: getattr(value, "__name__", ""))
def test_an_incomplete_checkpoint_is_passed_over_with_its_reason(tmp_path: Path, damage: Callable[[Path], None], reason: str) -> None:
    older, newer = _two(tmp_path)
    damage(newer)
    reported: list[str] = []
    assert latest(tmp_path, report=reported.append) == older
    assert len(reported) == 1 and reason in reported[0]
    bad = list_checkpoints(tmp_path)[-1]
    assert bad.problem is not None and reason in bad.problem
    state = blank(small_state())
    with pytest.raises(CheckpointError, match=r"missing|damaged|instead|belong|plain file|of step|symbolic"):
        load(state, bad.path)


def test_all_damaged_is_an_error_that_lists_them(tmp_path: Path) -> None:
    for directory in _two(tmp_path):
        _truncate(directory)
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint under .* is whole.*step-00000002: data.*step-00000001: data"):
        latest(tmp_path)


def test_files_of_one_size_that_changed_places_are_refused(tmp_path: Path) -> None:
    older, newer = _two(tmp_path)
    name = "data-00000.bin"
    (older / name).rename(tmp_path / "x")
    (newer / name).rename(older / name)
    (tmp_path / "x").rename(newer / name)
    for directory in (older, newer):
        with pytest.raises(CheckpointError, match="does not have the hash"):
            load(blank(small_state()), directory)


def test_a_planted_pickle_is_never_opened(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (canary,)

    bomb = pickle.dumps(Bomb())
    _, newer = _two(tmp_path)
    for name in (NAME, "data-00000.bin", ".metadata", "__0_0.distcp"):
        saved = (newer / name).read_bytes() if (newer / name).exists() else None
        (newer / name).write_bytes(bomb)
        if name == ".metadata":  # a hidden file is ignored, and not read
            load(blank(small_state()), newer)
        else:
            with pytest.raises(CheckpointError):
                load(blank(small_state()), newer)
        (newer / name).write_bytes(saved) if saved else (newer / name).unlink()
    assert not canary.exists()
    pickle.loads(bomb)
    assert canary.exists()  # the bomb does explode where it is read


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b'"file":"data-00000.bin"', b'"file":"../step-00000001/data-00000.bin"', "which is none of its data files"),
        (b'"file":"data-00000.bin"', b'"file":"recipe.toml"', "not at 0"),
        (b'"path":"data-00000.bin"', b'"path":"../step-00000001/data-00000.bin"', "not a file name that a checkpoint may hold"),
        (b'"path":"data-00000.bin"', b'"path":"/etc/hostname"', "not a file name that a checkpoint may hold"),
        (b'"path":"recipe.toml"', b'"path":"manifest.json"', "not a file name that a checkpoint may hold"),
        (b'"path":"recipe.toml"', b'"path":"data-00000.bin"', "names a file twice"),
        (b'"offset":64', b'"offset":65', "has a piece at 65 of data-00000.bin, not at 64"),
        (b'"offset":64', b'"offset":0', "not at 64"),
        (b'"offset":64', b'"offset":-64', "has a piece at -64"),
        (b'"offset":64', b'"offset":64.0', "Expected `int`"),
        (b'"length":48', b'"length":49', "has a piece of 49 bytes at 64, which"),
        (b'"size":112', b'"size":113', "has 113 bytes, but its pieces 112"),
        (b'"size":112,"blake3":null', b'"size":112,"blake3":"' + b"0" * 64 + b'"', "which is none of its data files"),
        (b'"offsets":[0,0],"sizes":[2,3]', b'"offsets":[1,0],"sizes":[2,3]', "outside of it"),
        (b'"offsets":[0,0],"sizes":[2,3]', b'"offsets":[0],"sizes":[6]', "outside of it"),
        (b'"shape":[2,3]', b'"shape":[4,3]', "do not cover it once"),
        (b'"shape":[2,3]', b'"shape":[-2,-3]', "has the shape"),
        (b'"dtype":"bfloat16"', b'"dtype":"float32"', "has a piece of 48 bytes"),
        (b'"dtype":"bfloat16"', b'"dtype":"load"', "unknown dtype"),
        (b'"codec":"raw"', b'"codec":"pickle"', "Invalid enum value"),
        (b'"codec":"raw"', b'"code":"raw"', "missing required field `codec`"),
        (b'"codec":"raw"', b'"codec":"planes"', "do not have the lengths that it says"),
        (b'"rounded_from":null}', b'"rounded_from":"norm"}', "cannot be 'norm'"),
        (b'"rounded_from":null}', b'"rounded_from":null,"more":1}', "has the keys"),
        (b'"step":2', b'"step":-2', "must not be negative"),
        (b'"step":2', b'"step":true', "Expected `int`"),
        (b'"steps":7', b'"steps":NaN', "NaN is not JSON"),
        (b'"steps":7', b'"norm":7', "both a tensor and a value"),
        (b'"format":2', b'"format":3', "does not go with the files"),
        (b'"format":2', b'"format":1', "has format 1, but this program reads the formats 2 and 3"),
        (b'"values":', b'"valeus":', "missing required field `values`"),
        (b'"values":{', b'"more":1,"values":{', "has the keys"),
    ],
)
def test_a_manifest_that_was_written_to_deceive_is_refused(tmp_path: Path, old: bytes, new: bytes, reason: str) -> None:
    _, directory = _two(tmp_path)
    body = (directory / NAME).read_bytes().partition(b',"manifest":')[2][:-2]
    assert old in body
    body = body.replace(old, new, 1)
    (directory / NAME).write_bytes(b'{"blake3":"%b","manifest":%b}\n' % (blake3(body).hexdigest().encode(), body))
    with pytest.raises(CheckpointError, match=reason):
        load(blank(small_state()), directory)


def test_deep_nesting_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    directory = save({}, tmp_path, step=1)
    body = b"[" * 10**6
    (directory / NAME).write_bytes(b'{"blake3":"%b","manifest":%b}\n' % (blake3(body).hexdigest().encode(), body))
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load({}, directory)


def test_a_damaged_step_is_moved_aside_when_it_is_saved_again(tmp_path: Path) -> None:
    _, newer = _two(tmp_path)
    for number in range(2):
        data = bytearray((newer / "data-00000.bin").read_bytes())
        data[0] ^= 1
        (newer / "data-00000.bin").write_bytes(data)
        assert save(small_state(5.0), tmp_path, step=2) == newer
        assert (tmp_path / f"step-00000002.corrupt-{number}" / "data-00000.bin").read_bytes() == data
        verify(newer)
