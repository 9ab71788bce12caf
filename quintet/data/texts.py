"""A batch of documents as one buffer of bytes, with its words and lines as arrays: what rules and fingerprints are computed from.

Everything is computed for all documents of the batch at once, by numpy; nothing here loops over documents, lines or words in Python.
Words are divided by ASCII white space and control characters. Where there is a choice, a character is a code point of UTF-8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]
Values = NDArray[np.float64]

_GUARD = 16
_LONGEST_HASHED = 64
_LINE_FEED = 10


@dataclass(frozen=True)
class Spans:
    """Runs of bytes in the buffer, in order."""

    begin: Ints
    """First byte of each: [K]."""
    end: Ints
    """Byte behind the last of each: [K]."""
    first: Ints
    """Document -> its first run: [N + 1]."""

    @cached_property
    def counts(self) -> Ints:
        """Runs of each document: [N]."""
        return np.diff(self.first)

    @cached_property
    def owner(self) -> Ints:
        """Run -> document: [K]."""
        return np.repeat(np.arange(len(self.first) - 1), self.counts)

    @cached_property
    def behind(self) -> Ints:
        """Run -> the first run of the next document: [K]."""
        return np.repeat(self.first[1:], self.counts)


class Texts:
    """N documents, given as UTF-8."""

    def __init__(self, raws: Sequence[bytes]) -> None:
        self.raws = raws
        ended = [raw if raw.endswith(b"\n") else raw + b"\n" for raw in raws]
        self.data = np.frombuffer(b"".join([b"\n", *ended, bytes(_GUARD)]), np.uint8)
        """A line feed, each document ended by a line feed, and a guard."""
        self.begin: Ints = np.cumsum([1, *map(len, ended)], dtype=np.int64)
        """Document -> its first byte: [N + 1]."""

    def __len__(self) -> int:
        return len(self.raws)

    @cached_property
    def words(self) -> Spans:
        """Runs without white space."""
        return words_of(self.data, self.begin)

    @cached_property
    def word_hashes(self) -> Hashes:
        """One hash per word."""
        return hash_spans(self.data, self.words.begin, self.words.end - self.words.begin)

    @cached_property
    def word_chars(self) -> Ints:
        """Characters of each word."""
        return self.num_chars(self.words.begin, self.words.end)

    @cached_property
    def lines(self) -> Spans:
        """Lines that are not blank, without the white space around them."""
        feeds = np.flatnonzero(self.data[:-_GUARD] == _LINE_FEED)
        return self._trimmed(feeds[:-1], feeds[1:])

    @cached_property
    def paragraphs(self) -> Spans:
        """Runs of lines that are not blank, divided by blank ones."""
        lines = self.lines
        feeds = np.flatnonzero(self.data[:-_GUARD] == _LINE_FEED)
        number = np.searchsorted(feeds, lines.begin)
        if not len(number):
            return lines
        starts = np.flatnonzero(np.concatenate([[True], (np.diff(number) > 1) | (np.diff(lines.owner) > 0)]))
        begin, end = lines.begin[starts], lines.end[np.concatenate([starts[1:] - 1, [len(number) - 1]])]
        return Spans(begin, end, np.searchsorted(begin, self.begin))

    def num_chars(self, begin: Ints, end: Ints) -> Ints:
        """Characters between byte positions."""
        size = end - begin
        return size if self._continuations is None else size - (self._continuations[end] - self._continuations[begin])

    @cached_property
    def _continuations(self) -> NDArray[np.int32] | None:
        """How many of the bytes before a position do not begin a character; None: none of all."""
        if not len(self.data) or int(self.data.max()) < 128:
            return None
        return np.concatenate([[0], np.cumsum(self.data & 0xC0 == 0x80, dtype=np.int32)]).astype(np.int32)

    @cached_property
    def chars(self) -> Ints:
        """Characters of each document, its last line feed included: [N]."""
        return self.num_chars(self.begin[:-1], self.begin[1:])

    def _trimmed(self, begin: Ints, end: Ints) -> Spans:
        """The spans without white space at their ends, and without those that hold nothing else."""
        words = self.words
        first, last = np.searchsorted(words.begin, begin), np.searchsorted(words.begin, end)
        full = last > first
        trimmed = words.begin[first[full]]
        return Spans(trimmed, words.end[last[full] - 1], np.searchsorted(trimmed, self.begin))

    def span_hashes(self, spans: Spans) -> Hashes:
        """One hash per span, of its words in order; white space between them makes no difference."""
        first = np.searchsorted(self.words.begin, spans.begin)
        if not len(first):
            return np.empty(0, np.uint64)
        last = np.searchsorted(self.words.begin, spans.end)
        place = np.arange(int(last[-1] - first[0]), dtype=np.int64) + first[0]
        place -= np.repeat(first, np.diff(np.append(first, last[-1])))
        mixed = mix(self.word_hashes[first[0] : last[-1]] + place.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        return np.add.reduceat(mixed, first - first[0])

    def sums(self, values: NDArray[Any], spans: Spans) -> Ints:
        """Document -> the sum of its spans' values: [N]."""
        total = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        return total[spans.first[1:]] - total[spans.first[:-1]]


def reuse_memory() -> None:
    """Let what a batch frees serve the next one: glibc's malloc gives large blocks, and the end of its heap, back to the system, which then
    maps every page anew (half of the time of `minhash`), until a block of up to 32 MB was freed once (mallopt(3), M_MMAP_THRESHOLD)."""
    np.empty(31 << 20, np.uint8)


def ratio(part: NDArray[Any], whole: NDArray[Any]) -> Values:
    """part / whole, 0 where there is nothing."""
    return part / np.maximum(whole, 1)


def mix(x: Hashes) -> Hashes:
    """The finalizer of SplitMix64."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def words_of(data: NDArray[np.uint8], begin: Ints) -> Spans:
    """The words in a buffer as `Texts.data`, whose documents begin at `begin`."""
    space = data[:-_GUARD] <= 32
    turns = np.flatnonzero(space[1:] != space[:-1]) + 1  # The buffer begins and ends with white space: word, gap, word, gap ...
    return Spans(turns[::2], turns[1::2], np.searchsorted(turns[::2], begin))


def hash_spans(data: NDArray[np.uint8], begin: Ints, size: Ints) -> Hashes:
    """One 64-bit hash per span of bytes: of its size and its bytes, of very long ones the first 64 and the last 8."""
    padded = np.concatenate([data, np.zeros(-len(data) % 8 + 8, np.uint8)]).view("<u8")
    hashes = mix(_eight(padded, begin, size) + size.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    at, left = 8, np.flatnonzero(size > 8)
    while len(left) and at < _LONGEST_HASHED:
        hashes[left] = mix(hashes[left] ^ _eight(padded, begin[left] + at, size[left] - at) * np.uint64(0xD6E8FEB86659FD93))
        at, left = at + 8, left[size[left] > at + 8]
    if len(left):
        hashes[left] = mix(hashes[left] ^ _eight(padded, begin[left] + size[left] - 8, size[left]) * np.uint64(0xA0761D6478BD642F))
    return hashes


def _eight(padded: Hashes, begin: Ints, size: Ints) -> Hashes:
    """The eight bytes from `begin` on as one little-endian number, those from `size` on as 0."""
    place = begin >> 3
    shift = ((begin & 7) << 3).astype(np.uint64)
    value = padded[place] >> shift | padded[place + 1] << np.uint64(1) << (np.uint64(63) - shift)
    missing = ((8 - np.minimum(size, 8)) << 3).astype(np.uint64)
    return value << missing >> missing
