"""Tensors to the blocks of a data file and back: each block is encoded and hashed when it is written, hashed and decoded when it is read.

Several threads work on blocks while one writes or plans; numpy, zstd and BLAKE3 let go of Python's lock. See `manifest` for the form.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from quintet.checkpoint import codec as codecs
from quintet.checkpoint.codec import Bytes
from quintet.checkpoint.durable import PAGE, PAST_CACHE, FileWriter, open_regular
from quintet.checkpoint.manifest import BLOCK, ITEM_SIZE, PLANES, ROW, Codec, File, Piece
from quintet.checkpoint.pieces import Box, cut, dtype_name, within
from quintet.checkpoint.place import AT_ONCE, Place, Remote, RemoteWriter, hash_of, located
from quintet.errors import DamagedError

A = TypeVar("A")
B = TypeVar("B")

_AHEAD = 4
"""Blocks of a thread that wait for it, or for the one who takes them."""
CUT = 1 << 22
"""Elements of a piece at most, where later checkpoints may refer to it."""
_SMALL = 4096
"""Elements of a piece below which coding gains nothing worth its lengths."""
_ROW = np.dtype([("length", "<u8"), ("digest", "u1", 32)])
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


_RANKS_OF_A_NODE = 8
"""Ranks that are supposed to share a node's cores, where there are so many."""


class Threads:
    """A few threads for blocks."""

    def __init__(self, *, num_ranks: int = 1, beside_training: bool = False) -> None:
        """As many as the process has cores, shared out among the ranks of a node; half of them beside training. And others, which read."""
        cores = len(os.sched_getaffinity(0)) // (2 if beside_training else 1)
        self.count = min(max(cores // min(num_ranks, _RANKS_OF_A_NODE), 1), 16)
        self._pool = ThreadPoolExecutor(self.count, thread_name_prefix="blocks")
        self._readers = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="reads")

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._readers.shutdown(cancel_futures=True)

    def start(self, work: Callable[[], B]) -> Future[B]:
        """Begin some work."""
        return self._pool.submit(work)

    def start_reading(self, work: Callable[[], B]) -> Future[B]:
        """Begin some work that mostly waits for the disk, or for a store."""
        return self._readers.submit(work)

    def in_order(self, work: Callable[[A], B], jobs: Iterable[A], *, reads: bool = False) -> Iterator[B]:
        """`work` of each job, in order; only a few are done ahead of what is taken. reads: it mostly waits."""
        pool, ahead = (self._readers, AT_ONCE) if reads else (self._pool, _AHEAD * self.count)
        pending: deque[Future[B]] = deque()
        for job in jobs:
            pending.append(pool.submit(work, job))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@dataclass(frozen=True)
class Source:
    """A box of a tensor that is to be written, and where its elements lie."""

    name: str
    box: Box
    tensor: Tensor
    twin: tuple[str, Tensor] | None = None
    """The name and the same box of a bf16 tensor, which is written too unless it is the rounding of this one."""

    def part(self, box: Box) -> Source:
        """A box within."""
        twin = self.twin and (self.twin[0], within(box, self.box[0], self.twin[1]))
        return Source(self.name, box, within(box, self.box[0], self.tensor), twin)


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

    With `known`, boxes are cut into pieces of at most `CUT` elements, so that what does not change, as a frozen expert, has its own; and
    what is known is not written again.
    """
    if known is not None:
        sources = (source.part(box) for source in sources for box in cut(source.box, CUT))

    def form(source: Source) -> Codec:
        return codec if dtype_name(source.tensor.dtype) in PLANES and source.tensor.numel() >= _SMALL else "raw"

    def blocks() -> Iterator[tuple[Source, list[Bytes]]]:
        for source in sources:
            tensors = [source.tensor, *([source.twin[1]] if source.twin else [])]
            sizes, data = [BLOCK * each.dtype.itemsize for each in tensors], [np.frombuffer(bytes_of(each), np.uint8) for each in tensors]
            for i in range(-(-data[0].size // sizes[0])):
                yield source, [each[i * size : (i + 1) * size] for each, size in zip(data, sizes, strict=True)]

    def stored(job: tuple[Source, list[Bytes]]) -> tuple[Source, list[Bytes], bytes, bool]:
        source, (block, *twin) = job
        parts = codecs.encode(block, dtype_name(source.tensor.dtype)) if form(source) == "planes" else [block]
        digest = blake3()  # One thread: a pool of threads would hang in a forked child.
        for part in parts:
            digest.update(part.data)
        return source, parts, digest.digest(), not twin or np.array_equal(codecs.rounded(block), twin[0])

    pieces: list[tuple[str, Piece]] = []
    others: list[Source] = []
    for source, done in itertools.groupby(threads.in_order(stored, blocks()), key=lambda found: found[0]):
        begin, rows, kept, is_rounded = writer.size, b"", list[Bytes](), True
        for _, parts, digest, same in done:
            is_rounded &= same
            rows += sum(part.size for part in parts).to_bytes(8, "little") + digest
            if known is not None:  # it may be there already
                kept.extend(parts)
                continue
            for part in parts:
                writer.write(part.data)
        if source.twin is not None and not is_rounded:
            others.append(Source(source.twin[0], source.box, source.twin[1]))
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
    return [*pieces, *write_pieces(writer, others, codec, threads, known)] if others else pieces


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


def aligned(length: int) -> Bytes:
    """Memory that begins where a page does."""
    memory = np.empty(length + PAGE, np.uint8)
    begin = -memory.ctypes.data % PAGE
    return memory[begin : begin + length]


class DataFiles:
    """The files of a checkpoint, open for reading; what is read is verified. Raises DamagedError, OSError."""

    def __init__(self, directory: Place, spent: Spent | None = None) -> None:
        """spent: counts `read`, `verify` and `decode`."""
        self.directory, self.spent = directory, spent or Spent()
        self._fds: dict[str, int] = {}
        self._past_cache: dict[str, int] = {}

    def __enter__(self) -> DataFiles:
        return self

    def __exit__(self, *error: object) -> None:
        for fd in (*self._fds.values(), *self._past_cache.values()):
            os.close(fd)

    def open(self, names: Iterable[str]) -> None:
        """Open files, which the other methods then may read from any thread."""
        for name in names:
            path = located(self.directory, name)
            if name not in self._fds and isinstance(path, Path):
                self._fds[name] = open_regular(path)
                with suppress(OSError):  # not every file system can do that
                    self._past_cache[name] = open_regular(path, PAST_CACHE)

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

    def verify(self, piece: Piece, block: Block, stored: Bytes) -> None:
        """Raise DamagedError unless these are a block's stored bytes."""
        with self.spent("verify"):
            if stored.size != block.length or blake3(stored.data).digest() != block.digest:
                raise self._damaged(piece.file)

    def elements(self, piece: Piece, block: Block, dtype: str, stored: Bytes, out: Bytes | None = None) -> Bytes:
        """The bytes of a block's elements from its stored bytes, in `out` if given, which may hold anything after an error."""
        numel = min(BLOCK, piece.numel - block.number * BLOCK)
        if piece.codec == "raw" and block.length != numel * ITEM_SIZE[dtype]:
            raise self._damaged(piece.file)
        self.verify(piece, block, stored)
        if piece.codec == "planes":
            with self.spent("decode"):
                return codecs.decode(stored, numel, dtype, out)
        if out is None:
            return stored
        out[:] = stored
        return out

    def read(self, name: str, offset: int, length: int, buffer: Bytes | None = None) -> Bytes:
        """Bytes of a file. Many are best read into an `aligned` buffer of as many and two pages more: there they begin at the place where
        they do in their page, and the system reads them past its cache if it can."""
        with self.spent("read"):
            begin = 0 if buffer is None else offset % PAGE
            pages = np.empty(length, np.uint8) if buffer is None else buffer
            data = pages[begin : begin + length]
            if isinstance(file := located(self.directory, name), Remote):
                found = file.read_range(offset, length)
                if len(found) != length:
                    raise self._shorter(name)
                data[:] = np.frombuffer(found, np.uint8)  # which itself cannot be written to, nor become a tensor
                return data
            done = 0
            if buffer is not None and name in self._past_cache:
                done = max(self._read_pages(name, offset - begin, pages[: -(-(begin + length) // PAGE) * PAGE]) - begin, 0)
            while done < length:
                count = os.preadv(self._fds[name], [data[done:].data], offset + done)
                if count == 0:
                    raise self._shorter(name)
                done += count
            return data

    def _read_pages(self, name: str, offset: int, pages: Bytes) -> int:
        """Fill whole pages past the cache, as far as that goes -> bytes that are there."""
        done = 0
        try:
            while done < pages.size and done % PAGE == 0:  # else the file ends there
                count = os.preadv(self._past_cache[name], [pages[done:].data], offset + done)
                if count == 0:
                    break
                done += count
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        return done

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
