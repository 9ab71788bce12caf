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

import torch

from quintet.checkpoint.agreement import Company
from quintet.checkpoint.codec import Bytes
from quintet.checkpoint.durable import PAGE
from quintet.checkpoint.manifest import ROW, Piece
from quintet.checkpoint.place import Place
from quintet.checkpoint.store import Block, DataFiles, Threads, aligned

_EXTENT = 4 << 20
"""Most bytes of an extent of several parts."""
_GAP = 1 << 16
"""Bytes between two parts that are read rather than asked for apart."""
_LITTLE = 1 << 16
"""Bytes of an extent up to which the thread that comes upon it uses it by itself."""
_UNDER_WAY = 8
"""Extents that a rank has begun, and as many that are being used."""


@dataclass(frozen=True)
class Part:
    """Bytes that this rank needs. `use` gets them, in any thread, and only for as long as it runs."""

    file: str
    offset: int
    length: int
    use: Callable[[Bytes], None]
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
    for extent in _extents(parts):
        begun.append(crew.begin(extent))
        if len(begun) > _UNDER_WAY:
            begun.popleft()()
    while begun:
        begun.popleft()()
    crew.end()


def _extents(parts: Iterable[Part]) -> Iterator[_Extent]:
    """Parts that are read at once, in an order that is the same on all ranks."""
    if isinstance(parts, list) and any(part.ranks for part in parts):
        groups: dict[tuple[int, ...], list[_Extent]] = {}
        for part in parts:
            extents = groups.setdefault((part.reader, *part.ranks), [])
            if not extents or not extents[-1].takes(part):
                extents.append(_Extent())
            extents[-1].parts.append(part)
        yield from sorted(itertools.chain.from_iterable(groups.values()), key=lambda extent: (extent.parts[0].file, extent.offset))
        return
    last = _Extent()
    for part in parts:
        if last.parts and not last.takes(part):
            yield last
            last = _Extent()
        last.parts.append(part)
    if last.parts:
        yield last


class _Message:
    """Memory for the bytes of an extent, and for one more that tells the others whether they are of use."""

    def __init__(self, extent: _Extent, buffer: Bytes) -> None:
        self.extent, self.buffer = extent, buffer
        begin = extent.offset % PAGE
        self.bytes = buffer[begin : begin + extent.end - extent.offset + 1]

    @staticmethod
    def room(extent: _Extent) -> int:
        """Bytes of a buffer that is long enough for any extent of this length, or of the usual one."""
        return max(extent.end - extent.offset, _EXTENT) + 2 * PAGE

    def read(self, files: DataFiles) -> None:
        """Fill it from the file."""
        useful = 0
        try:
            files.read(self.extent.parts[0].file, self.extent.offset, self.extent.end - self.extent.offset, self.buffer)
            useful = 1
        finally:
            self.bytes[-1] = useful

    def use(self) -> None:
        """Let each part use its bytes."""
        self.extent.hand_out(self.bytes[:-1])


class _Crew:
    """A rank's part in reading and sending."""

    def __init__(self, files: DataFiles, threads: Threads, company: Company | None) -> None:
        self._files, self._threads, self._company = files, threads, company
        self._used: deque[tuple[_Message, Future[None] | None, list[Any]]] = deque()
        self._free: list[Bytes] = []
        self._errors: list[Exception] = []

    def begin(self, extent: _Extent) -> Callable[[], None]:
        """Start with an extent; what is returned waits for its bytes, and passes them on."""
        first = extent.parts[0]
        if not first.ranks and extent.end - extent.offset <= _LITTLE and not self._files.is_remote:  # not worth waking a thread
            self._try(lambda: extent.hand_out(self._files.read(first.file, extent.offset, extent.end - extent.offset)))
            return lambda: None
        room = _Message.room(extent)
        message = _Message(extent, self._free.pop() if self._free and self._free[-1].size >= room else aligned(room))
        if first.ranks and self._company is not None and first.reader != self._company.rank:
            work = self._company.receive(torch.from_numpy(message.bytes), first.reader)
            return lambda: self._received(message, work)
        read = self._threads.start_reading(lambda: message.read(self._files))
        return lambda: self._pass_on(message, read)

    def end(self) -> None:
        """Wait for all that is left. Raises the first error."""
        while self._used:
            self._finish()
        if self._errors:
            raise self._errors[0]

    def _pass_on(self, message: _Message, read: Future[None]) -> None:
        self._try(read.result)
        works = list[Any]()
        if self._company is not None:
            others = (rank for rank in message.extent.parts[0].ranks if rank != self._company.rank)
            works = [self._company.send(torch.from_numpy(message.bytes), rank) for rank in others]
        self._use(message, works)

    def _received(self, message: _Message, work: Any) -> None:
        work.wait()
        self._use(message, [])

    def _use(self, message: _Message, works: list[Any]) -> None:
        self._used.append((message, self._threads.start(message.use) if message.bytes[-1] else None, works))
        if len(self._used) > max(_UNDER_WAY, 2 * self._threads.count):
            self._finish()

    def _finish(self) -> None:
        message, future, works = self._used.popleft()
        for work in works:
            work.wait()
        if future is not None:
            self._try(future.result)
        self._free.append(message.buffer)

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

        def checked(piece: Piece, block: Block) -> Callable[[Bytes], None]:
            def check(stored: Bytes) -> None:
                files.verify(piece, block, stored)
                on_bytes(block.length + ROW)

            return check

        ordered = sorted(pieces, key=lambda piece: (piece.file, piece.offset))
        rows = threads.in_order(parts_of, ordered, reads=True) if len(ordered) > _UNDER_WAY else map(parts_of, ordered)
        fetch((part for parts in rows for part in parts), files, threads)
