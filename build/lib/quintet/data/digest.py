"""Hashes that tell whether values, or the content of files, are still the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import orjson
from blake3 import blake3

from quintet.data.sources import File, remote_digest


def hash_of(value: object) -> str:
    """blake3, hexadecimal, of plain values."""
    return blake3(orjson.dumps(value)).hexdigest()


def digest_of(files: Sequence[File], on_read: Callable[[int], None] = lambda size: None) -> str:
    """Hash of the content of `files`, in their order; `on_read` is told each file's size."""
    total = blake3()
    for file in files:
        total.update(file.kind.encode() + _digest(file))
        on_read(file.num_bytes)
    return total.hexdigest()


def _digest(file: File) -> bytes:
    if file.is_remote:
        return blake3(remote_digest(file).encode()).digest()
    content = blake3(max_threads=blake3.AUTO)
    try:
        content.update_mmap(file.path)
    except OSError:
        content.update(b"unreadable")  # it is skipped and counted when its turn comes
    return content.digest()
