"""How much of a document repeats what came before in it: lines, paragraphs and n-grams of words (Gopher, arXiv 2112.11446, A.1.1).

A share counts characters without white space. Of an n-gram that occurs again every later occurrence counts, overlaps once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from quintet.data.texts import Hashes, Ints, Spans, Texts, Values, mix, ratio

TOP = (2, 3, 4)
"""Lengths of n-grams of which the most frequent one counts."""
DUPLICATE = (5, 6, 7, 8, 9, 10)
"""Lengths of n-grams of which every repeated one counts."""


class _Runs(NamedTuple):
    """Equal n-grams of one document, brought together."""

    place: Ints
    """Word at which each n-gram begins, equal ones one after another: [K]."""
    begin: Ints
    """Where each run begins in `place`: [R]."""
    size: Ints
    """Length of each run: [R]."""


def duplicate_share(texts: Texts, spans: Spans) -> Values:
    """Share of the spans (lines, paragraphs) that came before in their document: [N]."""
    return ratio(texts.sums(_came_before(texts, spans), spans), spans.counts)


def duplicate_chars(texts: Texts, spans: Spans) -> Values:
    """Share of the spans' characters in spans that came before: [N]."""
    chars = texts.num_chars(spans.begin, spans.end)
    return ratio(texts.sums(chars * _came_before(texts, spans), spans), texts.sums(chars, spans))


def top_ngram_share(texts: Texts, n: int) -> Values:
    """Share of characters in the most frequent n-gram of words.

    n is one of `TOP` -> [N], 0 where no n-gram occurs twice.
    """
    covered = np.zeros(len(texts), np.int64)
    for length, runs in _repeated(texts, TOP):
        if length == n:
            place = runs.place[runs.begin]
            total = np.concatenate([[0], np.cumsum(texts.word_chars)])
            chars = (total[place + n] - total[place]) * runs.size
            best = runs.size << 40 | np.minimum(chars, (1 << 40) - 1)
            np.maximum.at(covered, texts.words.owner[place], best)
            break
    return ratio(covered & (1 << 40) - 1, _all_chars(texts))


def duplicate_ngram_share(texts: Texts, n: int) -> Values:
    """Share of characters in n-grams of words that came before.

    n is one of `DUPLICATE` -> [N].
    """
    change = np.zeros(len(texts.word_hashes) + 1, np.int64)
    for length, runs in _repeated(texts, DUPLICATE):
        if length == n:
            first = np.minimum.reduceat(runs.place, runs.begin) if len(runs.begin) else runs.place
            later = runs.place[runs.place != np.repeat(first, runs.size)]
            np.add.at(change, later, 1)
            np.add.at(change, later + n, -1)
            break
    covered = np.cumsum(change[:-1]) > 0
    return ratio(texts.sums(texts.word_chars * covered, texts.words), _all_chars(texts))


def _all_chars(texts: Texts) -> Ints:
    return texts.sums(texts.word_chars, texts.words)


def _came_before(texts: Texts, spans: Spans) -> Ints:
    """1 for each span whose words stand in an earlier one of the document: [K]."""
    keys = texts.span_hashes(spans) ^ mix(spans.owner.astype(np.uint64))
    order = np.argsort(keys, kind="stable")
    before = np.zeros(len(keys), np.int64)
    before[order[1:]] = keys[order[1:]] == keys[order[:-1]]
    return before


def _repeated(texts: Texts, lengths: tuple[int, ...]) -> Iterator[tuple[int, _Runs]]:
    """For each of the rising `lengths` the n-grams that occur twice or more; a longer one can only begin where a shorter one does."""
    cache: dict[int, _Runs] = texts.__dict__.setdefault("repeated ngrams", {})
    place: Ints | None = None
    for n in lengths:
        if n not in cache:
            cache[n] = _runs(texts, n, place)
        place = np.sort(cache[n].place)
        yield n, cache[n]


def _runs(texts: Texts, n: int, place: Ints | None) -> _Runs:
    hashes, words = texts.word_hashes, texts.words
    if place is None:
        place = np.arange(max(len(hashes) - n + 1, 0))
    place = place[place + n <= words.behind[place]]
    keys = mix(words.owner[place].astype(np.uint64))
    for i in range(n):
        keys = (keys << np.uint64(7) | keys >> np.uint64(57)) * np.uint64(0x9E3779B97F4A7C15) + hashes[place + i]
    order = np.argsort(keys)
    place, keys = place[order], keys[order]
    return _equal_runs(place, keys)


def _equal_runs(place: Ints, keys: Hashes) -> _Runs:
    """Of sorted keys those that occur more than once."""
    if not len(keys):
        return _Runs(place, place, place)
    edges = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1], [True]]))
    count = np.diff(edges)
    several = count > 1
    kept = count[several]
    return _Runs(place[np.repeat(several, count)], np.cumsum(kept) - kept, kept)
