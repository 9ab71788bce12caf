"""Finding the other ranks: every process reports with what it is about to do, and who is missing or does otherwise is named.

torchrun tells a process its rank, the number of processes and where the store is; alone, nothing of this is needed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from quintet.errors import QuintetError, RankError, UsageError
from quintet.parallel.mesh import Mesh, make_mesh
from quintet.spec.layout import Layout

T = TypeVar("T")

ARRIVAL_SECONDS = 60.0
"""How long ranks wait for each other at the start."""
_POLL_SECONDS = 0.02


def this_rank() -> int:
    """This process's rank by its launcher, 0 if it is alone."""
    return int(os.environ.get("RANK", "0"))


@dataclass(frozen=True)
class Ranks:
    """This process among the others: its mesh, and the store through which they speak before and beside collectives."""

    mesh: Mesh
    store: Store | None

    @property
    def is_lead(self) -> bool:
        """Whether this is rank 0, which writes and speaks for all."""
        return self.mesh.rank == 0

    def lead_first(self, name: str, work: Callable[[], T]) -> T:
        """`work` on rank 0, and then, if that went well, on the others; each returns its own result.

        Where rank 0 fails, the others leave with its exit code and nothing to say. `name` is used once in a run.
        """
        if self.store is None:
            return work()
        if not self.is_lead:
            while not self.store.check([name]):
                time.sleep(_POLL_SECONDS)
            if code := int(self.store.get(name)):
                raise SystemExit(code)
            return work()
        try:
            result = work()
        except BaseException as error:
            self.store.set(name, str(error.exit_code if isinstance(error, QuintetError) else 1))
            raise
        self.store.set(name, "0")
        return result


@contextmanager
def joined(
    layout: Layout, *, about: dict[str, str], device: torch.device, seconds: float, arrival: float = ARRIVAL_SECONDS
) -> Iterator[Ranks]:
    """The ranks of a run, from meeting to parting; collectives give up after `seconds`.

    `about` says by name what must be equal on all ranks (a digest of the recipe, versions). Raises UsageError for a number of processes
    that the layout does not take and for ranks that differ, RankError for ranks that do not arrive within `arrival` seconds and for a
    collective that fails because another rank is gone.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks(make_mesh(layout), None)
        return
    rank = this_rank()
    store = _store(rank, count, arrival)
    _report(store, rank, count, layout, about, arrival)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend, store=PrefixStore("collectives", store), rank=rank, world_size=count, timeout=timedelta(seconds=seconds)
        )
        yield Ranks(make_mesh(layout), PrefixStore("lead", store))
        dist.barrier()  # none leaves while another still connects
    except RuntimeError as error:
        if not _is_of_ranks(error):
            raise
        raise RankError(
            f"rank {rank} lost contact with another rank: {str(error).splitlines()[0]}; look at what that rank said, start again and resume"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _store(rank: int, count: int, arrival: float) -> Store:
    try:
        store, _, _ = next(iter(rendezvous("env://", rank, count, timeout=timedelta(seconds=arrival))))
    except (ValueError, RuntimeError) as error:
        raise RankError(
            f"rank {rank} of {count} cannot reach the store at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} "
            f"({str(error).splitlines()[0]}); start the ranks with torchrun, or set MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE"
        ) from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"quintet-{attempt}", store)


def _report(store: Store, rank: int, count: int, layout: Layout, about: dict[str, str], arrival: float) -> None:
    """Tell the others that this rank is here, and what it is about; rank 0 waits for all and gives the verdict."""
    store.set(f"here-{rank}", json.dumps(about))
    if rank == 0:
        store.set("verdict", json.dumps(_missing(store, count, layout, arrival) or _different(store, count)))
    else:
        # Rank 0 may be the one that does not come.
        deadline = time.monotonic() + arrival + 5
        while not store.check(["verdict"]):
            if time.monotonic() > deadline:
                raise RankError(f"rank {rank} waited {arrival:.0f} s for rank 0, which did not arrive; look at what rank 0 said")
            time.sleep(_POLL_SECONDS)
    kind, text = json.loads(store.get("verdict")) or ("", "")
    if kind:
        store.set(f"read-{rank}", "")
        if rank == 0:  # the others must read before the store goes
            deadline = time.monotonic() + 2
            arrived = [other for other in range(1, count) if store.check([f"here-{other}"])]
            while time.monotonic() < deadline and not all(store.check([f"read-{other}"]) for other in arrived):
                time.sleep(_POLL_SECONDS)
            raise (RankError if kind == "missing" else UsageError)(text)
        raise SystemExit(RankError.exit_code if kind == "missing" else UsageError.exit_code)


def _missing(store: Store, count: int, layout: Layout, arrival: float) -> tuple[str, str] | None:
    deadline, left = time.monotonic() + arrival, list(range(count))
    while left := [rank for rank in left if not store.check([f"here-{rank}"])]:
        if time.monotonic() > deadline:
            nodes = ", ".join(map(str, layout.nodes_of(left)))
            return "missing", (
                f"{_listed(left)} of {count} (node {nodes}) did not arrive within {arrival:.0f} s; look at what they said, and that as "
                "many processes were started on each node as it has devices"
            )
        time.sleep(_POLL_SECONDS)
    return None


def _different(store: Store, count: int) -> tuple[str, str] | None:
    told = [json.loads(store.get(f"here-{rank}")) for rank in range(count)]
    for what, value in told[0].items():
        if others := [rank for rank in range(count) if told[rank].get(what) != value]:
            return "different", (
                f"{_listed(others)}: another {what} than rank 0's ({told[others[0]].get(what)} against {value}); start all ranks with the "
                "same files, options and versions"
            )
    return None


def _listed(ranks: list[int]) -> str:
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks[:8]))}{more}"


def _is_of_ranks(error: RuntimeError) -> bool:
    """Whether a collective failed for another rank's sake."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "connection", "timed out", "nccl", "peer"))
