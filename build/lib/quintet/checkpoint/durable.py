"""Files that survive a crash: written once, hashed on the way, synced, and moved into place whole."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from blake3 import blake3

from quintet.checkpoint.manifest import File
from quintet.errors import CheckpointError

TEMPORARY = ".tmp-"
"""How the names of unfinished directories begin."""
_CHUNK = 1 << 20
"""Bytes that are hashed and written (or read and hashed) at once: what stays in the cache in between, a third of the time of 16 MiB."""
_EARLY = 64 << 20
"""Bytes after which a long file is synced for the first time, and again."""
_REMEDY = {
    errno.ENOSPC: "the disk is full; free some space, or keep fewer checkpoints (checkpoint.keep_last)",
    errno.EDQUOT: "the disk quota is used up; free some space, or keep fewer checkpoints (checkpoint.keep_last)",
    errno.EIO: "the device reports an input/output error; check the disk, or use another one",
    errno.EROFS: "the file system is read-only; use another directory",
    errno.EREMOTEIO: "check the URL, the credentials and the network",
    errno.EACCES: "permission is missing; use another directory or correct its permissions",
}


class FileWriter:
    """A new file that is hashed while it is written, unless its content has hashes of its own, and on disk when the `with` block ends.

    Raises OSError, as the system calls do; FileExistsError if the name is taken, which includes a symbolic link.
    """

    def __init__(self, path: Path, *, hashed: bool = True) -> None:
        self.path = path
        self.size = 0
        self._hash = blake3() if hashed else None  # One thread: a pool of threads would hang in a forked child.
        self._early = 0
        self._syncer: ThreadPoolExecutor | None = None
        self._syncing: Future[None] | None = None

    def __enter__(self) -> FileWriter:
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        return self

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        view = memoryview(data)
        while len(view):
            written = os.write(self._fd, view[:_CHUNK] if self._hash else view)
            if self._hash is not None:
                self._hash.update(view[:written])
            self.size += written
            view = view[written:]
        if self.size - self._early >= _EARLY and (self._syncing is None or self._syncing.done()):
            self._sync_early()

    def _sync_early(self) -> None:
        """Let the disk begin while more is on its way."""
        if self._syncing is not None:
            self._syncing.result()
        self._syncer = self._syncer or ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._syncing, self._early = self._syncer.submit(os.fdatasync, self._fd), self.size

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if self._syncer is not None:
                self._syncer.shutdown()
            if kind is None:
                if self._syncing is not None:
                    self._syncing.result()  # what it was refused, no later sync would tell again
                os.fsync(self._fd)
        finally:
            os.close(self._fd)

    @property
    def file(self) -> File:
        """Name, size and hash of what has been written."""
        return File(path=self.path.name, size=self.size, blake3=self._hash.hexdigest() if self._hash else None)


def write_file(path: Path, data: bytes) -> File:
    """Write a whole new file to disk."""
    with FileWriter(path) as writer:
        writer.write(data)
    return writer.file


def open_regular(path: Path) -> int:
    """A descriptor to read a plain file; raises OSError for a symbolic link, a pipe or a device."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not os.path.isfile(fd):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return fd


def hash_file(path: Path) -> str:
    """BLAKE3 of a plain file's content, 64 hex digits."""
    fd = open_regular(path)
    try:
        digest, buffer = blake3(), bytearray(_CHUNK)
        while count := os.readv(fd, [buffer]):
            digest.update(memoryview(buffer)[:count])
        return digest.hexdigest()
    finally:
        os.close(fd)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class TemporaryDirectory:
    """A new directory `.tmp-<name>-<number>` under `root`, locked while its process lives so that no other one sweeps it."""

    def __init__(self, root: Path, name: str) -> None:
        root.mkdir(parents=True, exist_ok=True)
        for number in itertools.count():
            self.path = root / f"{TEMPORARY}{name}-{os.getpid()}-{number}"
            try:
                self.path.mkdir()
            except FileExistsError:
                continue
            try:
                self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError:
                os.rmdir(self.path)
                raise
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            if self.path.exists():  # Else another process swept it before the lock was ours.
                return
            os.close(self._fd)

    def move_to(self, final: Path) -> None:
        """Sync the directory and give it its final name, durably. Raises OSError, also if that name holds something."""
        sync_directory(self.path)
        os.rename(self.path, final)
        sync_directory(final.parent)

    def close(self) -> None:
        """Remove the directory if it has not been moved, and let go of the lock."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._fd)


def sweep(root: Path) -> None:
    """Remove the temporary directories under `root` that dead processes left."""
    for path in root.glob(f"{TEMPORARY}*"):
        if path.is_symlink() or not path.is_dir():
            continue
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(fd)


def failure(error: OSError, *, doing: str) -> CheckpointError:
    """The error that a user sees when the file system refuses."""
    remedy = _REMEDY.get(error.errno or 0, "check the file system")
    where = f" ({error.filename})" if error.filename else ""
    return CheckpointError(f"{doing} failed: {error.strerror or error}{where}: {remedy}")
