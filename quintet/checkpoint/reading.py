"""Which blocks of a checkpoint fill which tensors: each is read once by all ranks together, verified, decoded and put where it belongs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from quintet.checkpoint import codec as codecs
from quintet.checkpoint.agreement import Company
from quintet.checkpoint.exchange import Part, fetch
from quintet.checkpoint.manifest import BLOCK, ITEM_SIZE, ROW, Manifest, Piece
from quintet.checkpoint.pieces import Box, Pieces, boxes_here, meet, run_of_boxes, within
from quintet.checkpoint.store import Block, DataFiles, Threads, fill, flat_memory

Key = tuple[str, int]
"""A piece by its file and offset."""


@dataclass(frozen=True)
class _Wish:
    """A box of a tensor that a piece shall fill, and whether its elements are rounded on the way."""

    box: Box
    tensor: torch.Tensor
    rounds: bool


@dataclass(frozen=True)
class Reading:
    """A piece, and what it fills."""

    piece: Piece
    dtype: str
    wishes: list[_Wish]

    @property
    def key(self) -> Key:
        """The piece by where it lies."""
        return self.piece.file, self.piece.offset


def stages(manifest: Manifest, tensors: Mapping[str, torch.Tensor | Pieces]) -> Iterator[list[Reading]]:
    """What is read, in two stages: what lies before what is rounded, all that is stored; then what of the rounded is stored itself."""
    wishes: dict[str, list[_Wish]] = {}
    for name, value in tensors.items():
        saved = manifest.tensors[name]
        for offsets, tensor in boxes_here(value).items():
            box = (offsets, tuple(tensor.shape))
            wishes.setdefault(name, []).append(_Wish(box, tensor, False))
            if saved.rounded_from is not None:
                wishes.setdefault(saved.rounded_from, []).append(_Wish(box, tensor, True))
    for later in (False, True):
        yield [
            Reading(piece, manifest.tensors[name].dtype, touched)
            for name, wished in wishes.items()
            for piece in manifest.tensors[name].pieces
            if (manifest.tensors[name].rounded_from is not None) == later
            and (touched := [wish for wish in wished if meet(wish.box, (piece.offsets, piece.sizes))])
        ]


def read(readings: Sequence[Reading], files: DataFiles, threads: Threads, company: Company) -> None:
    """Read the blocks that hold something of what is wished for, in the order in which they lie on the disk; what several ranks wish for is
    read by one of them. All ranks of the company call it together, and all raise the first one's error."""
    jobs = [job for reading in sorted(readings, key=lambda reading: reading.key) for job in _jobs(reading)]
    told = company.share(lambda: _spans(jobs)) if company.size > 1 else []
    readers = _readers(told)
    rows: dict[Key, list[Block]] = {}

    def fetch_rows() -> None:
        fetch([_part_of_rows(reading, readers, rows, files) for reading in _readings(jobs)], files, threads, company)

    def fetch_blocks() -> None:
        fetch([_part_of_block(job, readers, rows[job.reading.key], files) for job in jobs], files, threads, company)

    company.share(lambda: files.open(job.reading.piece.file for job in jobs))
    company.share(fetch_rows)  # before the blocks: whoever lacked one of these would not know what to wait for
    company.share(fetch_blocks)


@dataclass(frozen=True)
class _Shared:
    """Blocks `first` to `end` of a piece that the same ranks need, and the one that reads them."""

    first: int
    end: int
    ranks: tuple[int, ...]
    reader: int


def _spans(jobs: Sequence[_Job]) -> dict[Key, list[tuple[int, int]]]:
    """The runs of blocks that this rank needs of each piece."""
    found: dict[Key, list[tuple[int, int]]] = {}
    for job in jobs:
        spans = found.setdefault(job.reading.key, [])
        if spans and spans[-1][1] == job.number:
            spans[-1] = (spans[-1][0], job.number + 1)
        else:
            spans.append((job.number, job.number + 1))
    return found


def _readers(told: Sequence[Mapping[Key, list[tuple[int, int]]]]) -> dict[Key, list[_Shared]]:
    """Who reads what of what each rank needs, the same on every rank: of those that need it, the one that reads least so far."""
    needs: dict[Key, list[tuple[int, tuple[int, int]]]] = {}
    for rank, spans in enumerate(told):
        for key, found in spans.items():
            needs.setdefault(key, []).extend((rank, span) for span in found)
    load = [0] * len(told)
    shared: dict[Key, list[_Shared]] = {}
    for key in sorted(needs):
        for first, end in itertools.pairwise(sorted({edge for _, span in needs[key] for edge in span})):
            ranks = tuple(rank for rank, span in needs[key] if span[0] <= first and end <= span[1])
            if ranks:
                reader = min(ranks, key=lambda rank: load[rank])
                load[reader] += end - first
                shared.setdefault(key, []).append(_Shared(first, end, ranks, reader))
    return shared


def _readings(jobs: Sequence[_Job]) -> list[Reading]:
    return list({job.reading.key: job.reading for job in jobs}.values())


def _part_of_rows(reading: Reading, readers: Mapping[Key, list[_Shared]], rows: dict[Key, list[Block]], files: DataFiles) -> Part:
    """The rows of a piece, which all need who need any of its blocks."""
    piece, length = reading.piece, reading.piece.num_blocks * ROW
    shared = readers.get(reading.key, [])
    ranks = tuple(sorted({rank for each in shared for rank in each.ranks}))

    def use(stored: codecs.Bytes | None) -> None:
        rows[reading.key] = files.blocks(piece, stored)

    where = (piece.file, piece.offset + piece.length - length, length)
    return Part(*where, use, ranks, shared[0].reader) if len(ranks) > 1 else Part(*where, use)


def _part_of_block(job: _Job, readers: Mapping[Key, list[_Shared]], rows: Sequence[Block], files: DataFiles) -> Part:
    block = rows[job.number]
    shared = next((each for each in readers.get(job.reading.key, []) if each.first <= job.number < each.end), None)
    where = (job.reading.piece.file, block.offset, block.length)

    def use(stored: codecs.Bytes | None) -> None:
        job.run(files, block, stored)

    return Part(*where, use, shared.ranks, shared.reader) if shared and len(shared.ranks) > 1 else Part(*where, use)


def _jobs(reading: Reading) -> Iterator[_Job]:
    """What is to be done with each block of which something is wanted."""
    piece = reading.piece
    for number in range(piece.num_blocks):
        begin, end = number * BLOCK, min((number + 1) * BLOCK, piece.numel)
        runs = [_moved(box, piece.offsets) for box in run_of_boxes(piece.sizes, begin, end)]
        hits = [(wish, run, shared) for wish in reading.wishes for run in runs if (shared := meet(wish.box, run))]
        if hits:
            yield _Job(reading, number, (begin, end), runs, hits)


@dataclass(frozen=True)
class _Job:
    """A block of elements `begin` to `end` of a piece, the boxes that it consists of, and of them what each wish wants."""

    reading: Reading
    number: int
    range: tuple[int, int]
    runs: list[Box]
    hits: list[tuple[_Wish, Box, Box]]

    def run(self, files: DataFiles, block: Block, stored: codecs.Bytes | None) -> None:
        """Read the block unless its stored bytes are given, verify, decode and fill."""
        memory, dtype = self._in_place(), self.reading.dtype
        data = files.elements(self.reading.piece, block, dtype, memory, stored)
        with files.spent("place"):
            parts = {False: self._parts(torch.from_numpy(data).view(getattr(torch, dtype)))}
            if any(wish.rounds for wish, _, _ in self.hits):
                parts[True] = self._parts(torch.from_numpy(codecs.rounded(data)).view(torch.bfloat16))
            for wish, run, shared in self.hits:
                if memory is None or wish.rounds or wish.box != self._box:
                    fill(within(shared, wish.box[0], wish.tensor), within(shared, run[0], parts[wish.rounds][run]))

    @property
    def _box(self) -> Box:
        return self.reading.piece.offsets, self.reading.piece.sizes

    def _in_place(self) -> codecs.Bytes | None:
        """The memory of the one who wants the whole piece as it is: there the block can be put at once."""
        wishes = [wish for wish in self.reading.wishes if wish.box == self._box and not wish.rounds]
        memory = flat_memory(wishes[0].tensor) if len(wishes) == 1 else None
        size = ITEM_SIZE[self.reading.dtype]
        return None if memory is None else memory[self.range[0] * size : self.range[1] * size]

    def _parts(self, values: torch.Tensor) -> dict[Box, torch.Tensor]:
        """The block's elements [numel] -> by the boxes that it consists of."""
        lengths = [math.prod(sizes) for _, sizes in self.runs]
        return {run: part.view(run[1]) for run, part in zip(self.runs, values.split(lengths), strict=True)}


def _moved(box: Box, by: tuple[int, ...]) -> Box:
    return tuple(a + b for a, b in zip(box[0], by, strict=True)), box[1]
