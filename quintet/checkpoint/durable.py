"""Files that survive a crash: written once, hashed on the way, synced, and moved into place whole."""

from __future__ import annotations

import errno
import fcntl
import itertools
import mmap
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from blake3 import blake3

from quintet.checkpoint.manifest import File
from quintet.errors import CheckpointError

TEMPORARY = ".tmp-"
"""How the names of unfinished directories begin."""
_CHUNK = 1 << 20
"""Bytes that are hashed and written (or read and hashed) at once: what stays in the cache in between, a third of the time of 16 MiB."""
_BUFFER = 8 << 20
"""Bytes that go to the disk at once."""
PAGE = 4096
"""What places, lengths and addresses are multiples of where nothing is cached."""
PAST_CACHE = getattr(os, "O_DIRECT", 0)
"""To open a file so."""
_EARLY = 64 << 20
"""Bytes after which a file is synced already, where the system does cache it."""
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

    A long one goes to the disk from two buffers in turn, by a thread, and past the system's cache where the file system can do that:
    filling and emptying the cache would take the processors from training and from coding.

    Raises OSError, as the system calls do; FileExistsError if the name is taken, which includes a symbolic link.
    """

    def __init__(self, path: Path, *, hashed: bool = True) -> None:
        self.path = path
        self.size = 0
        self._hash = blake3() if hashed else None  # One thread: a pool of threads would hang in a forked child.
        self._buffers = [_aligned_buffer()]
        self._filled = 0
        self._cached = 0
        self._thread: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None
        self._is_direct = False

    def __enter__(self) -> FileWriter:
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        return self

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        view = memoryview(data)
        while len(view):
            part = view[: min(_CHUNK, _BUFFER - self._filled)]
            self._buffers[0][self._filled : self._filled + len(part)] = part
            if self._hash is not None:
                self._hash.update(part)
            self.size += len(part)
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == _BUFFER:
                self._hand_over()

    def _hand_over(self) -> None:
        """Let the thread write the full buffer, once it is through with the other one."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="disk")
            self._buffers.append(_aligned_buffer())
            self._pass_cache(True)
        if self._writing is not None:
            self._writing.result()
        self._writing = self._thread.submit(self._put, self._buffers[0])
        self._buffers.reverse()
        self._filled = 0

    def _put(self, view: memoryview) -> None:
        size = len(view)
        while len(view):
            try:
                view = view[os.write(self._fd, view) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._is_direct:
                    raise
                self._pass_cache(False)
            if len(view) % PAGE:
                self._pass_cache(False)
        self._cached += 0 if self._is_direct else size
        if self._cached >= _EARLY:
            os.fdatasync(self._fd)  # an error here no later sync would tell again
            self._cached = 0

    def _pass_cache(self, direct: bool) -> None:
        """Write past the system's cache from now on, or no longer; where the file system cannot do that, nothing changes."""
        if self._is_direct != direct:
            flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
            with suppress(OSError):
                fcntl.fcntl(self._fd, fcntl.F_SETFL, flags ^ PAST_CACHE)
                self._is_direct = direct

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if self._thread is not None:
                self._thread.shutdown()
            if kind is None:
                if self._writing is not None:
                    self._writing.result()
                whole = self._filled - self._filled % PAGE if self._is_direct else 0
                self._put(self._buffers[0][:whole])
                self._pass_cache(False)
                self._put(self._buffers[0][whole : self._filled])
                os.fsync(self._fd)
        finally:
            os.close(self._fd)

    @property
    def file(self) -> File:
        """Name, size and hash of what has been written."""
        return File(path=self.path.name, size=self.size, blake3=self._hash.hexdigest() if self._hash else None)


def _aligned_buffer() -> memoryview:
    return memoryview(mmap.mmap(-1, _BUFFER, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def write_file(path: Path, data: bytes) -> File:
    """Write a whole new file to disk."""
    with FileWriter(path) as writer:
        writer.write(data)
    return writer.file


def open_regular(path: Path, flags: int = 0) -> int:
    """A descriptor to read a plain file; raises OSError for a symbolic link, a pipe or a device."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | flags)
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
