"""What the shards of a source were made from, so that a later look tells whether they would be made the same again.

The text itself decides, not when it was copied: the files' names, sizes and times only spare reading it again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import orjson
from blake3 import blake3

from quintet.data.shards import FORMAT
from quintet.data.sources import Listing
from quintet.spec.run import Data, Source

_VERSION = 1
"""Raised when the same text would yield other shards."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """One source at one time."""

    spec: str
    """Hash of what the recipe says about it."""
    files: str
    """Hash of every file's name, size and time."""
    text: str
    """Hash of every file's content."""

    def is_same(self, other: Origin) -> bool:
        """Whether both yield the same documents."""
        return (self.spec, self.text) == (other.spec, other.text)


def origin_of(data: Data, source: Source, listing: Listing, *, before: Origin | None, on_read: Callable[[int], None]) -> Origin:
    """The origin of a source as it is now; its text is read only where the files are not those of `before`, telling `on_read` each size."""
    files = hash_of([(os.fsencode(f.path).hex(), f.kind, f.num_bytes, f.mtime_ns) for f in listing.files])
    text = before.text if before and before.files == files else _hash_of_text(listing, on_read)
    return Origin(spec=spec_of(data, source), files=files, text=text)


def spec_of(data: Data, source: Source) -> str:
    """Hash of what the recipe says about a source, as far as it shapes the documents."""
    return hash_of([_VERSION, FORMAT, source.paths, source.text_key, data.held_out, data.max_document_bytes])


def hash_of(value: object) -> str:
    """blake3, hexadecimal, of plain values."""
    return blake3(orjson.dumps(value)).hexdigest()


def _hash_of_text(listing: Listing, on_read: Callable[[int], None]) -> str:
    total = blake3()
    for file in listing.files:
        content = blake3(max_threads=blake3.AUTO)
        try:
            content.update_mmap(file.path)
        except OSError:
            content.update(b"unreadable")  # it is skipped and counted when its turn comes
        total.update(file.kind.encode() + content.digest())
        on_read(file.num_bytes)
    return total.hexdigest()
