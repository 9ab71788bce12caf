"""Which blocks of a checkpoint fill which tensors: each is read once by all ranks together, verified, decoded and put where it belongs."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from blake3 import blake3

from quintet.checkpoint import codec as codecs
from quintet.checkpoint.agreement import Company
from quintet.checkpoint.exchange import Part, fetch
from quintet.checkpoint.manifest import BLOCK, ITEM_SIZE, ROW, Manifest, Piece
from quintet.checkpoint.pieces import Box, Pieces, boxes_here, meet, run_of_boxes, within
from quintet.checkpoint.store import Block, DataFiles, Threads, fill, flat_memory

_TURN = 4
"""Blocks after which another rank may be the one that reads."""

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
    if company.size == 1 and not jobs:
        return
    readers = _readers(_needs(_spans(jobs), company)) if company.size > 1 else {}
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


Spans = tuple[tuple[int, int, int], ...]
"""Of a file: pieces, by offset, and their blocks `first` to `end`."""


def _spans(jobs: Sequence[_Job]) -> dict[str, Spans]:
    """The runs of blocks that this rank needs of each file."""
    found: dict[str, list[tuple[int, int, int]]] = {}
    for job in jobs:
        file, offset = job.reading.key
        spans = found.setdefault(file, [])
        if spans and spans[-1][::2] == (offset, job.number):
            spans[-1] = (offset, spans[-1][1], job.number + 1)
        else:
            spans.append((offset, job.number, job.number + 1))
    return {file: tuple(spans) for file, spans in found.items()}


def _needs(mine: Mapping[str, Spans], company: Company) -> dict[str, dict[Spans, list[int]]]:
    """For each file that this rank needs something of: what is needed, and by which ranks.

    Most ranks need the same of a file, such as all its shards of dense weights. So they first tell only digests of what they need, and what
    a digest stands for is told once: at thousands of ranks both are small.
    """
    digests = company.share(lambda: {file: blake3(repr(spans).encode()).digest(8) for file, spans in mine.items()})
    ranks: dict[tuple[str, bytes], list[int]] = {}
    for rank, each in enumerate(digests):
        for key in each.items():
            ranks.setdefault(key, []).append(rank)
    told = company.share(lambda: {key: mine[key[0]] for key, same in ranks.items() if same[0] == company.rank})
    needs: dict[str, dict[Spans, list[int]]] = {file: {} for file in mine}
    for (file, digest), spans in (found for each in told for found in each.items()):
        if file in needs:
            needs[file][spans] = ranks[file, digest]
    return needs


def _readers(needs: Mapping[str, Mapping[Spans, Sequence[int]]]) -> dict[Key, list[_Shared]]:
    """Who reads what of what each rank needs, the same on every rank: of those that need it, they in turn."""
    shared: dict[Key, list[_Shared]] = {}
    for file, classes in needs.items():
        turn = itertools.count(zlib.crc32(file.encode()))
        pieces: dict[int, list[tuple[int, int, Sequence[int]]]] = {}
        for spans, ranks in sorted(classes.items()):
            for offset, first, end in spans:
                pieces.setdefault(offset, []).append((first, end, ranks))
        for offset, found in sorted(pieces.items()):
            edges = {edge for first, end, _ in found for edge in (first, end)}
            for first, end in itertools.pairwise(sorted({*edges, *range(min(edges), max(edges), _TURN)})):
                there = tuple(sorted(rank for begin, stop, ranks in found if begin <= first and end <= stop for rank in ranks))
                if there:
                    shared.setdefault((file, offset), []).append(_Shared(first, end, there, there[next(turn) % len(there)]))
    return shared


def _readings(jobs: Sequence[_Job]) -> list[Reading]:
    return list({job.reading.key: job.reading for job in jobs}.values())


def _part_of_rows(reading: Reading, readers: Mapping[Key, list[_Shared]], rows: dict[Key, list[Block]], files: DataFiles) -> Part:
    """The rows of a piece, which all need who need any of its blocks."""
    piece, length = reading.piece, reading.piece.num_blocks * ROW
    shared = readers.get(reading.key, [])
    ranks = tuple(sorted({rank for each in shared for rank in each.ranks}))

    def use(stored: codecs.Bytes) -> None:
        rows[reading.key] = files.blocks(piece, stored)

    where = (piece.file, piece.offset + piece.length - length, length)
    return Part(*where, use, ranks, shared[0].reader) if len(ranks) > 1 else Part(*where, use)


def _part_of_block(job: _Job, readers: Mapping[Key, list[_Shared]], rows: Sequence[Block], files: DataFiles) -> Part:
    block = rows[job.number]
    shared = next((each for each in readers.get(job.reading.key, []) if each.first <= job.number < each.end), None)
    where = (job.reading.piece.file, block.offset, block.length)

    def use(stored: codecs.Bytes) -> None:
        job.run(files, block, stored)

    return Part(*where, use, shared.ranks, shared.reader) if shared and len(shared.ranks) > 1 else Part(*where, use)


def _jobs(reading: Reading) -> Iterator[_Job]:
    """What is to be done with each block of which something is wanted."""
    piece = reading.piece
    ends = [end for wish in reading.wishes if (shared := meet(wish.box, (piece.offsets, piece.sizes))) for end in _ends(shared, piece)]
    for number in range(min(ends) // BLOCK, max(ends) // BLOCK + 1):
        begin, end = number * BLOCK, min((number + 1) * BLOCK, piece.numel)
        runs = [_moved(box, piece.offsets) for box in run_of_boxes(piece.sizes, begin, end)]
        hits = [(wish, run, shared) for wish in reading.wishes for run in runs if (shared := meet(wish.box, run))]
        if hits:
            yield _Job(reading, number, (begin, end), runs, hits)


def _ends(box: Box, piece: Piece) -> tuple[int, int]:
    """The first and the last element of a box within a piece, by their places in it."""
    corners = ([a - begin + more for a, n, begin in zip(*box, piece.offsets, strict=True) for more in [last * (n - 1)]] for last in (0, 1))
    first, last = (sum(at * math.prod(piece.sizes[d + 1 :]) for d, at in enumerate(corner)) for corner in corners)
    return first, last


@dataclass(frozen=True)
class _Job:
    """A block of elements `begin` to `end` of a piece, the boxes that it consists of, and of them what each wish wants."""

    reading: Reading
    number: int
    range: tuple[int, int]
    runs: list[Box]
    hits: list[tuple[_Wish, Box, Box]]

    def run(self, files: DataFiles, block: Block, stored: codecs.Bytes) -> None:
        """Verify the block's stored bytes, decode them and fill."""
        memory, dtype = self._in_place(), self.reading.dtype
        data = files.elements(self.reading.piece, block, dtype, stored, memory)
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
