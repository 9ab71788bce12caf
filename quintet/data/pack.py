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

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from quintet.data.shards import Documents
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
    for constant in (key, key >> 32 | 1):
        x = x + np.uint64(constant & (1 << 64) - 1)
        x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        x = x ^ x >> np.uint64(31)
    return x


def permuted(numbers: Ints, *, size: int, key: int) -> Ints:
    """Where a seeded permutation of range(size) sends each of `numbers`: a Feistel network, walked until the value lies in range."""
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    x = numbers.astype(np.uint64)
    outside = np.ones(len(x), bool)
    while outside.any():
        left, right = x[outside] >> half, x[outside] & mask
        for r in range(_ROUNDS):
            left, right = right, left ^ random_bits(key + r, right) & mask
        x[outside] = left << half | right
        outside = x >= np.uint64(size)
    return x.astype(np.int64)


def best_fit(lengths: Ints, capacity: int) -> Ints:
    """The row of each piece: longest first, each into the row with the least room that holds it (a new row if none does).

    lengths [P], each from 1 to `capacity` -> row numbers [P].
    """
    rows = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    num_rows = int((lengths == capacity).sum())
    rows[order[:num_rows]] = np.arange(num_rows)
    with_room: defaultdict[int, list[int]] = defaultdict(list)
    rooms = 0  # Bit r is set while some row has room for exactly r tokens.
    for piece, length in zip(order[num_rows:].tolist(), lengths[order[num_rows:]].tolist(), strict=True):
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            row, room, num_rows = num_rows, capacity, num_rows + 1
        rows[piece] = row
        if room := room - length:
            with_room[room].append(row)
            rooms |= 1 << room
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
        self._packed: tuple[int, int, Window] | None = None

    def packed(self) -> Window:
        """The window that the stream is in."""
        if self._packed is None or self._packed[:2] != (self.epoch, self.window):
            self._packed = (self.epoch, self.window, self._pack())
        return self._packed[2]

    def _pack(self) -> Window:
        size, key = self.shard.num_documents, stream_key(self.key, self.epoch)
        begin, end = (size * w // self.num_windows for w in (self.window, self.window + 1))
        documents = permuted(np.arange(begin, end), size=size, key=key)
        lengths = self.shard.lengths(documents)
        cuts = fim_cuts(documents, lengths, rate=self.fim_rate, key=stream_key(key, "fim")) if self.fim_rate else {}
        if cuts:
            lengths = lengths + 3 * np.isin(documents, np.fromiter(cuts, np.int64, len(cuts)))
        return pack(documents, lengths, row_length=self.row_length, key=stream_key(key, "rows", self.window), cuts=cuts)

    def read(self, tokens: Ints, document_ids: NDArray[np.int32]) -> None:
        """Write the next row into `tokens` and `document_ids`, both [row_length], and move on.

        Document ids count from 0 within the row; what is left of it holds eos_id with document id `PADDING`.
        """
        window = self.packed()
        at = 0
        first, last = window.first[self.offset], window.first[self.offset + 1]
        for i, piece in enumerate(range(first, last)):
            length = int(window.length[piece])
            self._copy(tokens[at : at + length], window, piece)
            document_ids[at : at + length] = i
            at += length
        tokens[at:] = self.eos_id
        document_ids[at:] = PADDING
        self.skip()

    def skip(self) -> None:
        """Move on to the next row."""
        self.offset += 1
        if self.offset == self.packed().num_rows:
            self.skip_window()

    def skip_window(self) -> None:
        """Go to the beginning of the next window."""
        self.window, self.offset = self.window + 1, 0
        if self.window == self.num_windows:
            self.epoch, self.window = self.epoch + 1, 0

    def _copy(self, out: Ints, window: Window, piece: int) -> None:
        """Write one piece: a slice of the document, or of its segments rearranged as prefix, suffix, middle."""
        document, start = int(window.document[piece]), int(window.start[piece])
        ids = self.shard.document(document)
        if document not in window.cuts:
            out[:] = ids[start : start + len(out)]
            return
        assert self.fim is not None
        begin, end = window.cuts[document]
        text, eos = ids[:-1], ids[-1:]
        marks = np.array([self.fim.begin, self.fim.hole, self.fim.end])
        at = -start
        for segment in (marks[:1], text[:begin], marks[1:2], text[end:], marks[2:], text[begin:end], eos):
            low, high = max(at, 0), min(at + len(segment), len(out))
            if low < high:
                out[low:high] = segment[low - at : high - at]
            at += len(segment)
