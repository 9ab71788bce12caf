"""What several ranks need of a checkpoint one of them reads; and what moves between ranks, or lies on several, stays what it is."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
import torch

from quintet.checkpoint import exchange, reading
from quintet.checkpoint.codec import Bytes
from quintet.checkpoint.load import load, read_manifest
from quintet.checkpoint.manifest import Codec
from quintet.checkpoint.pieces import Pieces
from quintet.checkpoint.save import save
from quintet.checkpoint.store import DataFiles
from quintet.errors import CheckpointError
from tests.ranks import on_ranks

FULL = torch.randn(900, 1000, generator=torch.Generator().manual_seed(5))
ROUNDED = {"w": "master"}


@pytest.fixture(autouse=True)
def _short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks take turns at each block."""
    monkeypatch.setattr(reading, "_TURN", 1)


def saved(root: Path, codec: Codec) -> Path:
    path = save({"master": FULL, "w": FULL.bfloat16(), "norm": torch.ones(7)}, root, step=1, rounded=ROUNDED, codec=codec)
    assert isinstance(path, Path)
    return path


class Reads:
    """Counts the bytes that this process reads."""

    def __init__(self) -> None:
        self.num_bytes = 0
        real = DataFiles.read

        def read(files: DataFiles, name: str, offset: int, length: int, buffer: Bytes | None = None) -> Bytes:
            self.num_bytes += length
            return real(files, name, offset, length, buffer)

        pytest.MonkeyPatch().setattr(DataFiles, "read", read)


@pytest.mark.parametrize("codec", ["raw", "planes"])
def test_each_byte_is_read_by_one_of_the_ranks_that_need_it_and_all_read_about_as_much(tmp_path: Path, codec: Codec) -> None:
    path = saved(tmp_path, codec)

    def work(rank: int) -> int:
        reads = Reads()
        shard = Pieces(FULL.shape, [((300 * rank, 0), torch.zeros(300, 1000))], dtype=FULL.dtype)
        target = {"master": shard, "w": torch.zeros(900, 1000, dtype=torch.bfloat16), "norm": torch.zeros(7)}
        load(target, path)
        assert torch.equal(target["w"], FULL.bfloat16()) and target["norm"].tolist() == [1] * 7
        assert torch.equal(shard.boxes[300 * rank, 0], FULL[300 * rank : 300 * rank + 300])
        return reads.num_bytes

    read = on_ranks(3, work)
    assert sum(read) == sum(file.size for file in read_manifest(path).files)
    assert max(read) < 0.6 * sum(read)


def test_any_boxes_on_any_ranks_are_filled_and_nothing_is_read_twice(tmp_path: Path) -> None:
    path = saved(tmp_path, "planes")

    def box(rng: random.Random) -> Pieces:
        rows, columns = sorted(rng.sample(range(901), 2)), sorted(rng.sample(range(1001), 2))
        zeros = torch.zeros(rows[1] - rows[0], columns[1] - columns[0])
        return Pieces(FULL.shape, [((rows[0], columns[0]), zeros)], dtype=FULL.dtype)

    def work(rank: int) -> list[int]:
        pytest.MonkeyPatch().setattr(exchange, "_EXTENT", 300_000)
        reads, seen = Reads(), []
        for seed in range(12):
            piece = box(random.Random(10 * seed + rank))
            load({"master": piece}, path, strict=False)
            (((row, column), found),) = piece.boxes.items()
            assert torch.equal(found, FULL[row : row + found.shape[0], column : column + found.shape[1]])
            seen.append(reads.num_bytes)
        return [b - a for a, b in zip([0, *seen], seen, strict=False)]

    size = sum(file.size for file in read_manifest(path).files)
    assert all(sum(each) <= size for each in zip(*on_ranks(3, work), strict=True))


def test_where_one_rank_cannot_read_all_hear_of_it_and_none_waits(tmp_path: Path) -> None:
    path = saved(tmp_path, "raw")

    def work(rank: int) -> None:
        if rank == 1:

            def refuse(*arguments: object) -> int:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

            pytest.MonkeyPatch().setattr(os, "preadv", refuse)
        with pytest.raises(CheckpointError, match=r"on rank 1 failed: Input/output error"):
            load({"master": torch.zeros(900, 1000)}, path, strict=False)

    on_ranks(3, work)


def test_damage_of_what_one_rank_reads_for_others_stops_all(tmp_path: Path) -> None:
    path = saved(tmp_path, "planes")
    content = bytearray((path / "data-00000.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "data-00000.bin").write_bytes(content)

    def work(rank: int) -> None:
        with pytest.raises(CheckpointError, match=r"data-00000.bin is damaged"):
            load({"master": torch.zeros(900, 1000)}, path, strict=False)

    on_ranks(2, work)


def test_experts_that_were_moved_or_replicated_keep_their_identity(tmp_path: Path) -> None:
    """Whatever rank holds an expert, and in which order: its box says which of the experts it is."""
    experts = torch.randn(6, 40, 30)
    before = ([4, 0, 2], [2, 5, 1, 3])  # expert 2 is on both
    after = ([1, 5, 2, 0], [2, 3, 4])

    def held(order: list[int], values: torch.Tensor) -> Pieces:
        return Pieces(experts.shape, [((e, 0, 0), values[e : e + 1].clone()) for e in order], dtype=experts.dtype)

    def work(rank: int) -> None:
        save({"experts": held(before[rank], experts)}, tmp_path, step=1)
        target = held(after[rank], torch.zeros(6, 40, 30))
        load({"experts": target}, tmp_path / "step-00000001")
        assert all(torch.equal(target.boxes[e, 0, 0][0], experts[e]) for e in after[rank])

    on_ranks(2, work)
    written = sorted(piece.offsets[0] for piece in read_manifest(tmp_path / "step-00000001").tensors["experts"].pieces)
    assert written == [0, 1, 2, 3, 4, 5]
