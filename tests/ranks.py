"""Running a function on several ranks: forked from this warm process, joined by gloo, their results brought back in order."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def on_ranks(count: int, work: Callable[[int], T], *, seconds: float = 120, joined: bool = True) -> list[T]:
    """`[work(rank) for rank in range(count)]`, each in a process of its own; an AssertionError shows the trace of each that failed.
    Those that are not `joined` find what a launcher tells them, and no process group.

    The children inherit everything by fork, so `work` may be a closure; what it returns is sent back (by pickle, from our own child).
    """
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        children = [_fork(rank, count, work, Path(folder), seconds, None if joined else port) for rank in range(count)]
        ended = _wait(children, time.monotonic() + seconds)
        failed = [path.read_text() for rank in range(count) if (path := Path(folder) / f"{rank}.trace").exists()]
        assert not failed, "\n".join(failed)
        missing = [rank for rank in range(count) if not (Path(folder) / f"{rank}.result").exists()]
        assert not missing, f"ranks {missing} ended without a result: {', '.join(ended[rank] for rank in missing)}"
        return [pickle.loads((Path(folder) / f"{rank}.result").read_bytes()) for rank in range(count)]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _fork(rank: int, count: int, work: Callable[[int], Any], folder: Path, seconds: float, port: int | None) -> int:
    child = os.fork()
    if child:
        return child
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        if port is None:
            store = dist.FileStore(str(folder / "store"), count)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=seconds))
        else:
            os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        result = pickle.dumps(work(rank))
        if port is None:
            dist.barrier()
            dist.destroy_process_group()
        (folder / f"{rank}.part").write_bytes(result)
        (folder / f"{rank}.part").rename(folder / f"{rank}.result")
    except BaseException:
        (folder / f"{rank}.trace").write_text(f"rank {rank}\n{traceback.format_exc()}")
        os._exit(1)
    os._exit(0)


def _wait(children: list[int], deadline: float) -> list[str]:
    """Until all have ended, and how they did; when one fails, the others have two seconds to say what they think of it."""
    left, ended = set(children), dict.fromkeys(children, "")
    while left:
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                left.discard(child)
                how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {status >> 8}"
                ended[child] = ended[child] or how
                if status:
                    deadline = min(deadline, time.monotonic() + 2)
        if left and time.monotonic() > deadline:
            for child in left:
                ended[child] = "too slow"
                os.kill(child, signal.SIGKILL)
        time.sleep(0.003)
    return list(ended.values())
