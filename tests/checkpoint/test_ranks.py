"""Several ranks save one checkpoint together, and any other number of ranks loads it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from quintet.checkpoint.load import load, read_manifest, verify
from quintet.checkpoint.pieces import Pieces
from quintet.checkpoint.save import save
from quintet.errors import CheckpointError
from tests.ranks import on_ranks

FULL = torch.arange(15, dtype=torch.float32).reshape(5, 3)


def _sharded(rank: int, count: int, dim: int, value: torch.Tensor) -> Pieces:
    """Nearly equal parts along a dim, a copy of one for each rank."""
    parts = value.tensor_split(count, dim)
    begin = sum(part.shape[dim] for part in parts[:rank])
    offsets = tuple(begin if d == dim else 0 for d in range(value.ndim))
    return Pieces(value.shape, [(offsets, parts[rank].clone())], dtype=value.dtype)


@pytest.mark.parametrize(("savers", "saved_dim", "loaders", "loaded_dim"), [(2, 0, 3, 1), (3, 1, 2, 1)])
def test_shards_of_one_layout_load_into_another(tmp_path: Path, savers: int, saved_dim: int, loaders: int, loaded_dim: int) -> None:
    def save_shards(rank: int) -> None:
        state = {"w": _sharded(rank, savers, saved_dim, FULL), "norm": torch.ones(3, dtype=torch.bfloat16), "step": 5}
        assert save(state, tmp_path, step=5, extras={"recipe.toml": "x"}) == tmp_path / "step-00000005"

    def load_shards(rank: int) -> None:
        target = _sharded(rank, loaders, loaded_dim, torch.zeros(5, 3))
        norm = torch.zeros(3, dtype=torch.bfloat16)
        assert load({"w": target, "norm": norm}, tmp_path / "step-00000005") == {"step": 5}
        ((_, found),) = target.boxes.items()
        assert torch.equal(found, FULL.tensor_split(loaders, loaded_dim)[rank]) and norm.tolist() == [1, 1, 1]

    on_ranks(savers, save_shards)
    manifest = verify(tmp_path / "step-00000005")
    assert len(manifest.tensors["w"].pieces) == savers and len(manifest.tensors["norm"].pieces) == 1
    on_ranks(loaders, load_shards)
    plain = {"w": torch.zeros(5, 3), "norm": torch.zeros(3, dtype=torch.bfloat16)}
    load(plain, tmp_path / "step-00000005")
    assert torch.equal(plain["w"], FULL)


def test_a_rank_whose_disk_is_full_fails_the_save_on_every_rank(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        if rank == 1:

            def refuse(fd: int, data: object) -> int:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            pytest.MonkeyPatch().setattr(os, "write", refuse)
        with pytest.raises(CheckpointError, match=r"on rank 1 failed: No space left on device.*free some space"):
            save({"w": _sharded(rank, 2, 0, FULL)}, tmp_path / "root", step=5)

    on_ranks(2, work)
    assert list((tmp_path / "root").iterdir()) == []


def test_a_damaged_file_of_one_rank_stops_every_rank(tmp_path: Path) -> None:
    on_ranks(2, lambda rank: _save_two(rank, tmp_path))
    path = tmp_path / "step-00000005" / "data-00001.bin"
    assert {file.path for file in read_manifest(path.parent).files} == {"data-00000.bin", "data-00001.bin"}
    data = bytearray(path.read_bytes())
    data[3] ^= 4
    path.write_bytes(data)

    def load_shards(rank: int) -> None:
        target = _sharded(rank, 2, 0, torch.zeros(5, 3))
        with pytest.raises(CheckpointError, match=r"data-00001.bin is damaged"):
            load({"w": target}, path.parent)
    on_ranks(2, load_shards)


def _save_two(rank: int, root: Path) -> None:
    save({"w": _sharded(rank, 2, 0, FULL)}, root, step=5)
