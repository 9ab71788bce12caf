"""Ranks as a launcher starts them: forked processes with its environment, and what became of each."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from quintet.errors import QuintetError


@dataclass(frozen=True)
class Fate:
    """How a process ended: its exit code (negative: killed by that signal), what it said, and after how many seconds."""

    code: int
    told: str
    seconds: float


def launch(
    count: int,
    work: Callable[[int], int | None],
    folder: Path,
    *,
    absent: Iterable[int] = (),
    environment: Mapping[str, str] | None = None,
    seconds: float = 60,
) -> list[Fate]:
    """The fates of `count` ranks that each do `work(rank)`, which may be a closure and return an exit code; a QuintetError is told, and
    gives its own. All but those `absent` are started. Whoever is left after `seconds` is killed."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    begin, fates = time.monotonic(), dict[int, Fate]()
    children = {}
    for rank in set(range(count)) - set(absent):
        own = {**{name: str(value) for name, value in place.items()}, "RANK": str(rank), "LOCAL_RANK": str(rank), **(environment or {})}
        children[_fork(own, lambda rank=rank: work(rank), folder / f"rank-{rank}.log")] = rank  # type: ignore[misc]
    while children:
        done, status = os.waitpid(-1, os.WNOHANG)
        if rank := children.pop(done, None) if done else None:
            pass
        if done and rank is not None:
            told = (folder / f"rank-{rank}.log").read_text()
            fates[rank] = Fate(os.waitstatus_to_exitcode(status), told, time.monotonic() - begin)
        if time.monotonic() > begin + seconds:
            for child in children:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return [fates[rank] for rank in sorted(fates)]


def _fork(environment: Mapping[str, str], work: Callable[[], int | None], log: Path) -> int:
    child = os.fork()
    if child:
        return child
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1) for descriptor in (1, 2))
    os.environ |= environment
    code: int | str | None = 1
    try:
        code = work()
    except QuintetError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)
