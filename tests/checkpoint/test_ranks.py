"""Several ranks save one checkpoint together, and any other number of ranks loads it."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._dynamo  # what DTensor imports at its first use: once here, not in every child
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from quintet.checkpoint.load import load, read_manifest, verify
from quintet.checkpoint.save import save
from quintet.errors import CheckpointError

FULL = torch.arange(15, dtype=torch.float32).reshape(5, 3)


def _on_ranks(count: int, store: Path, work: Callable[[int], None]) -> None:
    """Run `work(rank)` in forked processes that form a gloo group; fail if one of them fails."""
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            try:
                dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
                work(rank)
                dist.destroy_process_group()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * count


def _sharded(count: int, dim: int, value: torch.Tensor) -> DTensor:
    return distribute_tensor(value, init_device_mesh("cpu", (count,)), [Shard(dim)])


@pytest.mark.parametrize(("savers", "saved_dim", "loaders", "loaded_dim"), [(2, 0, 3, 1), (3, 1, 2, 1)])
def test_shards_of_one_layout_load_into_another(tmp_path: Path, savers: int, saved_dim: int, loaders: int, loaded_dim: int) -> None:
    def save_shards(rank: int) -> None:
        state = {"w": _sharded(savers, saved_dim, FULL), "norm": torch.ones(3, dtype=torch.bfloat16), "step": 5}
        assert save(state, tmp_path, step=5, extras={"recipe.toml": "x"}) == tmp_path / "step-00000005"

    def load_shards(rank: int) -> None:
        target = _sharded(loaders, loaded_dim, torch.zeros(5, 3))
        norm = torch.zeros(3, dtype=torch.bfloat16)
        assert load({"w": target, "norm": norm}, tmp_path / "step-00000005") == {"step": 5}
        assert torch.equal(target.full_tensor(), FULL) and norm.tolist() == [1, 1, 1]

    _on_ranks(savers, tmp_path / "store-1", save_shards)
    manifest = verify(tmp_path / "step-00000005")
    assert len(manifest.tensors["w"].pieces) == savers and len(manifest.tensors["norm"].pieces) == 1
    _on_ranks(loaders, tmp_path / "store-2", load_shards)
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
            save({"w": _sharded(2, 0, FULL)}, tmp_path / "root", step=5)

    _on_ranks(2, tmp_path / "store", work)
    assert list((tmp_path / "root").iterdir()) == []


def test_a_damaged_file_of_one_rank_stops_every_rank_before_it_fills_a_tensor(tmp_path: Path) -> None:
    _on_ranks(2, tmp_path / "store-1", lambda rank: _save_two(tmp_path))
    path = tmp_path / "step-00000005" / "data-00001.bin"
    assert {file.path for file in read_manifest(path.parent).files} == {"data-00000.bin", "data-00001.bin"}
    data = bytearray(path.read_bytes())
    data[3] ^= 4
    path.write_bytes(data)

    def load_shards(rank: int) -> None:
        target = _sharded(2, 0, torch.zeros(5, 3))
        with pytest.raises(CheckpointError, match=r"data-00001.bin is damaged"):
            load({"w": target}, path.parent)
        assert not target.to_local().any()

    _on_ranks(2, tmp_path / "store-2", load_shards)


def _save_two(root: Path) -> None:
    save({"w": _sharded(2, 0, FULL)}, root, step=5)
