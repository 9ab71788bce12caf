"""Pack documents into rows of fixed length with as few cuts as possible, in an endless, seeded, seekable order.

Best-fit packing (Ding et al., "Fewer Truncations Improve Language Modeling", arXiv 2404.10830), as V3 4.1 uses it: a document
longer than a row is cut into whole rows and a rest; then rests and short documents, longest first, each go into the row with the
least room that still holds them. No other document is ever cut.

An epoch is a seeded permutation of a source's documents, split into windows of some thousands; a window is packed by itself and
its rows are shuffled. So every document is seen once before any is seen twice, and the place in the stream is three numbers:
epoch, window, and rows taken from it. The permutation is a Feistel network over the document numbers, which needs no memory.

Fill-in-the-middle (V3 4.1, PSM): at document level, before packing, a share of the documents becomes
`begin prefix hole suffix end middle eos`. The two cuts fall between tokens of the tokenized document, not between characters.

Every random choice is a hash of (seed, source, epoch, document), so that none depends on how the rows are read.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from quintet.data.shards import Documents, Tokens
from quintet.data.tokenizer import Fim

Ints = NDArray[np.int64]
_U64 = NDArray[np.uint64]

WINDOW = 4096
"""Documents that are packed together, about."""
PADDING = -1
"""Document id of padding."""
_ROUNDS = 8


def stream_key(*parts: int | str) -> int:
    """A 64-bit key from anything that names a stream."""
    return int.from_bytes(blake3(repr(parts).encode()).digest(8), "little")


def random_bits(key: int, numbers: Ints | _U64) -> _U64:
    """One independent-looking 64-bit number for each of `numbers` under `key` (the finalizer of SplitMix64, twice)."""
    x = numbers.astype(np.uint64)
    shifted = np.empty_like(x)
    for constant in (key, key >> 32 | 1):
        x += np.uint64(constant & (1 << 64) - 1)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            np.right_shift(x, np.uint64(shift), out=shifted)
            x ^= shifted
            x *= np.uint64(factor)
    return x


class Permutation:
    """A seeded permutation of range(size): a Feistel network, walked until the value lies in range."""

    def __init__(self, size: int, *, key: int) -> None:
        self.size = size
        self.key = key
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)

    @cached_property
    def _rounds(self) -> list[Ints]:
        """What each round makes of each half: [2^half], a few MB for billions of numbers."""
        halves, mask = np.arange(1 << self._half), np.uint64((1 << self._half) - 1)
        return [(random_bits(self.key + r, halves) & mask).astype(np.int64) for r in range(_ROUNDS)]

    def __call__(self, numbers: Ints) -> Ints:
        """Where each of `numbers` is sent."""
        x = numbers.copy()
        outside = np.arange(len(x))
        while len(outside):
            left, right = x[outside] >> self._half, x[outside] & (1 << self._half) - 1
            for round_ in self._rounds:
                left, right = right, left ^ round_[right]
            x[outside] = left << self._half | right
            outside = outside[x[outside] >= self.size]
        return x


def best_fit(lengths: Ints, capacity: int) -> Ints:
    """The row of each piece: longest first, each into the row with the least room that holds it (a new row if none does).

    lengths [P], each from 1 to `capacity` -> row numbers [P].
    """
    order = np.argsort(-lengths, kind="stable")
    num_rows = int((lengths == capacity).sum())
    found = list(range(num_rows))
    rooms: list[int] = []  # That there are, ascending.
    rows_of: dict[int, list[int]] = {}  # Room -> the rows that have it, of which the latest is taken first.
    for length in lengths[order[num_rows:]].tolist():
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            row = rows_of[room].pop()
            if not rows_of[room]:
                del rooms[at], rows_of[room]
        else:
            room, row, num_rows = capacity, num_rows, num_rows + 1
        found.append(row)
        left = room - length
        if left in rows_of:
            rows_of[left].append(row)
        elif left:
            rows_of[left] = [row]
            insort(rooms, left)
    rows = np.empty(len(lengths), np.int64)
    rows[order] = found
    return rows


@dataclass(frozen=True, kw_only=True)
class Window:
    """Some thousands of documents packed into rows; row r holds the pieces from first[r] to first[r + 1]."""

    first: Ints
    """Row -> its first piece: [R + 1]."""
    document: Ints
    """Piece -> document of the shard: [P]."""
    start: Ints
    """Piece -> first token of the (rearranged) document: [P]."""
    length: Ints
    """Piece -> tokens: [P]."""
    cuts: dict[int, tuple[int, int]]
    """Document -> where its middle begins and ends, if it is rearranged for fill-in-the-middle."""

    @property
    def num_rows(self) -> int:
        """Rows in the window."""
        return len(self.first) - 1

    def rearranged(self) -> list[bool]:
        """Whether a document in each row is rearranged; empty where none is in any."""
        cut = np.isin(self.document, np.fromiter(self.cuts, np.int64, len(self.cuts)))
        return np.logical_or.reduceat(cut, self.first[:-1]).tolist() if self.cuts else []


def fim_cuts(documents: Ints, lengths: Ints, *, rate: float, key: int) -> dict[int, tuple[int, int]]:
    """Which documents are rearranged, and where: two uniform cuts within the tokens before the end-of-document token."""
    chosen = (random_bits(key, documents) >> np.uint64(11)).astype(np.float64) * 2.0**-53 < rate
    chosen &= lengths >= 3
    picked, body = documents[chosen], lengths[chosen] - 1
    cuts = np.sort(np.stack([random_bits(key + i, picked) % (body + 1).astype(np.uint64) for i in (1, 2)]), axis=0).astype(np.int64)
    return {document: (begin, end) for document, begin, end in zip(picked.tolist(), *cuts.tolist(), strict=True)}


def pack(documents: Ints, lengths: Ints, *, row_length: int, key: int, cuts: dict[int, tuple[int, int]]) -> Window:
    """Cut, pack and shuffle: `documents` of `lengths` tokens (rearranged ones with their three more) into rows of `row_length`."""
    num_pieces = -(-lengths // row_length)
    owner = np.repeat(np.arange(len(documents)), num_pieces)
    start = (np.arange(len(owner)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)) * row_length
    length = np.minimum(lengths[owner] - start, row_length)
    row = best_fit(length, row_length)
    num_rows = int(row.max()) + 1
    place = np.empty(num_rows, np.int64)
    place[np.argsort(random_bits(key, np.arange(num_rows)), kind="stable")] = np.arange(num_rows)
    order = np.lexsort((random_bits(key + 1, np.arange(len(row))), place[row]))  # Rows in shuffled order, pieces shuffled in each.
    first = np.searchsorted(place[row][order], np.arange(num_rows + 1))
    return Window(first=first, document=documents[owner][order], start=start[order], length=length[order], cuts=cuts)


class Row(NamedTuple):
    """One row, not copied yet."""

    ids: list[Tokens]
    """Runs of ids that make the row, one after another."""
    sizes: list[int]
    """Tokens of each piece."""
    padding: int
    """Tokens behind the last piece, which are eos_id."""


class Stream(Protocol):
    """Rows, one after another."""

    def read(self) -> Row:
        """The next row; moves on."""

    def skip(self) -> None:
        """Move on to the next row."""


class Empty:
    """Rows of padding alone."""

    def __init__(self, *, row_length: int, eos_id: int) -> None:
        self._ids = np.full(row_length, eos_id)

    def read(self) -> Row:
        """A row without a document."""
        return Row([self._ids], [], len(self._ids))

    def skip(self) -> None:
        """Nothing."""


class _Packed(NamedTuple):
    """A window, ready to be read: of each piece where it lies, as plain numbers."""

    place: tuple[int, int]
    """Epoch and window."""
    window: Window
    """What is read."""
    first: list[int]
    """Row -> its first piece."""
    run: list[int]
    """Piece -> the run of ids that it lies in."""
    begin: list[int]
    """Piece -> its first token there; of a rearranged document, as if it were not."""
    end: list[int]
    """Piece -> the token behind its last one."""
    length: list[int]
    """Piece -> tokens."""
    padding: list[int]
    """Row -> tokens behind its last piece."""
    rearranged: list[bool]
    """Row -> whether a document in it is rearranged; empty where none is."""


class Rows:
    """The endless stream of one shard's rows; `epoch`, `window` and `offset` (rows taken from the window) are its whole state."""

    def __init__(self, shard: Documents, *, row_length: int, key: int, eos_id: int, fim: Fim | None = None, fim_rate: float = 0.0) -> None:
        """`key` seeds the order and the cuts (see `stream_key`); without `fim`, documents stay as they are."""
        assert shard.num_documents > 0
        self.shard = shard
        self.row_length = row_length
        self.key = key
        self.eos_id = eos_id
        self.fim = fim
        self.fim_rate = fim_rate if fim else 0.0
        self.num_windows = max(1, round(shard.num_documents / WINDOW))
        self.epoch = self.window = self.offset = 0
        self._packed: _Packed | None = None
        self._permutation = Permutation(shard.num_documents, key=stream_key(key, 0))
        self._padding = np.full(row_length, eos_id)

    def packed(self) -> Window:
        """The window that the stream is in."""
        return self._current().window

    def _current(self) -> _Packed:
        if self._packed is None or self._packed.place != (self.epoch, self.window):
            window = self._pack()
            run, begin = self.shard.places(window.document)
            begin = begin + window.start
            self._packed = _Packed(
                place=(self.epoch, self.window),
                window=window,
                first=window.first.tolist(),
                run=run.tolist(),
                begin=begin.tolist(),
                end=(begin + window.length).tolist(),
                length=window.length.tolist(),
                padding=(self.row_length - np.add.reduceat(window.length, window.first[:-1])).tolist(),
                rearranged=window.rearranged(),
            )
        return self._packed

    def _pack(self) -> Window:
        size, key = self.shard.num_documents, stream_key(self.key, self.epoch)
        begin, end = (size * w // self.num_windows for w in (self.window, self.window + 1))
        if self._permutation.key != key:
            self._permutation = Permutation(size, key=key)
        documents = self._permutation(np.arange(begin, end))
        lengths = self.shard.lengths(documents)
        cuts = fim_cuts(documents, lengths, rate=self.fim_rate, key=stream_key(key, "fim")) if self.fim_rate else {}
        if cuts:
            lengths = lengths + 3 * np.isin(documents, np.fromiter(cuts, np.int64, len(cuts)))
        return pack(documents, lengths, row_length=self.row_length, key=stream_key(key, "rows", self.window), cuts=cuts)

    def read(self) -> Row:
        """The next row; moves on."""
        at, runs = self._current(), self.shard.runs
        first, behind = at.first[self.offset], at.first[self.offset + 1]
        if at.rearranged and at.rearranged[self.offset]:
            ids = [view for piece in range(first, behind) for view in self._views(at, piece)]
        else:
            ids = [runs[at.run[i]][at.begin[i] : at.end[i]] for i in range(first, behind)]
        if padding := at.padding[self.offset]:
            ids.append(self._padding[:padding])
        self.skip()
        return Row(ids, at.length[first:behind], padding)

    def skip(self) -> None:
        """Move on to the next row."""
        num_rows = len(self._current().first) - 1
        self.offset += 1
        if self.offset == num_rows:
            self.skip_window()

    def skip_window(self) -> None:
        """Go to the beginning of the next window."""
        self.window, self.offset = self.window + 1, 0
        if self.window == self.num_windows:
            self.epoch, self.window = self.epoch + 1, 0

    def _views(self, at: _Packed, piece: int) -> list[Tokens]:
        """The ids of one piece: a slice of the document, or of its segments rearranged as prefix, suffix, middle."""
        run, begin, end = self.shard.runs[at.run[piece]], at.begin[piece], at.end[piece]
        document, start = int(at.window.document[piece]), int(at.window.start[piece])
        if document not in at.window.cuts:
            return [run[begin:end]]
        assert self.fim is not None
        low, high = at.window.cuts[document]
        first, stop = begin - start, begin - start + int(self.shard.lengths(np.array([document]))[0])
        text, eos = run[first : stop - 1], run[stop - 1 : stop]
        marks = np.array([self.fim.begin, self.fim.hole, self.fim.end])
        views: list[Tokens] = []
        place = -start
        for segment in (marks[:1], text[:low], marks[1:2], text[high:], marks[2:], text[low:high], eos):
            inside = segment[max(-place, 0) : max(end - begin - place, 0)]
            views += [inside] if len(inside) else []
            place += len(segment)
        return views
