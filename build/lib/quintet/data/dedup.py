"""Which of all documents are kept when each cluster of duplicates keeps one.

Documents that share an exact fingerprint or a band (see `minhash`) are joined; a cluster is a connected component. Nothing depends on the
order in which parts were made.

Keys are taken from the parts' files and sorted range by range. A first pass notes which documents share any key; all else happens among
those alone, so that memory is 2 bytes for each document, about 60 for each one that shares a key, and 110 for each of `GROUPED` keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from quintet.data.texts import Hashes, Ints, mix
from quintet.spec.quality import Dedup

VERSION = 1
"""Raised when other documents would be kept of the same fingerprints."""
GROUPED = 1 << 24
"""Keys that are sorted at one time, about."""
_SAMPLES = 5


class Fingerprints:
    """Those of one part, on disk."""

    def __init__(self, folder: Path, *, chosen: NDArray[np.int64] | None = None) -> None:
        """`chosen`: the documents that count; None: all."""
        self.folder = folder
        self._chosen = chosen

    def __len__(self) -> int:
        return len(np.load(self.folder / "sizes.npy", mmap_mode="r")) if self._chosen is None else len(self._chosen)

    def narrowed(self, wanted: NDArray[np.bool_]) -> Fingerprints:
        """Of these documents those that are `wanted`: [N]."""
        documents = np.flatnonzero(wanted)
        return Fingerprints(self.folder, chosen=documents if self._chosen is None else self._chosen[documents])

    @property
    def sizes(self) -> NDArray[np.uint32]:
        """UTF-8 bytes of each document: [N]."""
        return self._of("sizes.npy")

    def exact(self) -> Hashes:
        """128 bits per document: [N, 2]."""
        return self._of("exact.npy")

    def band(self, number: int) -> Hashes:
        """One band's keys: [N]."""
        keys = np.load(self.folder / "bands.npy", mmap_mode="r")[number]
        return np.asarray(keys if self._chosen is None else keys[self._chosen])

    def origin(self, document: int) -> str:
        """Where a document came from."""
        lines = zstandard.ZstdDecompressor().decompressobj().decompress((self.folder / "origins.zst").read_bytes()).decode().splitlines()
        return lines[document if self._chosen is None else int(self._chosen[document])]

    def _of(self, name: str) -> NDArray[Any]:
        values: NDArray[Any] = np.load(self.folder / name)
        return values if self._chosen is None else values[self._chosen]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A dropped document beside the one that was kept."""

    dropped: str
    """Where the dropped one came from."""
    kept: str
    """Where the kept one came from."""


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """What became of one source's documents."""

    exact: int
    """Dropped for an exact fingerprint that the kept one of the cluster, or one before it, has."""
    near: int
    """Dropped for similarity alone."""
    pairs: tuple[Pair, ...]
    """Some of them."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Which documents stay."""

    kept: tuple[NDArray[np.bool_], ...]
    """Per part: [N]."""
    duplicates: dict[str, Duplicates]
    """Per source."""


def decide(dedup: Dedup, parts: Sequence[tuple[str, Fingerprints]], known: Sequence[Fingerprints] = ()) -> Decision:
    """Keep one document of each cluster; none where one of the `known` parts' documents is in it.

    `parts` are pairs of a source's name and a part of it, in the recipe's order.
    """
    everything = [*known, *(part for _, part in parts)]
    first = np.cumsum([0, *map(len, everything)])
    sharing = _sharing(dedup, everything, first)
    narrowed = [part.narrowed(sharing[a:b]) for part, (a, b) in zip(everything, itertools.pairwise(first), strict=True)]
    names = [name for name, _ in parts]
    kept, duplicates = _decide(dedup, list(zip(names, narrowed[len(known) :], strict=True)), narrowed[: len(known)])
    whole = ~sharing
    whole[sharing] = kept
    return Decision(kept=tuple(whole[a:b] for a, b in itertools.pairwise(first[len(known) :])), duplicates=duplicates)


def _sharing(dedup: Dedup, everything: Sequence[Fingerprints], first: Ints) -> NDArray[np.bool_]:
    """Whether each document shares a key with another: [total]."""
    found = np.zeros(int(first[-1]), bool)
    keys: list[int | str] = [*(["exact"] if dedup.exact else []), *(range(dedup.bands) if dedup.near else [])]
    for which in keys:
        for a, b in _equal(everything, first, which):
            found[a] = found[b] = True
    return found


def _decide(
    dedup: Dedup, parts: Sequence[tuple[str, Fingerprints]], known: Sequence[Fingerprints]
) -> tuple[NDArray[np.bool_], dict[str, Duplicates]]:
    """Which documents stay, of `known` and `parts` together, and what became of the others."""
    everything = [*known, *(part for _, part in parts)]
    first = np.cumsum([0, *map(len, everything)])
    num_known, total = int(first[len(known)]), int(first[-1])
    parent = np.arange(total)
    exact_parent = parent.copy()
    if dedup.exact:
        join(exact_parent, _equal(everything, first, "exact"))
        parent = exact_parent.copy()
    if dedup.near:
        for band in range(dedup.bands):
            join(parent, _equal(everything, first, band))
    order = _preference(dedup, parts, everything, first, num_known)
    best = np.full(total, total)
    np.minimum.at(best, parent, order)  # A cluster's root -> the best place in the order of preference.
    kept = best[parent] == order
    kept[:num_known] = False
    return kept, _count(parts, everything, first, kept, parent, exact_parent, order, best)


def _preference(
    dedup: Dedup, parts: Sequence[tuple[str, Fingerprints]], everything: Sequence[Fingerprints], first: Ints, num_known: int
) -> Ints:
    """Document -> its place in the order of preference; smaller is kept: [total]."""
    total = int(first[-1])
    if dedup.prefer == "first":
        return np.arange(total)
    sizes = np.concatenate([np.empty(0, np.int64), *(part.sizes.astype(np.int64) for part in everything)])
    sizes[:num_known] = np.iinfo(np.int64).max
    sources = np.full(total, -1)
    if dedup.prefer == "source":
        number = {name: i for i, name in enumerate(dict.fromkeys(name for name, _ in parts))}
        begin = num_known
        for name, part in parts:
            sources[begin : begin + len(part)] = number[name]
            begin += len(part)
    place = np.empty(total, np.int64)
    place[np.lexsort((-sizes, sources))] = np.arange(total)  # Stable: of equal ones the first in reading order.
    return place


def _equal(everything: Sequence[Fingerprints], first: Ints, which: int | str) -> Iterator[tuple[Ints, Ints]]:
    """Pairs of documents with equal keys, enough to connect all that are equal."""
    num_ranges = max(1, -(-int(first[-1]) // GROUPED))
    for i in range(num_ranges):
        keys, documents = [], []
        for begin, part in zip(first[:-1].tolist(), everything, strict=True):
            # Of 128 bits the second half is enough to sort by; all are compared.
            found = part.exact() if which == "exact" else part.band(int(which))[:, None]
            chosen = np.flatnonzero(found[:, -1] % np.uint64(num_ranges) == i) if num_ranges > 1 else np.arange(len(found))
            keys.append(found[chosen])
            documents.append(begin + chosen)
        if keys:
            all_keys, all_documents = np.concatenate(keys), np.concatenate(documents)
            order = np.argsort(all_keys[:, -1])
            same = (all_keys[order[1:]] == all_keys[order[:-1]]).all(axis=1)
            yield all_documents[order[1:]][same], all_documents[order[:-1]][same]


def join(parent: Ints, pairs: Iterator[tuple[Ints, Ints]]) -> None:
    """Join the components of each pair; afterwards `parent` names the smallest member of each one's component, in place."""
    for a, b in pairs:
        while len(a):
            a, b = parent[a], parent[b]
            apart = a != b
            a, b = a[apart], b[apart]
            np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
            _shorten(parent)


def _shorten(parent: Ints) -> None:
    """Point everyone at the root of its tree."""
    while True:
        above = parent[parent]
        if np.array_equal(above, parent):
            return
        parent[:] = above


def _count(
    parts: Sequence[tuple[str, Fingerprints]],
    everything: Sequence[Fingerprints],
    first: Ints,
    kept: NDArray[np.bool_],
    parent: Ints,
    exact_parent: Ints,
    order: Ints,
    best: Ints,
) -> dict[str, Duplicates]:
    """Per source, how many were dropped, and a sample of pairs."""
    at_place = np.empty(len(order), np.int64)
    at_place[order] = np.arange(len(order))
    # The best of each exact component is dropped, if it is, for similarity; the others are exact duplicates of it.
    exact_best = np.full(len(order), len(order))
    np.minimum.at(exact_best, exact_parent, order)
    is_exact = exact_best[exact_parent] != order
    found: dict[str, Duplicates] = {}
    for name in dict.fromkeys(name for name, _ in parts):
        ranges = [np.arange(first[i], first[i + 1]) for i, part in enumerate(parts, start=len(everything) - len(parts)) if part[0] == name]
        mine = np.concatenate(ranges)
        dropped = mine[~kept[mine]]
        draw = dropped[np.argsort(mix(dropped.astype(np.uint64)))][:_SAMPLES].tolist()
        pairs = tuple(
            Pair(dropped=_origin(everything, first, i), kept=_origin(everything, first, int(at_place[best[parent[i]]]))) for i in draw
        )
        exact = int(is_exact[dropped].sum())
        found[name] = Duplicates(exact=exact, near=len(dropped) - exact, pairs=pairs)
    return found


def _origin(everything: Sequence[Fingerprints], first: Ints, document: int) -> str:
    part = int(np.searchsorted(first, document, side="right")) - 1
    return everything[part].origin(document - int(first[part]))
