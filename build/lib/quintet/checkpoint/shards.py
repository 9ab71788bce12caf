"""A directory of safetensors files as Hugging Face lays it out: `model-00001-of-00003.safetensors`, ..., and the index that names them.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and byte range of each tensor), and
the tensors' bytes. It is written here tensor by tensor, so that memory holds one tensor and not one file; it is read by the safetensors
library, which validates it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from quintet.checkpoint.durable import FileWriter, write_file
from quintet.checkpoint.hub_stored import INDEX, SINGLE, index
from quintet.checkpoint.store import bytes_of
from quintet.errors import CheckpointError

_DTYPE_NAME = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {name: dtype for dtype, name in _DTYPE_NAME.items()}
"""The usual kinds by the format's names."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor to write."""

    name: str
    """Name in the file."""
    shape: tuple[int, ...]
    """Shape in the file."""
    dtype: torch.dtype
    """float32, bfloat16 or float16."""

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(directory: Path, entries: Sequence[Entry], tensor: Callable[[str], torch.Tensor], *, max_shard_bytes: int) -> None:
    """Write files of at most `max_shard_bytes` (or one larger tensor) and their index.

    tensor: gives the tensor of an entry's name, in the entry's shape; asked once for each entry, in order. Raises OSError.
    """
    shards = list(_split(entries, max_shard_bytes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        path = directory / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update((entry.name, path.name) for entry in shard)
        _write_file(path, shard, tensor)
    listing = {"metadata": {"total_size": sum(entry.num_bytes for entry in entries)}, "weight_map": weight_map}
    write_file(directory / INDEX, json.dumps(listing, indent=2).encode())


def _split(entries: Sequence[Entry], max_shard_bytes: int) -> Iterator[list[Entry]]:
    shard: list[Entry] = []
    size = 0
    for entry in entries:
        if shard and size + entry.num_bytes > max_shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += entry.num_bytes
    yield shard


def _write_file(path: Path, shard: Sequence[Entry], tensor: Callable[[str], torch.Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in shard:
        begin, end = end, end + entry.num_bytes
        header[entry.name] = {"dtype": _DTYPE_NAME[entry.dtype], "shape": entry.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with FileWriter(path) as writer:
        writer.write(len(text).to_bytes(8, "little") + text)
        for entry in shard:
            value = tensor(entry.name)
            assert tuple(value.shape) == entry.shape
            writer.write(bytes_of(value.to(entry.dtype)))


class Catalog:
    """Every tensor of a directory of safetensors files, read when asked for."""

    def __init__(self, directory: Path) -> None:
        """Read the index and the files' headers; raises CheckpointError if one is missing, damaged, or names a file elsewhere."""
        self._open: dict[str, Any] = {}
        self._file: dict[str, str] = {}
        self._shape: dict[str, tuple[int, ...]] = {}
        self._dtype: dict[str, torch.dtype] = {}
        listed = index(directory)
        for file in sorted(set(listed.values()) if listed else {SINGLE}):
            self._add(directory, file)
        for name, file in listed.items():
            if self._file.get(name) != file:
                raise CheckpointError(f"{directory / INDEX} says that {file} holds {name!r}, but it does not")

    def _add(self, directory: Path, file: str) -> None:
        try:
            opened: Any = safe_open(directory / file, framework="pt")
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            shapes = {name: tuple(piece.get_shape()) for name, piece in slices.items()}
            dtypes = {name: DTYPES[piece.get_dtype()] for name, piece in slices.items() if piece.get_dtype() in DTYPES}
        except FileNotFoundError:
            raise CheckpointError(f"{directory} has no {file}; an import needs {SINGLE}, or {INDEX} and every file that it names") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{directory / file} is not a readable safetensors file: {error}; fetch it again") from None
        for name in shapes:
            if name in self._file:
                raise CheckpointError(f"{directory}: {name!r} is in {self._file[name]} and in {file}")
            self._file[name] = file
        self._shape |= shapes
        self._dtype |= dtypes
        self._open[file] = opened

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by name."""
        return self._shape

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype, without reading it where its kind is a usual one."""
        return self._dtype[name] if name in self._dtype else self.read(name).dtype

    def read(self, name: str) -> torch.Tensor:
        """A tensor."""
        tensor: torch.Tensor = self._open[self._file[name]].get_tensor(name)
        return tensor
