"""Tensors to the blocks of a data file and back: each block is encoded and hashed when it is written, hashed and decoded when it is read.

Several threads work on blocks while one writes or plans; numpy, zstd and BLAKE3 let go of Python's lock. See `manifest` for the form.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from quintet.checkpoint import codec as codecs
from quintet.checkpoint.codec import Bytes
from quintet.checkpoint.durable import FileWriter, open_regular
from quintet.checkpoint.manifest import BLOCK, ITEM_SIZE, PLANES, ROW, Codec, File, Piece
from quintet.checkpoint.pieces import Box, dtype_name
from quintet.checkpoint.place import Place, Remote, RemoteWriter, hash_of, located
from quintet.errors import DamagedError

A = TypeVar("A")
B = TypeVar("B")

_AHEAD = 4
"""Blocks of a thread that wait for it, or for the one who takes them."""
CUT = 1 << 22
"""Elements of a piece at most, where later checkpoints may refer to it."""
_SMALL = 4096
"""Elements of a piece below which coding gains nothing worth its lengths."""
_WAITING = 8
"""Requests to a store that one rank makes at a time."""
_WORTH_ASKING = 1 << 16
"""Bytes of a block below which the system reads ahead enough by itself."""
_ROW = np.dtype([("length", "<u8"), ("digest", "u1", 32)])
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


_RANKS_OF_A_NODE = 8
"""Ranks that are supposed to share a node's cores, where there are so many."""


class Threads:
    """A few threads for blocks."""

    def __init__(self, *, num_ranks: int = 1, beside_training: bool = False, reading: Place | None = None) -> None:
        """As many as the process has cores, shared out among the ranks of a node; half of them beside training; where they mostly wait,
        since they read what is `Remote`, more."""
        cores = len(os.sched_getaffinity(0)) // (2 if beside_training else 1)
        self.count = min(max(cores // min(num_ranks, _RANKS_OF_A_NODE), 1), 16)
        if isinstance(reading, Remote):
            self.count = max(self.count, _WAITING)
        self._pool = ThreadPoolExecutor(self.count, thread_name_prefix="blocks")

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def start(self, work: Callable[[], B]) -> Future[B]:
        """Begin some work that is not of blocks."""
        return self._pool.submit(work)

    def in_order(self, work: Callable[[A], B], jobs: Iterable[A]) -> Iterator[B]:
        """`work` of each job, in order; only a few are done ahead of what is taken."""
        pending: deque[Future[B]] = deque()
        for job in jobs:
            pending.append(self._pool.submit(work, job))
            if len(pending) > _AHEAD * self.count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@dataclass(frozen=True)
class Source:
    """A box of a tensor that is to be written, and where its elements lie."""

    name: str
    box: Box
    tensor: Tensor


Known = Mapping[tuple[str, Box, Codec, str], Piece]
"""Pieces of an earlier checkpoint by tensor, box, codec and hash, their files named from beside it."""


def known_from(pieces: Iterable[tuple[str, Piece]], holder: str) -> dict[tuple[str, Box, Codec, str], Piece]:
    """What a later checkpoint may refer to of the pieces in the checkpoint of the name `holder`."""
    return {_key(name, piece): replace(piece, file=f"{holder}/{piece.file}") for name, piece in pieces}


def _key(name: str, piece: Piece) -> tuple[str, Box, Codec, str]:
    return name, (piece.offsets, piece.sizes), piece.codec, piece.blake3


def write_pieces(
    writer: FileWriter | RemoteWriter, sources: Iterable[Source], codec: Codec, threads: Threads, known: Known | None = None
) -> list[tuple[str, Piece]]:
    """Write boxes one behind the other -> the name of the tensor and the piece of each. Raises OSError.

    With `known`, boxes are cut into pieces of at most `CUT` elements where their rows allow it, and what is known is not written again.
    """
    if known is not None:
        sources = (part for source in sources for part in _cut(source))

    def form(source: Source) -> Codec:
        return codec if dtype_name(source.tensor.dtype) in PLANES and source.tensor.numel() >= _SMALL else "raw"

    def blocks() -> Iterator[tuple[Source, Bytes]]:
        for source in sources:
            data = np.frombuffer(bytes_of(source.tensor), np.uint8)
            size = BLOCK * source.tensor.dtype.itemsize
            yield from ((source, data[begin : begin + size]) for begin in range(0, data.size, size))

    def stored(job: tuple[Source, Bytes]) -> tuple[Source, list[Bytes], bytes]:
        source, block = job
        dtype = dtype_name(source.tensor.dtype)
        parts = codecs.encode(block, dtype) if form(source) == "planes" else [block]
        digest = blake3()  # One thread: a pool of threads would hang in a forked child.
        for part in parts:
            digest.update(part.data)
        return source, parts, digest.digest()

    pieces: list[tuple[str, Piece]] = []
    for source, done in itertools.groupby(threads.in_order(stored, blocks()), key=lambda found: found[0]):
        begin, rows, kept = writer.size, b"", list[Bytes]()
        for _, parts, digest in done:
            rows += sum(part.size for part in parts).to_bytes(8, "little") + digest
            if known is not None:  # it may be there already
                kept.extend(parts)
                continue
            for part in parts:
                writer.write(part.data)
        if known is not None:
            if there := known.get((source.name, source.box, form(source), blake3(rows).hexdigest())):
                pieces.append((source.name, there))
                continue
            for part in kept:
                writer.write(part.data)
        writer.write(rows)
        piece = Piece(
            offsets=source.box[0],
            sizes=source.box[1],
            file=writer.path.name,
            offset=begin,
            length=writer.size - begin,
            codec=form(source),
            blake3=blake3(rows).hexdigest(),
        )
        pieces.append((source.name, piece))
    return pieces


def _cut(source: Source) -> Iterator[Source]:
    """Parts of a box of at most `CUT` elements, along its first dims: so what does not change, as a frozen expert, has its own pieces."""
    (offsets, sizes), tensor = source.box, source.tensor
    dim = next((d for d, size in enumerate(sizes) if size > 1), None)
    if dim is None or tensor.numel() <= CUT:
        yield source
        return
    rows = max(CUT * sizes[dim] // tensor.numel(), 1)
    for begin in range(0, sizes[dim], rows):
        count = min(rows, sizes[dim] - begin)
        box = (*offsets[:dim], offsets[dim] + begin, *offsets[dim + 1 :]), (*sizes[:dim], count, *sizes[dim + 1 :])
        part = Source(source.name, box, tensor.narrow(dim, begin, count))
        yield from _cut(part) if count == 1 else (part,)


def is_rounding(of: Tensor, tensor: Tensor, threads: Threads) -> bool:
    """Whether every bf16 element of `tensor` has the bits of the fp32 one of `of` after rounding; both of one shape."""
    wide, narrow = (np.frombuffer(bytes_of(each), np.uint8) for each in (of, tensor))
    if dtype_name(of.dtype) != "float32" or dtype_name(tensor.dtype) != "bfloat16":
        return False

    def same(begin: int) -> bool:
        return np.array_equal(codecs.rounded(wide[2 * begin : 2 * begin + 4 * BLOCK]), narrow[begin : begin + 2 * BLOCK])

    return all(threads.in_order(same, range(0, narrow.size, 2 * BLOCK)))


@dataclass(frozen=True)
class Block:
    """Where a block of a piece lies in its file, and its hash."""

    number: int
    offset: int
    length: int
    digest: bytes


class Spent:
    """Seconds of work by kind, summed over threads."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        """Count what is done in the `with` block."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[kind] = self.seconds.get(kind, 0.0) + time.perf_counter() - begin


class DataFiles:
    """The files of a checkpoint, open for reading; what is read is verified. Raises DamagedError, OSError."""

    def __init__(self, directory: Place, spent: Spent | None = None) -> None:
        """spent: counts `read`, `verify` and `decode`."""
        self.directory, self.spent = directory, spent or Spent()
        self._fds: dict[str, int] = {}

    def __enter__(self) -> DataFiles:
        return self

    def __exit__(self, *error: object) -> None:
        for fd in self._fds.values():
            os.close(fd)

    def open(self, names: Iterable[str]) -> None:
        """Open files, which the other methods then may read from any thread."""
        for name in names:
            if name not in self._fds and isinstance(self.directory, Path):
                self._fds[name] = open_regular(self._path(name))

    @property
    def is_remote(self) -> bool:
        """Whether each read is a request that takes its time."""
        return isinstance(self.directory, Remote)

    def blocks(self, piece: Piece, rows: Bytes | None = None) -> list[Block]:
        """The blocks of a piece, as its rows say, which are read unless given."""
        size = piece.num_blocks * ROW
        rows = self.read(piece.file, piece.offset + piece.length - size, size) if rows is None else rows
        if blake3(rows.data).hexdigest() != piece.blake3:
            raise self._damaged(piece.file)
        table = rows.view(_ROW)
        ends = list(itertools.accumulate(table["length"].tolist(), initial=piece.offset))
        if ends[-1] != piece.offset + piece.length - size:
            raise self._damaged(piece.file)
        digests = (row.tobytes() for row in table["digest"])
        return [Block(i, ends[i], ends[i + 1] - ends[i], digest) for i, digest in enumerate(digests)]

    def will_read(self, name: str, offset: int, length: int) -> None:
        """Let the system begin to read, as far as it can do that."""
        if name in self._fds and length >= _WORTH_ASKING and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fds[name], offset, length, os.POSIX_FADV_WILLNEED)

    def verify(self, piece: Piece, block: Block, stored: Bytes) -> None:
        """Raise DamagedError unless these are a block's stored bytes."""
        with self.spent("verify"):
            if stored.size != block.length or blake3(stored.data).digest() != block.digest:
                raise self._damaged(piece.file)

    def elements(self, piece: Piece, block: Block, dtype: str, out: Bytes | None = None, stored: Bytes | None = None) -> Bytes:
        """The bytes of a block's elements, in `out` if given (which may hold anything after an error); its stored bytes are read unless
        given."""
        numel = min(BLOCK, piece.numel - block.number * BLOCK)
        if piece.codec == "raw" and block.length != numel * ITEM_SIZE[dtype]:
            raise self._damaged(piece.file)
        if stored is None:
            stored = self.read(piece.file, block.offset, block.length, out if piece.codec == "raw" else None)
        self.verify(piece, block, stored)
        if piece.codec == "planes":
            with self.spent("decode"):
                return codecs.decode(stored, numel, dtype, out)
        if out is None or stored is out:
            return stored
        out[:] = stored
        return out

    def read(self, name: str, offset: int, length: int, out: Bytes | None = None) -> Bytes:
        """Bytes of a file, in `out` if given."""
        with self.spent("read"):
            if isinstance(file := located(self.directory, name), Remote):
                return self._requested(file, offset, length, out)
            data = np.empty(length, np.uint8) if out is None else out
            view = data.data
            while len(view):
                count = os.preadv(self._fds[name], [view], offset)
                if count == 0:
                    raise self._shorter(name)
                view, offset = view[count:], offset + count
            return data

    def _requested(self, file: Remote, offset: int, length: int, out: Bytes | None) -> Bytes:
        data: Bytes = np.frombuffer(file.read_range(offset, length), np.uint8)
        if data.size != length:
            raise self._shorter(file.name)
        out = np.empty(length, np.uint8) if out is None else out  # what a store gives cannot be written to, nor become a tensor
        out[:] = data
        return out

    def _path(self, name: str) -> Path:
        path = located(self.directory, name)
        assert isinstance(path, Path)
        return path

    def _shorter(self, name: str) -> DamagedError:
        return DamagedError(f"{self.directory / name} became shorter while it was read; use another checkpoint")

    def _damaged(self, name: str) -> DamagedError:
        return DamagedError(
            f"{self.directory / name} is damaged: its content does not have the hash that the manifest says; use another checkpoint"
        )


def verify_file(directory: Place, file: File) -> None:
    """Raise DamagedError unless the file's content has the hash that the manifest says."""
    if hash_of(directory / file.path) != file.blake3:
        raise DamagedError(
            f"{directory / file.path} is damaged: its content does not have the hash that the manifest says; use another checkpoint"
        )


def bytes_of(tensor: Tensor) -> memoryview:
    """The elements of a tensor row by row, as bytes: its own memory where that is contiguous on the host, else a copy."""
    plain = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


def flat_memory(tensor: Tensor) -> Bytes | None:
    """The memory of a tensor as bytes, row by row; None where it does not lie on the host like that."""
    if not tensor.is_cpu or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        return None
    memory: Bytes = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memory


def fill(target: Tensor, values: Tensor) -> None:
    """Copy host values into a tensor of their shape, by the bits and in this thread: torch's own copy would start a team of threads."""
    if target.is_cpu and not target.is_conj() and not target.is_neg():
        bits = _BITS[target.dtype.itemsize]
        np.copyto(target.detach().view(bits).numpy(), values.view(bits).numpy())
    else:
        target.detach().copy_(values)


def drop_from_cache(path: Path) -> None:
    """Let what is read of a file next come from the disk and not from memory, as far as the system can do that. Raises OSError."""
    fd = open_regular(path)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
