"""Shards: what is written is read back, nothing half-written counts, damage is found."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quintet.data.shards import Shard, ShardWriter, committed_folder, token_dtype, write_file
from quintet.errors import DataError
from tests.data.corpus import write_shard


@given(st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=5), max_size=5), st.sampled_from(["uint16", "uint32"]))
def test_documents_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], dtype: str) -> None:
    shard = Shard(write_shard(tmp_path_factory.mktemp("s") / "x", documents, dtype=dtype), tokenizer="t" * 64, verify=True)
    assert [shard.document(i).tolist() for i in range(shard.num_documents)] == documents
    assert shard.lengths().tolist() == [len(document) for document in documents]
    assert (shard.num_tokens, shard.meta.num_bytes) == (sum(map(len, documents)), 3 * len(documents))
    assert shard.tokens.dtype == np.dtype(dtype)


def test_the_stored_type_is_the_narrowest() -> None:
    assert [token_dtype(size) for size in (256, 65536, 65537)] == ["uint16", "uint16", "uint32"]


def test_another_tokenizer_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"made by tokenizer tttttttttttt, not by uuuuuuuuuuuu.*run quintet prepare"):
        Shard(write_shard(tmp_path / "x", [[1, 2]]), tokenizer="u" * 64)


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin", "meta.json"])
@pytest.mark.parametrize("damage", ["missing", "short", "flipped"])
def test_damage_is_found(tmp_path: Path, name: str, damage: str) -> None:
    path = write_shard(tmp_path / "x", [[1, 2], [3]]) / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(content[:-1])
    else:
        content[1] ^= 1
        path.write_bytes(content)
    with pytest.raises(DataError, match="run quintet prepare"):
        Shard(tmp_path / "x", verify=True)


@pytest.mark.parametrize("field, value", [('"format": 2', '"format": 3'), ('"uint16"', '"uint8"'), ('"num_tokens": 3', '"num_tokens": -3')])
def test_a_meta_file_of_another_kind_is_refused(tmp_path: Path, field: str, value: str) -> None:
    path = write_shard(tmp_path / "x", [[1, 2], [3]]) / "meta.json"
    assert field in path.read_text()
    path.write_text(path.read_text().replace(field, value))
    with pytest.raises(DataError, match="run quintet prepare"):
        Shard(tmp_path / "x")


def test_a_folder_is_committed_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    for version in ("old", "new"):
        with committed_folder(tmp_path / "x") as folder:
            (folder / version).write_text(version)
            assert not (tmp_path / "x" / version).exists()
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["new"]
    with pytest.raises(KeyboardInterrupt), committed_folder(tmp_path / "x") as folder:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "new"]


class FullDisk:
    """A file on a disk that is full."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def write(self, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        self.file.close()


def test_a_full_disk_is_a_data_error_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=r"(?s)No space left.*free some space"),
        committed_folder(tmp_path / "x") as folder,
        ShardWriter(folder / "train", dtype="uint16") as writer,
    ):
        writer._tokens = FullDisk(writer._tokens)  # type: ignore[assignment]
        writer.append([np.ones(3, np.uint32)], num_bytes=1)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_while_syncing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "x", b"old")

    def full(descriptor: int) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left"):
        write_file(tmp_path / "x", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"old")]
