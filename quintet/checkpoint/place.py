"""Where checkpoints lie: in a folder of the file system (a Path), or in one of an object store, or of whatever fsspec reaches (a Remote).

An object store has no folders, no renaming and no half-written files: an object is there whole, once its upload ends, or it is not there.
Requests fail now and then, so each is made again a few times, after waits that double, unless the answer is one that stays the same.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import re
import stat
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import fsspec
from blake3 import blake3

from quintet.checkpoint.durable import hash_file, open_regular, write_file
from quintet.checkpoint.manifest import File
from quintet.errors import CheckpointError, QuintetError, UsageError, remedy_to_reach

T = TypeVar("T")
_LOG = logging.getLogger(__name__)

PART = 32 << 20
"""Bytes of one part of an upload."""
FILE = 256 << 20
"""Bytes of elements, at most, in one data file of a store."""
AT_ONCE = 8
"""Requests to a store, or uploads, that one rank has under way."""
ATTEMPT = re.compile(r"(data-\d+)-[0-9a-f]{8}(\.bin)")
"""How the names of data files in a store look: with a token of the attempt to save that made them."""
_TRIES = 6
_FIRST_WAIT = 0.5
"""Seconds before the second try; they double, and vary, so that ranks do not come back all at once."""
_CODES = {
    FileNotFoundError: errno.ENOENT,
    FileExistsError: errno.EEXIST,
    PermissionError: errno.EACCES,
    IsADirectoryError: errno.EISDIR,
    NotADirectoryError: errno.ENOTDIR,
}
_FINAL = (*_CODES, QuintetError, ImportError, ValueError, TypeError)
"""Answers that another try does not change."""


@dataclass(frozen=True)
class Remote:
    """A folder or an object by its URL, such as `s3://bucket/runs/first`. What its methods are refused they raise as OSError."""

    url: str

    def __post_init__(self) -> None:
        scheme, separator, rest = self.url.partition("://")
        if not separator or not rest.strip("/"):
            raise UsageError(f"{self.url!r} names no folder; write PROTOCOL://BUCKET/FOLDER, such as s3://bucket/checkpoints")
        object.__setattr__(self, "url", f"{scheme}://{rest.rstrip('/')}")

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """What stands behind the last slash."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> Remote:
        """The folder that it is in."""
        return Remote(self.url.rpartition("/")[0])

    def with_name(self, name: str) -> Remote:
        """Another one beside it."""
        return self.parent / name

    def system(self) -> tuple[Any, str]:
        """fsspec's file system, of this process, and the path in it. Raises UsageError for a protocol that cannot be used."""
        try:
            system, path = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:
            raise UsageError(f"{self.url} needs a package that is missing ({error}); {remedy_to_reach(self.url)}") from None
        except ValueError as error:
            raise UsageError(f"{self.url}: {error}; use a protocol that fsspec knows, such as s3, gs, abfs or sftp") from None
        return system, str(path)

    def read(self) -> bytes:
        """A whole object."""
        return self._steady(lambda system, path: bytes(system.cat_file(path)))

    def read_range(self, offset: int, length: int) -> bytes:
        """So many bytes of an object, fewer only behind its end."""
        return self._steady(lambda system, path: bytes(system.cat_file(path, start=offset, end=offset + length)))

    def entries(self) -> dict[str, int | None]:
        """What is in a folder: the size of each object, None for a folder; nothing where there is no folder."""

        def listed(system: Any, path: str) -> dict[str, int | None]:
            system.invalidate_cache()
            found = {str(info["name"]).rstrip("/").rpartition("/")[2]: info for info in system.ls(path, detail=True)}
            return {name: size_of(system, info) if info["type"] == "file" else None for name, info in found.items() if name}

        def size_of(system: Any, info: Mapping[str, Any]) -> int:
            return int(system.size(info["name"]) if info["size"] is None else info["size"])

        try:
            return self._steady(listed)
        except FileNotFoundError:
            return {}

    def write(self, data: bytes) -> None:
        """Make an object, or put another in its place."""
        self._steady(lambda system, path: system.pipe_file(path, data))

    def create(self, data: bytes) -> None:
        """Make an object. Raises FileExistsError if there is one with other content, where the store can tell at once."""
        try:
            self._steady(lambda system, path: system.pipe_file(path, data, mode="create"))
        except OSError as error:  # not every store says it by FileExistsError
            if self.name not in self.parent.entries():
                raise
            there = self.read()
            if not data.startswith(there):  # else an earlier try of ours, whose answer was lost
                raise FileExistsError(errno.EEXIST, "is there already", self.url) from error
            if there != data:  # or that was cut off, where objects grow
                self.write(data)

    def make_folder(self) -> None:
        """Let there be such a folder, where the store has folders; a bucket is not made."""

        def make(system: Any, path: str) -> None:
            with suppress(FileExistsError):
                system.mkdir(path, create_parents=False)

        if "/" in self.system()[1].strip("/"):
            try:
                self._steady(make)
            except FileNotFoundError:
                self.parent.make_folder()
                self._steady(make)

    def remove_folder(self) -> None:
        """Remove an empty folder, where the store has folders."""
        with suppress(OSError):
            self._steady(lambda system, path: system.rmdir(path))

    def remove(self) -> None:
        """Remove an object, if it is there."""
        try:
            self._steady(lambda system, path: system.rm_file(path))
        except FileNotFoundError:
            return

    def move_to(self, other: Remote) -> None:
        """Give an object another name: most stores copy it."""
        try:
            self._steady(lambda system, path: system.cp_file(path, other.system()[1]))
            self.remove()
        except OSError as error:
            if error.errno != errno.ENOTSUP:
                raise
            self._steady(lambda system, path: system.mv(path, other.system()[1]))

    def upload(self, write: Callable[[RemoteWriter], T]) -> T:
        """Make an object of what `write` writes; where the store refuses for good but not for ever, `write` is called again."""

        def attempt(system: Any, path: str) -> T:
            with RemoteWriter(self, system.open(path, "wb", block_size=PART)) as writer:
                return write(writer)

        return self._steady(attempt)

    def _steady(self, work: Callable[[Any, str], T]) -> T:
        for left in reversed(range(_TRIES)):
            try:
                return work(*self.system())
            except _FINAL as error:
                if isinstance(error, OSError):
                    code = error.errno or _CODES[next(kind for kind in _CODES if isinstance(error, kind))]
                    raise OSError(code, error.strerror or str(error) or os.strerror(code), self.url) from error
                raise
            except NotImplementedError as error:
                raise OSError(errno.ENOTSUP, f"what serves such URLs cannot do that {error}".rstrip(), self.url) from error
            except Exception as error:  # every store has errors of its own
                tried, reason = _TRIES - left, str(error) or type(error).__name__
                if not left or _stays(error):
                    raise OSError(errno.EREMOTEIO, f"{reason} ({tried} {'tries' if tried > 1 else 'try'})", self.url) from error
            wait = _FIRST_WAIT * 2 ** (tried - 1) * random.uniform(0.5, 1)
            _LOG.warning("%s: %s; try %d of %d follows in %.1f s", self.url, reason, tried + 1, _TRIES, wait)
            time.sleep(wait)
        raise AssertionError


def _stays(error: Exception) -> bool:
    """Whether another try would have the same answer: a request that is wrong, or nobody to sign it."""
    return (isinstance(error, OSError) and error.errno == errno.EINVAL) or "Credentials" in type(error).__name__


class RemoteWriter:
    """An object that is uploaded part by part, and is there when the `with` block ends without an error."""

    def __init__(self, path: Remote, file: Any) -> None:
        self.path, self.size, self._file = path, 0, file

    def __enter__(self) -> RemoteWriter:
        return self

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self._file.write(data)
        self.size += len(data)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self._give_up()
            return
        try:
            self._file.close()
        except BaseException:
            self._give_up()
            raise

    def _give_up(self) -> None:
        """Let the store forget the parts; if it refuses that too, they are left to the store's own rules of expiry."""
        for _ in range(_TRIES):
            with suppress(Exception):
                self._file.discard()
                break
        self._file.closed = True  # else it would still be uploaded when Python forgets it

    @property
    def file(self) -> File:
        """Name and size of what has been written."""
        return File(path=self.path.name, size=self.size, blake3=None)


Place = Path | Remote
"""A folder or a file of either kind."""


def place(text: str | Path) -> Place:
    """What a path or a URL names; `file://` is the file system."""
    if isinstance(text, Path) or "://" not in text:
        return Path(text)
    scheme, _, rest = text.partition("://")
    return Path(rest) if scheme in ("file", "local") else Remote(text)


def located(directory: Place, name: str) -> Place:
    """The file that a manifest in `directory` calls so: its own, or one of the checkpoint beside it that the name begins with."""
    holder, _, own = name.rpartition("/")
    return directory.parent / holder / own if holder else directory / name


def content(file: Place) -> bytes:
    """The bytes of a file. Raises OSError, also for a link or a pipe."""
    if isinstance(file, Remote):
        return file.read()
    with os.fdopen(open_regular(file), "rb") as opened:
        return opened.read()


def store(file: Place, data: bytes) -> File:
    """Make a file whole; its name, size and hash. Raises OSError."""
    if isinstance(file, Path):
        return write_file(file, data)
    file.write(data)
    return described(file.name, data)


def described(name: str, data: bytes) -> File:
    """What a manifest says of a file with such content."""
    return File(path=name, size=len(data), blake3=blake3(data).hexdigest())


def hash_of(file: Place) -> str:
    """BLAKE3 of a file's content, 64 hex digits. Raises OSError."""
    return hash_file(file) if isinstance(file, Path) else blake3(file.read()).hexdigest()


def entries(directory: Place) -> dict[str, int | None]:
    """What is in a folder, with the size of each plain file, None for all else. Raises OSError."""
    if isinstance(directory, Remote):
        return directory.entries()
    found = {name: os.lstat(directory / name) for name in os.listdir(directory)}
    return {name: status.st_size if stat.S_ISREG(status.st_mode) else None for name, status in found.items()}


def require_folder(directory: Place) -> None:
    """Raise CheckpointError for what is no folder of its own."""
    if isinstance(directory, Path) and directory.is_symlink():
        raise CheckpointError(f"{directory} is a symbolic link; name the checkpoint itself")
    if isinstance(directory, Path) and not directory.is_dir():
        raise CheckpointError(f"no checkpoint at {directory}")
