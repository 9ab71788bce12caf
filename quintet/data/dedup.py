"""Which of all documents are kept when each cluster of duplicates keeps one.

Documents that share an exact fingerprint or a band (see `minhash`) are joined; a cluster is a connected component. Nothing depends on the
order in which parts were made.

Keys are divided by their own bits into files of about `GROUPED` each, which are sorted one by one. A first pass notes which documents share
any key; all else happens among those alone, so that memory is 2 bytes for each document, about 60 for each one that shares a key, and
what `GROUPED` keys take.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from quintet.data.shards import disk_errors
from quintet.data.texts import Hashes, Ints, mix
from quintet.spec.quality import Dedup

VERSION = 1
"""Raised when other documents would be kept of the same fingerprints."""
GROUPED = 1 << 20
"""Keys that are sorted at one time, about; more where there would be too many files."""
_MOST_FILES = 512
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
        return self._some(np.load(self.folder / "sizes.npy", mmap_mode="r"), slice(None))

    def exact(self, documents: slice = slice(None)) -> Hashes:
        """128 bits of each of the `documents`: [n, 2]."""
        return self._some(np.load(self.folder / "exact.npy", mmap_mode="r"), documents)

    def band(self, number: int, documents: slice = slice(None)) -> Hashes:
        """One band's keys of the `documents`: [n]."""
        return self._some(np.load(self.folder / "bands.npy", mmap_mode="r")[number], documents)

    def origin(self, document: int) -> str:
        """Where a document came from."""
        lines = zstandard.ZstdDecompressor().decompressobj().decompress((self.folder / "origins.zst").read_bytes()).decode().splitlines()
        return lines[document if self._chosen is None else int(self._chosen[document])]

    def _some(self, values: NDArray[Any], documents: slice) -> NDArray[Any]:
        return np.asarray(values[documents] if self._chosen is None else values[self._chosen[documents]])


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


def decide(
    dedup: Dedup, parts: Sequence[tuple[str, Fingerprints]], known: Sequence[Fingerprints] = (), *, scratch: Path | None = None
) -> Decision:
    """Keep one document of each cluster; none where one of the `known` parts' documents is in it.

    `parts` are pairs of a source's name and a part of it, in the recipe's order. Below `scratch` (absent: the system's folder for such
    files) 24 bytes are written for each document at one time, where there are many. Raises DataError if the disk refuses.
    """
    everything = [*known, *(part for _, part in parts)]
    first = np.cumsum([0, *map(len, everything)])
    sharing = _sharing(dedup, everything, first, scratch)
    narrowed = [part.narrowed(sharing[a:b]) for part, (a, b) in zip(everything, itertools.pairwise(first), strict=True)]
    names = [name for name, _ in parts]
    kept, duplicates = _decide(dedup, list(zip(names, narrowed[len(known) :], strict=True)), narrowed[: len(known)], scratch)
    whole = ~sharing
    whole[sharing] = kept
    return Decision(kept=tuple(whole[a:b] for a, b in itertools.pairwise(first[len(known) :])), duplicates=duplicates)


def _sharing(dedup: Dedup, everything: Sequence[Fingerprints], first: Ints, scratch: Path | None) -> NDArray[np.bool_]:
    """Whether each document shares a key with another: [total]."""
    found = np.zeros(int(first[-1]), bool)
    keys: list[int | str] = [*(["exact"] if dedup.exact else []), *(range(dedup.bands) if dedup.near else [])]
    for which in keys:
        for a, b in _equal(everything, first, which, scratch):
            found[a] = found[b] = True
    return found


def _decide(
    dedup: Dedup, parts: Sequence[tuple[str, Fingerprints]], known: Sequence[Fingerprints], scratch: Path | None
) -> tuple[NDArray[np.bool_], dict[str, Duplicates]]:
    """Which documents stay, of `known` and `parts` together, and what became of the others."""
    everything = [*known, *(part for _, part in parts)]
    first = np.cumsum([0, *map(len, everything)])
    num_known, total = int(first[len(known)]), int(first[-1])
    parent = np.arange(total)
    exact_parent = parent.copy()
    if dedup.exact:
        join(exact_parent, _equal(everything, first, "exact", scratch))
        parent = exact_parent.copy()
    if dedup.near:
        for band in range(dedup.bands):
            join(parent, _equal(everything, first, band, scratch))
    key = _preference(dedup, parts, everything, num_known)
    best = _best(parent, key)
    kept = best[parent] == np.arange(total)
    kept[:num_known] = False
    # The best of each exact component is dropped, if it is, for similarity; the others are exact duplicates of it.
    is_exact = _best(exact_parent, key)[exact_parent] != np.arange(total)
    return kept, _count(parts, everything, first, kept, is_exact, best[parent])


def _preference(dedup: Dedup, parts: Sequence[tuple[str, Fingerprints]], everything: Sequence[Fingerprints], num_known: int) -> Hashes:
    """The smaller, the rather a document is kept; of equal ones the first in reading order: [total]."""
    total = sum(map(len, everything))
    if dedup.prefer == "first":
        return np.zeros(total, np.uint64)
    number = {name: i for i, name in enumerate(dict.fromkeys(name for name, _ in parts), start=1)}
    keys = np.zeros(total, np.uint64)  # of what is known already
    begin = num_known
    for name, part in parts:
        shorter = np.uint64((1 << 32) - 1) - part.sizes
        keys[begin : begin + len(part)] = shorter + np.uint64(number[name] << 32 if dedup.prefer == "source" else 1 << 32)
        begin += len(part)
    return keys


def _best(parent: Ints, key: Hashes) -> Ints:
    """Root -> the document of its component that is kept: [total]."""
    least = np.full(len(key), np.iinfo(np.uint64).max)
    np.minimum.at(least, parent, key)
    candidates = np.flatnonzero(key == least[parent])
    best = np.full(len(key), len(key))
    np.minimum.at(best, parent[candidates], candidates)
    return best


def _equal(everything: Sequence[Fingerprints], first: Ints, which: int | str, scratch: Path | None) -> Iterator[tuple[Ints, Ints]]:
    """Pairs of documents with equal keys, enough to connect all that are equal."""
    for rows in _ranges(everything, first, which, scratch):
        rows = rows[np.argsort(rows[:, -2])]  # Of 128 bits the second half is enough to sort by; all are compared.
        same = (rows[1:, :-1] == rows[:-1, :-1]).all(axis=1)
        yield rows[1:, -1][same].astype(np.int64), rows[:-1, -1][same].astype(np.int64)


def _ranges(everything: Sequence[Fingerprints], first: Ints, which: int | str, scratch: Path | None) -> Iterator[Hashes]:
    """Keys and numbers of all documents in turns, equal keys in the same: [n, key and number]."""
    rows = (_numbered(part, which, int(begin)) for part, begin in zip(everything, first[:-1], strict=True))
    num_ranges = min(-(-int(first[-1]) // GROUPED), _MOST_FILES)
    if num_ranges <= 1:
        together = [block for blocks in rows for block in blocks]
        yield from [np.concatenate(together)] if together else []
        return
    with disk_errors(scratch or Path(tempfile.gettempdir())), tempfile.TemporaryDirectory(dir=scratch, prefix=".", suffix=".tmp") as folder:
        paths = [Path(folder, str(i)) for i in range(num_ranges)]
        with ExitStack() as open_files:
            files = [open_files.enter_context(open(path, "wb")) for path in paths]
            for block in itertools.chain.from_iterable(rows):
                ranges = block[:, -2] % np.uint64(num_ranges)
                order = np.argsort(ranges, kind="stable")
                bounds = np.searchsorted(ranges[order], np.arange(num_ranges + 1))
                for file, (a, b) in zip(files, itertools.pairwise(bounds.tolist()), strict=True):
                    file.write(np.ascontiguousarray(block[order[a:b]]).data)
        for path in paths:
            yield np.fromfile(path, np.uint64).reshape(-1, 3 if which == "exact" else 2)
            path.unlink()


def _numbered(part: Fingerprints, which: int | str, begin: int) -> Iterator[Hashes]:
    """A part's keys with the documents' numbers, which count from `begin`, at most `GROUPED` at a time: [n, key and number]."""
    for at in range(0, len(part), GROUPED):
        documents = slice(at, min(at + GROUPED, len(part)))
        keys = part.exact(documents) if which == "exact" else part.band(int(which), documents)[:, None]
        yield np.column_stack((keys, np.arange(begin + at, begin + documents.stop, dtype=np.uint64)))


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
    is_exact: NDArray[np.bool_],
    instead: Ints,
) -> dict[str, Duplicates]:
    """Per source, how many were dropped, and a sample of pairs; `instead` is what is kept of each document's cluster."""
    found: dict[str, Duplicates] = {}
    for name in dict.fromkeys(name for name, _ in parts):
        ranges = [np.arange(first[i], first[i + 1]) for i, part in enumerate(parts, start=len(everything) - len(parts)) if part[0] == name]
        mine = np.concatenate(ranges)
        dropped = mine[~kept[mine]]
        draw = dropped[np.argsort(mix(dropped.astype(np.uint64)))][:_SAMPLES].tolist()
        pairs = tuple(Pair(dropped=_origin(everything, first, i), kept=_origin(everything, first, int(instead[i]))) for i in draw)
        exact = int(is_exact[dropped].sum())
        found[name] = Duplicates(exact=exact, near=len(dropped) - exact, pairs=pairs)
    return found


def _origin(everything: Sequence[Fingerprints], first: Ints, document: int) -> str:
    part = int(np.searchsorted(first, document, side="right")) - 1
    return everything[part].origin(document - int(first[part]))
