"""Token shards: documents as memory-mapped runs of token ids, with an index, sizes and fingerprints, committed as a whole.

A shard is a folder that never changes:
    tokens.bin      ids of all documents, one after another: uint16 where the vocabulary fits, else uint32, little-endian
    documents.bin   uint64[num_documents + 1]: where each document begins, in tokens
    meta.json       `Meta`

A selection is a folder that says which documents of which shards are read, in which order, without a copy of them:
    begins.bin      uint64[num_documents]: where each document begins, in the tokens of all its shards one after another
    lengths.bin     uint32[num_documents]: its tokens
    meta.json       `SelectionMeta`
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

import msgspec
import numpy as np
import orjson
from blake3 import blake3
from numpy.typing import NDArray

from quintet.errors import DataError

FORMAT = 2
"""Version of the files; another one is prepared again."""
T = TypeVar("T")
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


class DiskFull(DataError):
    """There is no room for what is to be written."""


def free_again(path: Path, wanted: int, *, sleep: Callable[[float], None] = time.sleep) -> None:
    """Wait until there are `wanted` free bytes at `path`."""
    while shutil.disk_usage(path).free < wanted:
        sleep(5.0)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an error of the operating system while writing under `path` into a DataError with a remedy."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space there, raise the quota or limit," if full else "check that the folder may be written,"
        kind = DiskFull if error.errno == errno.ENOSPC else DataError
        raise kind(f"cannot write prepared data under {path}: {error.strerror}; {remedy} or set data.directory elsewhere; "
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
    """Writes one shard into a new folder, inside `committed_folder`: `append` documents, then `finish`."""

    def __init__(self, directory: Path, *, dtype: str) -> None:
        self.directory = directory
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.num_documents = self.num_tokens = self.num_bytes = 0
        self._hash = blake3()
        self._lengths: list[NDArray[np.uint64]] = []
        with disk_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            self._tokens: IO[bytes] = open(directory / "tokens.bin", "wb")  # noqa: SIM115 -- closed by `finish` or `__exit__`

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # After a full disk, closing fails once more.
            self._tokens.close()

    def append(self, documents: Sequence[Tokens], *, num_bytes: int, end: int | None = None) -> Tokens:
        """Add documents made of `num_bytes` bytes of text, with the id `end` behind each, if it is given; returns what was written."""
        runs: Sequence[Tokens] = documents
        lengths = np.fromiter((len(ids) for ids in documents), np.uint64, len(documents))
        if end is not None:
            behind = np.array([end], self.dtype)
            runs = [run for ids in documents for run in (ids, behind)]
            lengths += np.uint64(1)
        content = np.empty(int(lengths.sum()), self.dtype)
        if runs:
            np.concatenate(runs, out=content, casting="same_kind")
            stored = content.view(np.uint8).data
            with disk_errors(self.directory):
                self._tokens.write(stored)
            self._hash.update(stored)
            self._lengths.append(lengths)
            self.num_documents += len(documents)
            self.num_tokens += len(content)
            self.num_bytes += num_bytes
        return content

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


class Documents(Protocol):
    """Documents in a fixed order, of which each can be reached."""

    @property
    def num_documents(self) -> int:
        """Documents."""

    def lengths(self, documents: NDArray[np.int64] | slice = slice(None)) -> NDArray[np.int64]:
        """Tokens of the given documents, end-of-document included."""

    def document(self, index: int) -> Tokens:
        """The ids of one document: a view, not a copy."""

    @property
    def runs(self) -> Sequence[Tokens]:
        """The ids of many documents, one after another, in one run or more."""

    def places(self, documents: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The run that each document lies in, and its first token there."""


class Shard:
    """A shard opened for reading; the ids stay on disk until they are touched."""

    def __init__(self, directory: Path, *, tokenizer: str | None = None, verify: bool = False) -> None:
        """Open `directory`, checking sizes, that `tokenizer` (a fingerprint, if given) made it and, with `verify`, every byte.

        Raises DataError if something does not match.
        """
        self.directory = directory
        self.meta = meta = _read_meta(directory, Meta, tokenizer=tokenizer)
        dtype = np.dtype(meta.dtype).newbyteorder("<")
        sizes = {"tokens.bin": meta.num_tokens * dtype.itemsize, "documents.bin": (meta.num_documents + 1) * 8}
        _check_files(directory, sizes, content=meta.content if verify else None)
        self.tokens: Tokens = _map(directory / "tokens.bin", dtype)
        self.offsets: NDArray[np.uint64] = _map(directory / "documents.bin", np.dtype("<u8"))
        """Where each document begins, and the end: [num_documents + 1]."""

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

    @property
    def runs(self) -> Sequence[Tokens]:
        """All ids, as one run."""
        return (self.tokens,)

    def places(self, documents: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The run that each document lies in, and its first token there."""
        return np.zeros(len(documents), np.int64), self.offsets[:-1][documents].astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class SelectionMeta:
    """What a selection's meta.json says."""

    format: int
    """Version of the files."""
    shards: tuple[str, ...]
    """Folders of its shards, relative to the folder that the selection's own lies in."""
    contents: tuple[str, ...]
    """The shards' fingerprints."""
    num_documents: int
    """Documents that are selected."""
    num_tokens: int
    """Their token ids."""
    num_bytes: int
    """UTF-8 bytes of the text behind them."""
    tokenizer: str
    """Fingerprint of the tokenizer that made the ids."""
    index: str
    """blake3 of begins.bin followed by lengths.bin, hexadecimal."""

    @property
    def content(self) -> str:
        """Fingerprint of the selected documents and their order."""
        return blake3(orjson.dumps([self.contents, self.index])).hexdigest()


def write_selection(
    directory: Path, shards: Sequence[Shard], selected: Sequence[NDArray[np.int64]], *, root: Path, num_bytes: int, tokenizer: str
) -> None:
    """Write into the new folder `directory` which documents of each of the `shards` are read.

    `root` is the folder whose names the shards keep when all of it moves. Raises DataError if the disk refuses.
    """
    starts = np.cumsum([0, *(shard.num_tokens for shard in shards)])
    begins = [start + shard.offsets[:-1][chosen] for start, shard, chosen in zip(starts[:-1], shards, selected, strict=True)]
    lengths = [shard.lengths(chosen) for shard, chosen in zip(shards, selected, strict=True)]
    files = {
        "begins.bin": np.concatenate([np.empty(0, "<u8"), *begins]).astype("<u8").tobytes(),
        "lengths.bin": np.concatenate([np.empty(0, "<u4"), *lengths]).astype("<u4").tobytes(),
    }
    meta = SelectionMeta(
        format=FORMAT,
        shards=tuple(str(shard.directory.relative_to(root)) for shard in shards),
        contents=tuple(shard.meta.content for shard in shards),
        num_documents=sum(map(len, selected)),
        num_tokens=int(sum(int(part.sum()) for part in lengths)),
        num_bytes=num_bytes,
        tokenizer=tokenizer,
        index=blake3(files["begins.bin"] + files["lengths.bin"]).hexdigest(),
    )
    with disk_errors(directory):
        directory.mkdir(parents=True)
        for name, content in files.items():
            (directory / name).write_bytes(content)
        (directory / "meta.json").write_bytes(orjson.dumps(asdict(meta), option=orjson.OPT_INDENT_2))


class Selection:
    """Chosen documents of several shards, opened for reading."""

    def __init__(self, directory: Path, *, root: Path, tokenizer: str | None = None, verify: bool = False) -> None:
        """Open `directory`, whose shards are named relative to `root`; checks and raises as `Shard`, for the shards too."""
        self.directory = directory
        self.meta = meta = _read_meta(directory, SelectionMeta, tokenizer=tokenizer)
        _check_files(
            directory,
            {"begins.bin": meta.num_documents * 8, "lengths.bin": meta.num_documents * 4},
            content=meta.index if verify else None,
        )
        self._shards = shards = [Shard(root / name, tokenizer=tokenizer, verify=verify) for name in meta.shards]
        if [shard.meta.content for shard in shards] != list(meta.contents):
            raise _damaged(directory, "names shards that are no longer the same")
        self._runs = [shard.tokens for shard in shards]
        self._starts = np.cumsum([0, *(shard.num_tokens for shard in shards)])
        self._begins: NDArray[np.uint64] = _map(directory / "begins.bin", np.dtype("<u8"))
        self._lengths: NDArray[np.uint32] = _map(directory / "lengths.bin", np.dtype("<u4"))

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
        return self._lengths[documents].astype(np.int64)

    def document(self, index: int) -> Tokens:
        """The ids of one document: a view, not a copy."""
        (run,), (begin,) = self.places(np.array([index]))
        return self._runs[run][begin : begin + int(self._lengths[index])]

    @property
    def runs(self) -> Sequence[Tokens]:
        """The ids of each shard."""
        return self._runs

    def places(self, documents: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The run that each document lies in, and its first token there."""
        begins = self._begins[documents].astype(np.int64)
        runs = np.searchsorted(self._starts, begins, side="right") - 1
        return runs, begins - self._starts[runs]

    def chosen(self, name: str) -> NDArray[np.int64]:
        """The documents of the shard `name` that are selected."""
        i = self.meta.shards.index(name)
        begins = np.asarray(self._begins)
        mine = begins[(begins >= self._starts[i]) & (begins < self._starts[i + 1])] - np.uint64(self._starts[i])
        return np.searchsorted(self._shards[i].offsets[:-1], mine).astype(np.int64)


class Chosen:
    """Some documents of others, in their order."""

    def __init__(self, documents: Documents, chosen: NDArray[np.int64]) -> None:
        """`chosen`: their numbers, ascending: [N]."""
        self._documents = documents
        self._chosen = chosen

    @property
    def num_documents(self) -> int:
        """Documents."""
        return len(self._chosen)

    def lengths(self, documents: NDArray[np.int64] | slice = slice(None)) -> NDArray[np.int64]:
        """Tokens of the given documents, end-of-document included."""
        return self._documents.lengths(self._chosen[documents])

    def document(self, index: int) -> Tokens:
        """The ids of one document: a view, not a copy."""
        return self._documents.document(int(self._chosen[index]))

    @property
    def runs(self) -> Sequence[Tokens]:
        """The ids of all documents, these and others."""
        return self._documents.runs

    def places(self, documents: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The run that each document lies in, and its first token there."""
        return self._documents.places(self._chosen[documents])


def _read_meta(directory: Path, kind: type[T], *, tokenizer: str | None) -> T:
    """meta.json, of this format, made by `tokenizer`."""
    try:
        content = (directory / "meta.json").read_bytes()
        found = msgspec.json.decode(content).get("format")
        if found != FORMAT:
            raise _damaged(directory, f"has format {found}, this version reads {FORMAT}")
        meta: Any = msgspec.json.decode(content, type=kind)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, AttributeError) as error:
        raise _damaged(directory, f"is incomplete ({error})") from None
    if getattr(meta, "dtype", "uint16") not in ("uint16", "uint32") or min(meta.num_documents, meta.num_tokens) < 0:
        raise _damaged(directory, "has a meta.json that makes no sense")
    if tokenizer is not None and meta.tokenizer != tokenizer:
        raise DataError(
            f"the token shard {directory} was made by tokenizer {meta.tokenizer[:12]}, not by {tokenizer[:12]}, so its ids mean "
            "other tokens; run quintet prepare with this recipe again, or give back the tokenizer that it was prepared with"
        )
    return meta


def _check_files(directory: Path, sizes: Mapping[str, int], *, content: str | None) -> None:
    """Refuse files of other sizes or, where `content` is the fingerprint of all of them in order, of other bytes."""
    for name, expected in sizes.items():
        try:
            found = (directory / name).stat().st_size
        except OSError as error:
            raise _damaged(directory, f"is incomplete ({error})") from None
        if found != expected:
            raise _damaged(directory, f"has a {name} of {found} bytes instead of {expected}")
    if content is not None:
        total = blake3(max_threads=blake3.AUTO)
        for name in sizes:
            total.update_mmap(directory / name)
        if total.hexdigest() != content:
            raise _damaged(directory, "does not match its fingerprint")


def _damaged(directory: Path, what: str) -> DataError:
    return DataError(f"the token shard {directory} {what}; run quintet prepare with this recipe to make it anew")


def _map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    # A plain array over the map: slicing a np.memmap costs several times as much.
    return np.asarray(np.memmap(path, dtype, mode="r")) if path.stat().st_size else np.empty(0, dtype)
