"""Ranks on this machine: one process each, started from one warm process, and their results brought back in order. Imports no torch."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any

from quintet.errors import QuintetError, RankError

_GRACE_SECONDS = 5.0


@dataclass
class _Child:
    rank: int
    process: ForkServerProcess
    results: Connection


def run_on_ranks(
    count: int,
    work: Callable[..., Any],
    arguments: Sequence[object],
    *,
    preload: Sequence[str],
    on_result: Callable[[int], None] = lambda rank: None,
) -> list[Any]:
    """`[work(*arguments) for each rank]`, in `count` processes with the environment that torchrun would give them.

    `work` is a function of a module; it, the arguments and the results travel by pickle between our own processes. `preload` names the
    modules that the first process imports once for all. `on_result` hears of each rank that is done. Raises the first rank's error if it is
    one of Quintet's, and RankError for a rank that died or failed otherwise; the others are ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(count):
        ours, theirs = context.Pipe(duplex=False)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        environment = place | {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        process = context.Process(target=_child, args=(environment, work, tuple(arguments), theirs), daemon=True)
        process.start()
        theirs.close()
        children.append(_Child(rank, process, ours))
    try:
        return _collect(children, on_result)
    finally:
        for child in children:
            if child.process.is_alive():
                child.process.kill()
            child.process.join()


def _collect(children: list[_Child], on_result: Callable[[int], None]) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, BaseException] = {}
    left, deadline = {child.results: child for child in children}, None
    while left and (deadline is None or time.monotonic() < deadline):
        for connection in wait(list(left), timeout=0.2):
            assert isinstance(connection, Connection)
            child = left.pop(connection)
            try:
                good, value = pickle.loads(connection.recv_bytes())
            except EOFError:
                child.process.join()
                good, value = False, RankError(f"rank {child.rank} died (exit code {child.process.exitcode}); is memory short?")
            if good:
                results[child.rank] = value
                on_result(child.rank)
            else:
                failures[child.rank] = value
                # The others will soon fail for its sake; what they say then is of no use.
                deadline = deadline or time.monotonic() + _GRACE_SECONDS
    if failures:
        raise min(failures.items(), key=lambda failure: (isinstance(failure[1], RankError), failure[0]))[1]
    return [results[rank] for rank in sorted(results)]


def _child(environment: dict[str, object], work: Callable[..., Any], arguments: tuple[object, ...], results: Connection) -> None:
    os.environ |= {name: str(value) for name, value in environment.items()}
    try:
        answer = (True, work(*arguments))
    except QuintetError as error:
        answer = (False, error)
    except SystemExit as stop:
        answer = (False, RankError(f"rank {environment['RANK']} left with exit code {stop.code}"))
    except BaseException:
        answer = (False, RankError(f"rank {environment['RANK']} failed:\n{traceback.format_exc()}"))
    results.send_bytes(pickle.dumps(answer))
    results.close()
