"""status.json holds the exit code's verdict, whole at every moment."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from quintet.errors import DataError, NumericsError, UsageError
from quintet.monitor.metrics import Message
from quintet.monitor.status import Status, StatusFile, read_status, verdict_of, write_status
from tests.monitor.events import record


def status_of(directory: Path) -> Status:
    status = read_status(directory)
    assert status is not None
    return status


@pytest.mark.parametrize(
    ("exit_code", "verdict", "remedy"),
    [
        (0, "done", None),
        (75, "interrupted", "quintet resume "),
        (12, "failed", "quintet resume "),
        (93, "failed", "do not restart"),
    ],
)
def test_the_verdict_and_the_remedy_follow_from_the_exit_code(tmp_path: Path, exit_code: int, verdict: str, remedy: str | None) -> None:
    with StatusFile(tmp_path) as status:
        status.write(record(3))
        assert status_of(tmp_path).verdict == "running"
        status.finish(exit_code, "what happened")
    written = status_of(tmp_path)
    assert (written.verdict, written.exit_code, written.step, written.num_steps) == (verdict, exit_code, 3, 10)
    assert (written.remedy or "").startswith(remedy or "") and (written.remedy is None) == (remedy is None)


def test_an_error_becomes_the_verdict(tmp_path: Path) -> None:
    with pytest.raises(NumericsError), StatusFile(tmp_path) as status:
        status.write(record(1))
        raise NumericsError("the loss is nan")
    written = status_of(tmp_path)
    assert (written.verdict, written.exit_code, written.message) == ("failed", 12, "the loss is nan")


def test_an_unforeseen_error_is_exit_code_1(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), StatusFile(tmp_path) as status:
        status.write(record(1))
        raise ZeroDivisionError("division by zero")
    assert status_of(tmp_path).exit_code == 1


def test_a_run_that_is_refused_leaves_the_status_of_the_directorys_owner(tmp_path: Path) -> None:
    with StatusFile(tmp_path) as owner:
        owner.write(record(5))
        owner.finish(0, "done")
    with pytest.raises(DataError), StatusFile(tmp_path):
        raise DataError("the directory exists")
    assert status_of(tmp_path).verdict == "done"


def test_a_resume_that_fails_at_once_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError), StatusFile(tmp_path, resumed=True):
        raise DataError("no shards")
    assert status_of(tmp_path).exit_code == 10


def test_a_resume_beside_a_running_process_leaves_its_status_alone(tmp_path: Path) -> None:
    StatusFile(tmp_path).write(record(5))
    with pytest.raises(UsageError), StatusFile(tmp_path, resumed=True):
        raise UsageError("another process is training here")
    assert (status_of(tmp_path).verdict, status_of(tmp_path).step) == ("running", 5)


def test_a_run_that_never_made_its_directory_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError), StatusFile(tmp_path / "run"):
        raise DataError("no text")
    assert not (tmp_path / "run").exists()


def test_it_is_written_seldom_and_at_the_end(tmp_path: Path) -> None:
    now = [0.0]
    status = StatusFile(tmp_path, every_seconds=5, clock=lambda: now[0])
    steps = []
    for step in range(1, 11):
        status.write(record(step))
        steps.append(status_of(tmp_path).step)
        now[0] += 1
    status.write(Message(text="no step"))
    status.finish(0, "done")
    assert steps == [1, 1, 1, 1, 1, 6, 6, 6, 6, 6]
    assert status_of(tmp_path).step == 10
    assert status_of(tmp_path).updated == 10
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


@contextmanager
def full_disk() -> Iterator[None]:
    """No file can be made or grow: new ones stay empty, and old ones keep their size."""
    real = Path.write_bytes

    def write_bytes(self: Path, data: bytes) -> int:
        real(self, b"")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        if offset + len(data) > 4096 * max(1, -(-os.fstat(fd).st_size // 4096)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_pwrite(fd, data, offset)

    real_pwrite = os.pwrite
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_bytes)
        patch.setattr(os, "pwrite", pwrite)
        yield


def test_while_a_run_goes_on_a_reader_never_sees_a_part_and_a_full_disk_keeps_the_old(tmp_path: Path) -> None:
    status = StatusFile(tmp_path, every_seconds=0)
    status.write(record(1))
    before = status_of(tmp_path)
    with full_disk():
        status.write(record(2))  # does not raise
        with pytest.raises(OSError, match="No space"):
            write_status(tmp_path, before)
    assert status_of(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize("exit_code", [0, 75, 11])
@pytest.mark.parametrize("message", ["all of it", "short", "long " * 3000, "\x01🙂" * 3000])
def test_the_verdict_is_written_on_a_full_disk_too(tmp_path: Path, exit_code: int, message: str) -> None:
    status = StatusFile(tmp_path)
    status.write(record(3))
    with full_disk():
        status.finish(exit_code, message)
    written = status_of(tmp_path)
    assert (written.verdict, written.exit_code, written.step) == (verdict_of(exit_code), exit_code, 3)
    assert written.message.startswith(message[:100]) and written.message.endswith(message[-100:])
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
    assert (tmp_path / "status.json").stat().st_size <= 4096


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB in memory, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if not mount or subprocess.run([mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_the_verdict_is_right_on_a_real_full_disk(small_disk: Path) -> None:
    status = StatusFile(small_disk, resumed=True)
    status.write(record(3))
    with pytest.raises(OSError, match="No space"):
        (small_disk / "filler").write_bytes(bytes(1 << 20))
    status.finish(11, "the disk is full; " + "free some space " * 20)
    written = status_of(small_disk)
    assert (written.verdict, written.exit_code) == ("failed", 11)


def test_ctrl_c_before_the_first_step_is_an_interruption(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), StatusFile(tmp_path) as status:
        status.write(Message(text="compiling"))
        raise KeyboardInterrupt
    written = status_of(tmp_path)
    assert (written.verdict, written.exit_code) == ("interrupted", 130)
    assert written.remedy == f"quintet resume {tmp_path}"


def test_a_broken_status_is_an_error_and_a_missing_one_is_none(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    (tmp_path / "status.json").write_text(json.dumps({"verdict": "lost"}))
    with pytest.raises(DataError, match="not a run's status"):
        read_status(tmp_path)


def test_the_remedy_can_be_pasted_into_a_shell(tmp_path: Path) -> None:
    directory = tmp_path / "my runs"
    directory.mkdir()
    with StatusFile(directory) as status:
        status.write(record(1))
        status.finish(75, "stopped")
    assert status_of(directory).remedy == f"quintet resume '{directory}'"
