"""Token shards: documents as one memory-mapped run of token ids, with an index, sizes and fingerprints, committed as a whole.

tokens.bin      ids of all documents, one after another: uint16 where the vocabulary fits, else uint32, little-endian
documents.bin   uint64[num_documents + 1]: where each document begins, in tokens
meta.json       `Meta`
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
import orjson
from blake3 import blake3
from numpy.typing import NDArray

from quintet.errors import DataError

FORMAT = 1
"""Version of the files; another one is prepared again."""
Tokens = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What meta.json says."""

    format: int
    """Version of the files."""
    dtype: str
    """uint16 or uint32."""
    num_documents: int
    """Documents."""
    num_tokens: int
    """Token ids, the end-of-document ones included."""
    num_bytes: int
    """UTF-8 bytes of the text behind them."""
    tokenizer: str
    """Fingerprint of the tokenizer that made the ids."""
    content: str
    """blake3 of tokens.bin followed by documents.bin, hexadecimal."""


def token_dtype(vocab_size: int) -> str:
    """The narrowest stored type for ids below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an error of the operating system while writing under `path` into a DataError with a remedy."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space there, raise the quota or limit," if full else "check that the folder may be written,"
        raise DataError(f"cannot write prepared data under {path}: {error.strerror}; {remedy} or set data.directory elsewhere; "
                        "nothing half-written was kept, run prepare again") from error  # fmt: skip


@contextmanager
def committed_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place, synced to disk, when the block ends well, and vanishes if not.

    An old `target` is replaced; if the process dies in between, `target` is either whole or absent.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with disk_errors(target.parent):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        yield temporary
        with disk_errors(target.parent):
            for folder, _, names in os.walk(temporary, topdown=False):
                for name in names:
                    _sync(Path(folder, name))
                _sync(Path(folder))
            if target.exists():
                target.rename(old := target.with_name(f".{target.name}.{os.getpid()}.old.tmp"))
                temporary.rename(target)
                shutil.rmtree(old)
            else:
                temporary.rename(target)
            _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_file(path: Path, content: bytes) -> None:
    """Write a small file so that it is old or new but never half; raises DataError if the disk refuses."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path.parent):
        try:
            temporary.write_bytes(content)
            _sync(temporary)
            temporary.rename(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ShardWriter:
    """Writes one shard into a folder that does not exist yet, inside `committed_folder`: `append` documents, then `finish`."""

    def __init__(self, directory: Path, *, dtype: str) -> None:
        self.directory = directory
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.num_documents = self.num_tokens = self.num_bytes = 0
        self._hash = blake3()
        self._lengths: list[NDArray[np.uint64]] = []
        with disk_errors(directory):
            directory.mkdir(parents=True)
            self._tokens: IO[bytes] = open(directory / "tokens.bin", "wb")  # noqa: SIM115 -- closed by `finish` or `__exit__`

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # After a full disk, closing fails once more.
            self._tokens.close()

    def append(self, documents: Sequence[Tokens], *, num_bytes: int) -> None:
        """Add documents (ids, end-of-document included) made of `num_bytes` bytes of text."""
        if documents:
            content = np.concatenate(documents).astype(self.dtype).tobytes()
            with disk_errors(self.directory):
                self._tokens.write(content)
            self._hash.update(content)
            self._lengths.append(np.fromiter((len(ids) for ids in documents), np.uint64, len(documents)))
            self.num_documents += len(documents)
            self.num_tokens += len(content) // self.dtype.itemsize
            self.num_bytes += num_bytes

    def finish(self, *, tokenizer: str) -> None:
        """Write the index and meta.json, naming the tokenizer's fingerprint."""
        index = np.cumsum(np.concatenate([np.zeros(1, np.uint64), *self._lengths]), dtype=np.uint64).astype("<u8").tobytes()
        self._hash.update(index)
        meta = Meta(
            format=FORMAT,
            dtype=self.dtype.name,
            num_documents=self.num_documents,
            num_tokens=self.num_tokens,
            num_bytes=self.num_bytes,
            tokenizer=tokenizer,
            content=self._hash.hexdigest(),
        )
        with disk_errors(self.directory):
            self._tokens.close()
            (self.directory / "documents.bin").write_bytes(index)
            (self.directory / "meta.json").write_bytes(orjson.dumps(asdict(meta), option=orjson.OPT_INDENT_2))


class Shard:
    """A shard opened for reading; the ids stay on disk until they are touched."""

    def __init__(self, directory: Path, *, tokenizer: str | None = None, verify: bool = False) -> None:
        """Open `directory`, checking sizes, that `tokenizer` (a fingerprint, if given) made it and, with `verify`, every byte.

        Raises DataError if something does not match.
        """
        self.directory = directory
        try:
            self.meta = msgspec.json.decode((directory / "meta.json").read_bytes(), type=Meta)
            sizes = {name: (directory / name).stat().st_size for name in ("tokens.bin", "documents.bin")}
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise self._damaged(f"is incomplete ({error})") from None
        meta = self.meta
        if meta.format != FORMAT:
            raise self._damaged(f"has format {meta.format}, this version reads {FORMAT}")
        if meta.dtype not in ("uint16", "uint32") or min(meta.num_documents, meta.num_tokens) < 0:
            raise self._damaged("has a meta.json that makes no sense")
        if tokenizer is not None and meta.tokenizer != tokenizer:
            raise DataError(
                f"the token shard {directory} was made by tokenizer {meta.tokenizer[:12]}, not by {tokenizer[:12]}, so its ids mean "
                "other tokens; run quintet prepare with this recipe again, or give back the tokenizer that it was prepared with"
            )
        dtype = np.dtype(meta.dtype).newbyteorder("<")
        for name, expected in (("tokens.bin", meta.num_tokens * dtype.itemsize), ("documents.bin", (meta.num_documents + 1) * 8)):
            if sizes[name] != expected:
                raise self._damaged(f"has a {name} of {sizes[name]} bytes instead of {expected}")
        self.tokens: Tokens = _map(directory / "tokens.bin", dtype)
        self.offsets: NDArray[np.uint64] = _map(directory / "documents.bin", np.dtype("<u8"))
        """Where each document begins, and the end: [num_documents + 1]."""
        if verify:
            content = blake3(max_threads=blake3.AUTO)
            for name in ("tokens.bin", "documents.bin"):
                content.update_mmap(directory / name)
            if content.hexdigest() != meta.content:
                raise self._damaged("does not match its fingerprint")

    def _damaged(self, what: str) -> DataError:
        return DataError(f"the token shard {self.directory} {what}; run quintet prepare with this recipe to make it anew")

    @property
    def num_documents(self) -> int:
        """Documents."""
        return self.meta.num_documents

    @property
    def num_tokens(self) -> int:
        """Token ids."""
        return self.meta.num_tokens

    def lengths(self, documents: NDArray[np.int64] | slice = slice(None)) -> NDArray[np.int64]:
        """Tokens of the given documents, end-of-document included."""
        return (self.offsets[1:][documents] - self.offsets[:-1][documents]).astype(np.int64)

    def document(self, index: int) -> Tokens:
        """The ids of one document: a view, not a copy."""
        return self.tokens[int(self.offsets[index]) : int(self.offsets[index + 1])]


def _map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    # A plain array over the map: slicing a np.memmap costs several times as much.
    return np.asarray(np.memmap(path, dtype, mode="r")) if path.stat().st_size else np.empty(0, dtype)
