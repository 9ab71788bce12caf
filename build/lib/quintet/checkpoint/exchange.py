"""Bytes of a checkpoint for ranks that load together: what several of them need, one reads and sends to the others.

Every rank goes through its share of one list of extents (runs of bytes of a file), which is in the same order on all, and has a few of them
under way at a time. So none waits for ever: all who take part in the first extent that is not done have begun it. A rank that cannot
read something goes on all the same, sends zeros that are marked as useless, and tells its error when all is done.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from quintet.checkpoint.agreement import Company
from quintet.checkpoint.codec import Bytes
from quintet.checkpoint.manifest import ROW, Piece
from quintet.checkpoint.place import Place
from quintet.checkpoint.store import DataFiles, Threads

_EXTENT = 4 << 20
"""Most bytes of an extent of several parts."""
_GAP = 1 << 16
"""Bytes between two parts that are read rather than asked for apart."""
_LITTLE = 1 << 16
"""Bytes of a part up to which the thread that comes upon it uses it by itself."""
_UNDER_WAY = 8
"""Extents that a rank has begun, and as many that are being used."""


@dataclass(frozen=True)
class Part:
    """Bytes that this rank needs. `use` gets them, or None where it may read them by itself; in any thread."""

    file: str
    offset: int
    length: int
    use: Callable[[Bytes | None], None]
    ranks: tuple[int, ...] = ()
    """Those that need just this, where they are several."""
    reader: int = 0
    """The one of them that reads."""


@dataclass
class _Extent:
    """Parts that lie close together and are needed by the same ranks."""

    parts: list[Part] = field(default_factory=list)

    @property
    def offset(self) -> int:
        return self.parts[0].offset

    @property
    def end(self) -> int:
        return self.parts[-1].offset + self.parts[-1].length

    def takes(self, part: Part) -> bool:
        """Whether a part that lies behind may be read with it."""
        return part.file == self.parts[0].file and part.offset - self.end <= _GAP and part.offset + part.length - self.offset <= _EXTENT

    def hand_out(self, data: Bytes) -> None:
        """Let each part use its bytes."""
        for part in self.parts:
            begin = part.offset - self.offset
            part.use(data[begin : begin + part.length])


def fetch(parts: Iterable[Part], files: DataFiles, threads: Threads, company: Company | None = None) -> None:
    """Read, send and use some parts, which are given by file and offset. All ranks of a company call it together, and each then raises its
    own first error."""
    crew = _Crew(files, threads, company)
    begun: deque[Callable[[], None]] = deque()
    for extent in _extents(parts, merges=files.is_remote):
        begun.append(crew.begin(extent))
        if len(begun) > max(_UNDER_WAY, 4 * threads.count):
            begun.popleft()()
    while begun:
        begun.popleft()()
    crew.end()


def _extents(parts: Iterable[Part], *, merges: bool) -> Iterator[_Extent]:
    """Parts that may be read at once, together. What nobody else needs is so only where `merges`: else each part reads by itself."""
    if isinstance(parts, list) and any(part.ranks for part in parts):
        groups: dict[tuple[int, ...], list[_Extent]] = {}
        for part in parts:
            extents = groups.setdefault((part.reader, *part.ranks), [])
            if not extents or not (part.ranks or merges) or not extents[-1].takes(part):
                extents.append(_Extent())
            extents[-1].parts.append(part)
        yield from sorted(itertools.chain.from_iterable(groups.values()), key=lambda extent: (extent.parts[0].file, extent.offset))
        return
    last = _Extent()
    for part in parts:
        if last.parts and not (merges and last.takes(part)):
            yield last
            last = _Extent()
        last.parts.append(part)
    if last.parts:
        yield last


class _Crew:
    """What of the work on extents is under way on this rank, and what went wrong."""

    def __init__(self, files: DataFiles, threads: Threads, company: Company | None) -> None:
        self._files, self._threads, self._company = files, threads, company
        self._used: deque[tuple[Future[None] | None, list[Any]]] = deque()
        self._errors: list[Exception] = []

    def begin(self, extent: _Extent) -> Callable[[], None]:
        """Start with an extent; what is returned waits for its bytes, and passes them on."""
        first = extent.parts[0]
        self._files.will_read(first.file, extent.offset, extent.end - extent.offset)
        if not first.ranks and first.length <= _LITTLE and not self._files.is_remote:  # not worth waking a thread
            self._try(lambda: first.use(None))
            return lambda: None
        if not first.ranks:
            future = self._threads.start(lambda: self._alone(extent))
            return lambda: self._note(future)
        assert self._company is not None
        message = np.empty(extent.end - extent.offset + 1, np.uint8)  # the last byte: whether the others are of use
        if first.reader == self._company.rank:
            read = self._threads.start(lambda: self._read(extent, message))
            return lambda: self._pass_on(extent, read, message)
        work = self._company.receive(torch.from_numpy(message), first.reader)
        return lambda: self._received(extent, work, message)

    def end(self) -> None:
        """Wait for all that is left. Raises the first error."""
        while self._used:
            self._finish()
        if self._errors:
            raise self._errors[0]

    def _alone(self, extent: _Extent) -> None:
        if self._files.is_remote:
            extent.hand_out(self._files.read(extent.parts[0].file, extent.offset, extent.end - extent.offset))
        else:
            extent.parts[0].use(None)

    def _read(self, extent: _Extent, message: Bytes) -> None:
        message[-1] = 0
        self._files.read(extent.parts[0].file, extent.offset, extent.end - extent.offset, message[:-1])
        message[-1] = 1

    def _pass_on(self, extent: _Extent, read: Future[None], message: Bytes) -> None:
        assert self._company is not None
        self._note(read)
        ranks = [rank for rank in extent.parts[0].ranks if rank != self._company.rank]
        works = [self._company.send(torch.from_numpy(message), rank) for rank in ranks]
        self._use(extent, message, works)

    def _received(self, extent: _Extent, work: Any, message: Bytes) -> None:
        work.wait()
        self._use(extent, message, [])

    def _use(self, extent: _Extent, message: Bytes, works: list[Any]) -> None:
        future = self._threads.start(lambda: extent.hand_out(message[:-1])) if message[-1] else None
        self._used.append((future, works))
        if len(self._used) > _UNDER_WAY:
            self._finish()

    def _finish(self) -> None:
        future, works = self._used.popleft()
        for work in works:
            work.wait()
        if future is not None:
            self._note(future)

    def _note(self, future: Future[None]) -> None:
        self._try(future.result)

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # the others count on this rank
            self._errors.append(error)


def verify_data(
    directory: Place, pieces: Sequence[Piece], threads: Threads, *, on_bytes: Callable[[int], None] = lambda count: None
) -> None:
    """Raise DamagedError unless every byte of the pieces has its hash; `on_bytes` hears how many more have. Raises OSError."""
    with DataFiles(directory) as files:
        files.open({piece.file for piece in pieces})

        def parts_of(piece: Piece) -> list[Part]:
            return [Part(piece.file, block.offset, block.length, checked(piece, block)) for block in files.blocks(piece)]

        def checked(piece: Piece, block: Any) -> Callable[[Bytes | None], None]:
            def check(stored: Bytes | None) -> None:
                files.verify(piece, block, files.read(piece.file, block.offset, block.length) if stored is None else stored)
                on_bytes(block.length + ROW)

            return check

        ordered = sorted(pieces, key=lambda piece: (piece.file, piece.offset))
        rows = threads.in_order(parts_of, ordered) if len(ordered) > _UNDER_WAY else map(parts_of, ordered)
        fetch((part for parts in rows for part in parts), files, threads)
