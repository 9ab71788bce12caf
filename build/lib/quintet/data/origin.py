"""What the shards of a source were made from, so that a later look tells whether they would be made the same again.

The text itself decides, not when it was copied: the files' names, sizes and times only spare reading it again. Files that no local disk
holds are told by what their store says about them (an entity tag, or size and time), for reading them twice would be dear.

A source is made in parts of some files each. Where one part ends depends on the names and sizes of the files nearby alone, so a new file
changes the part that it falls into and no other.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from blake3 import blake3

from quintet.data import clean, contamination, language, minhash, rules
from quintet.data.digest import digest_of, hash_of
from quintet.data.shards import FORMAT
from quintet.data.sources import File, Listing
from quintet.spec.quality import Quality
from quintet.spec.run import Data, Source

PART_BYTES = 64 << 20
"""Stored text of a part, about."""
_LARGEST_PART = 4
_VERSION = 2
"""Raised when the same text would yield other shards."""


@dataclass(frozen=True, kw_only=True)
class PartOrigin:
    """Some files of a source, at one time."""

    files: str
    """Hash of every file's name, size and time."""
    text: str
    """Hash of every file's content."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """One source at one time."""

    spec: str
    """Hash of what the recipe says about it."""
    parts: tuple[PartOrigin, ...]
    """What it is made in."""
    others: str = ""
    """Hash of all sources, where what is kept of one depends on them."""

    @property
    def text(self) -> str:
        """Hash of every file's content."""
        return hash_of([part.text for part in self.parts])

    def is_same(self, other: Origin) -> bool:
        """Whether both yield the same documents."""
        return (self.spec, self.text, self.others) == (other.spec, other.text, other.others)


def parts_of(listing: Listing) -> list[tuple[File, ...]]:
    """The files in their order, in groups of about `PART_BYTES`."""
    parts: list[list[File]] = [[]]
    size = 0
    for file in listing.files:
        parts[-1].append(file)
        size += file.num_bytes
        draw = int.from_bytes(blake3(os.fsencode(os.path.basename(file.path))).digest(8), "big")
        if draw * PART_BYTES < file.num_bytes << 64 or size >= _LARGEST_PART * PART_BYTES:
            parts.append([])
            size = 0
    return [tuple(part) for part in parts if part]


def origin_of(data: Data, source: Source, listing: Listing, *, before: Origin | None, on_read: Callable[[int], None]) -> Origin:
    """The origin of a source as it is now; text is read only where files are not those of `before`, telling `on_read` each size."""
    known = {part.files: part.text for part in before.parts} if before else {}
    found = []
    for part in parts_of(listing):
        files = hash_of([(os.fsencode(f.path).hex(), f.kind, f.num_bytes, f.mtime_ns) for f in part])
        found.append(PartOrigin(files=files, text=known.get(files) or digest_of(part, on_read)))
    return Origin(spec=spec_of(data, source), parts=tuple(found))


def spec_of(data: Data, source: Source) -> str:
    """Hash of what the recipe says about a source, as far as it decides which documents there are, and which are held out."""
    dedup = repr(data.dedup) if data.dedup else ""
    return hash_of([shape_of(data, source), source.paths, data.held_out, dedup])


def shape_of(data: Data, source: Source) -> str:
    """Hash of what the recipe says about a source, as far as it shapes a part of it."""
    spec: list[object] = [_VERSION, FORMAT, source.text_key, data.max_document_bytes]
    if quality := data.quality:
        spec += [rules.VERSION, clean.VERSION, [_told(rule) for rule in _rules(quality, source)]]
        spec += [[edit.__name__ for edit in clean.edits_of(quality, source.domain)], contamination.digest(quality)]
    if dedup := data.dedup:
        spec += [minhash.VERSION, dedup.ngram, dedup.bands, dedup.rows]
    return hash_of(spec)


def provenance_of(data: Data, source: Source) -> dict[str, Any]:
    """What a source is made by, to be read by a person: its paths, and the versions and limits of all that judges it."""
    quality, dedup = data.quality, data.dedup
    versions = {"parts": _VERSION, "format": FORMAT, "rules": rules.VERSION, "clean": clean.VERSION, "minhash": minhash.VERSION}
    limits = {
        rule.name: [None if math.isinf(limit) else float(limit) for limit in (rule.low, rule.high)] for rule in _rules(quality, source)
    }
    return {
        "paths": source.paths,
        "text_key": source.text_key,
        "domain": source.domain,
        "versions": versions,
        "rules": limits,
        "edits": [edit.__name__ for edit in clean.edits_of(quality, source.domain)] if quality else [],
        "dedup": asdict(dedup) if dedup else None,
        "held_out": data.held_out,
    }


def _rules(quality: Quality | None, source: Source) -> list[rules.Rule | rules.TokenRule]:
    """All that a document of the source must pass."""
    if quality is None:
        return []
    found: list[rules.Rule | rules.TokenRule] = [*rules.rules_of(quality, source.domain), *rules.token_rules_of(quality, source.domain)]
    return [*found, *language.rules_of(quality, source.domain), *contamination.rules_of(quality)]


def _told(rule: rules.Rule | rules.TokenRule) -> list[object]:
    arguments = repr(sorted(rule.measure.keywords.items())) if isinstance(rule.measure, partial) else ""
    return [rule.name, repr(rule.low), repr(rule.high), arguments]
