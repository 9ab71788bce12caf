"""Finding the other ranks: every process reports with what it is about to do, and who is missing or does otherwise is named.

torchrun tells a process its rank, the number of processes and where the store is; alone, nothing of this is needed. The store is a small
table of names and values in one process, through which ranks speak before, beside and after collectives.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from quintet.errors import KEYBOARD_INTERRUPT, QuintetError, RankError, UsageError
from quintet.parallel.mesh import Mesh, make_mesh, require_ranks
from quintet.parallel.recorder import first_sentence, is_of_ranks, operation
from quintet.spec.layout import Layout

T = TypeVar("T")
Notice = Callable[[str], None]

ARRIVAL_SECONDS, ARRIVAL_SECONDS_HERE = 60.0, 20.0
"""How long ranks wait at the start, from one's arrival to the next: those of several nodes, and those that were all started here."""
NOTICE_SECONDS = 5.0
"""After which rank 0 names those that it still waits for."""
_TELLERS = 8
"""Ranks that tell what befell them; of thousands all would say much the same."""
PARTING_SECONDS = 2.0
"""How long a rank that fails waits for the others to hear of it."""
PROCESSES_ON_NODE = "number of processes on its node"
REMEDIES = {PROCESSES_ON_NODE: "start as many processes on every node: torchrun --nproc-per-node"}
"""What to do where ranks differ in something else than files, options and versions."""
_BEAT_SECONDS = 1.0
_LAUNCH = "start the ranks with torchrun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each"


def _nobody(text: str) -> None:
    """Hears nothing."""


@dataclass(frozen=True)
class Ranks:
    """This process among the others: its mesh, and the store through which they speak; `seconds` is how long one may be silent. On rank 0
    `notice` hears, from any thread, who is late or silent."""

    mesh: Mesh
    store: Store | None
    seconds: float = 600.0
    notice: Notice = _nobody

    @property
    def is_lead(self) -> bool:
        """Whether this is rank 0, which writes and speaks for all."""
        return self.mesh.rank == 0

    def lead_first(self, name: str, work: Callable[[], T]) -> T:
        """`work` on rank 0, and then, if that went well, on the others; each returns its own result.

        Rank 0 may take its time, but the others raise RankError when they hear no sign of life for `seconds`. Where it fails, they leave
        with its exit code and nothing to say. `name` says what is done, and is used once in a run.
        """
        if self.store is None:
            return work()
        if not self.is_lead:
            self._await_lead(self.store, name)
            if code := int(self.store.get(name)):
                raise SystemExit(code)
            return work()
        try:
            with _beating(self.store, name):
                result = work()
        except BaseException as error:
            self.store.set(name, str(_exit_code(error)))
            raise
        self.store.set(name, "0")
        return result

    def agree(self, what: str, value: str) -> None:
        """Raise UsageError, on rank 0, where ranks have different values; the others leave quietly. `what` is used once in a run."""
        if self.store is not None:
            ranks = len(self.mesh["world"].ranks)
            about, name = {what: value}, f" with its {what}"
            _report(PrefixStore(what, self.store), self.mesh.rank, ranks, self.mesh.layout, about, self.seconds, self.notice, name=name)

    def first_to_tell(self, message: str) -> bool:
        """Whether no other rank has told this yet, and not many have told something; from now on this one has."""
        if self.store is None:
            return True
        key, name = f"told-{hashlib.blake2b(message.encode(), digest_size=12).hexdigest()}", str(self.mesh.rank)
        try:
            return bool(self.store.compare_set(key, "", name).decode() == name) and self.store.add("tellers", 1) <= _TELLERS
        except RuntimeError:  # the store is gone: better twice than not at all
            return True

    @contextmanager
    def losses_named(self) -> Iterator[None]:
        """Raise RankError, with what this rank waited in, for a collective that fails because another rank is gone."""
        with _losses_named(self.mesh.rank, active=self.store is not None):
            yield

    def _await_lead(self, store: Store, name: str) -> None:
        if not _heard_of(store, name, self.seconds):
            raise RankError(
                f"rank {self.mesh.rank} waits for rank 0 ({name}) and has heard nothing of it for {self.seconds:.0f} s; look at what "
                "rank 0 said, end it if it still runs, and start again"
            )


@contextmanager
def joined(
    layout: Layout,
    *,
    about: dict[str, str],
    device: torch.device,
    seconds: float,
    arrival: float | None = None,
    notice: Notice = _nobody,
) -> Iterator[Ranks]:
    """The ranks of a run, from meeting to parting; collectives give up after `seconds`.

    `about` says by name what must be equal on all ranks (the recipe's values or their digests, versions). On rank 0 `notice` hears who is
    late. Raises UsageError for a number of processes that the layout does not take and for ranks that differ, RankError where none of those
    that are missing arrives for `arrival` seconds (by default `ARRIVAL_SECONDS`, fewer where all were started on this node) and for a
    collective that fails because another rank is gone.
    """
    rank, count = started()
    require_ranks(layout, count)
    if count == 1:
        yield Ranks(make_mesh(layout), None)
        return
    if arrival is None:
        arrival = ARRIVAL_SECONDS_HERE if os.environ.get("LOCAL_WORLD_SIZE") == str(count) else ARRIVAL_SECONDS
    clean = False
    store = _open_store(rank, count, arrival)
    try:
        with _losses_named(rank):
            _report(store, rank, count, layout, about, arrival, notice)
            # Both backends: what ranks tell each other of checkpoints lies on the host. No `device_id`: torch would then make each group
            # by splitting the default one, in which all ranks must take part, and here each makes only the groups that it is in.
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=PrefixStore("collectives", store),
                rank=rank,
                world_size=count,
                timeout=timedelta(seconds=seconds),
            )
            yield Ranks(make_mesh(layout, seconds=seconds, device=device), PrefixStore("run", store), seconds, notice)
            dist.barrier()  # none leaves while another still needs it
            clean = True
    except BaseException:
        _part(PrefixStore("part", store), rank, count)
        raise
    finally:
        # Behind a failure NCCL would wait for the one that is gone; the end of the process does as well.
        if dist.is_initialized() and (clean or device.type == "cpu"):
            dist.destroy_process_group()


def started() -> tuple[int, int]:
    """This process's rank and the number of ranks, as a launcher told them in RANK and WORLD_SIZE: 0 of 1 where none did.

    Raises UsageError for values that make no sense.
    """
    told = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")}
    if not told["WORLD_SIZE"]:
        return 0, 1
    try:
        rank, count = int(told["RANK"]), int(told["WORLD_SIZE"])
    except ValueError:
        rank, count = -1, 0
    if not 0 <= rank < count:
        shown = ", ".join(f"{name} is {value!r}" if value else f"{name} is missing" for name, value in told.items())
        raise UsageError(f"{shown}: ranks are numbered from 0 to WORLD_SIZE - 1; {_LAUNCH}, or unset both to train on one device")
    return rank, count


def _open_store(rank: int, count: int, arrival: float) -> Store:
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        shown = ", ".join(
            f"{name} is {value!r}" if value else f"{name} is missing" for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port))
        )
        raise UsageError(f"rank {rank} of {count} does not know where rank 0 is: {shown}; {_LAUNCH}")
    # torchrun keeps a store of its own, which outlives rank 0.
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        # Not waiting for the others here: who is missing can be named later.
        store: Store = dist.TCPStore(  # type: ignore[attr-defined]
            address, int(port), is_master=hosts, timeout=timedelta(seconds=arrival), wait_for_workers=False, multi_tenant=True
        )
    except (ValueError, RuntimeError) as error:
        why = first_sentence(error)
        if hosts:
            raise UsageError(f"rank 0 cannot open a store on port {port}: {why}; choose another MASTER_PORT") from None
        raise RankError(
            f"rank {rank} of {count} cannot reach rank 0 at MASTER_ADDR {address}, MASTER_PORT {port} within {arrival:.0f} s: {why}; "
            "look at what rank 0 said, and whether address and port are right on every node"
        ) from None
    return PrefixStore(f"quintet-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _report(
    store: Store,
    rank: int,
    count: int,
    layout: Layout,
    about: dict[str, str],
    arrival: float,
    notice: Notice,
    *,
    name: str = "",
) -> None:
    """Tell the others that this rank is here, and what it is about; rank 0 waits for all and gives the verdict."""
    store.set(f"here-{rank}", json.dumps(about))
    if rank == 0:
        with _beating(store, "verdict"):
            verdict = _missing(store, count, layout, arrival, notice, name=name) or _different(store, count)
        store.set("verdict", json.dumps(verdict))
    elif not _heard_of(store, "verdict", arrival + 5):  # rank 0 may be the one that does not come
        raise RankError(f"rank 0 of {count} did not arrive{name} within {arrival:.0f} s; look at what it said, and start again")
    kind, text = json.loads(store.get("verdict")) or ("", "")
    if kind:
        error = RankError if kind == "missing" else UsageError
        raise error(text) if rank == 0 else SystemExit(error.exit_code)


def _missing(store: Store, count: int, layout: Layout, arrival: float, notice: Notice, *, name: str) -> tuple[str, str] | None:
    """Who has not come when nobody has for `arrival` seconds: ranks that share cores come one after the other."""
    since, left, pause, noticed = time.monotonic(), list(range(count)), 0.01, False
    while missing := [rank for rank in left if not store.check([f"here-{rank}"])]:
        now, who = time.monotonic(), f"{_listed(missing)} of {count} (node {_few(layout.nodes_of(missing))})"
        if len(missing) < len(left):
            since, left = now, missing
        if now - since > arrival:
            return "missing", (
                f"{who} did not arrive{name} within {arrival:.0f} s; look at what they said, and whether as many processes were started "
                f"on each node as it has devices; where they only need longer, raise train.{'rank' if name else 'arrival'}_timeout"
            )
        if now - since > NOTICE_SECONDS and not noticed:
            noticed = True
            notice(f"still waiting for {who}{name}; giving up where none arrives for {arrival:.0f} s")
        time.sleep(pause)
        pause = min(1.5 * pause, 0.5)
    return None


def _different(store: Store, count: int) -> tuple[str, str] | None:
    told = [json.loads(store.get(f"here-{rank}")) for rank in range(count)]
    for what, value in told[0].items():
        if others := [rank for rank in range(count) if told[rank].get(what) != value]:
            remedy = REMEDIES.get(what, "start all ranks with the same files, options and versions")
            return "different", (
                f"{_listed(others)} of {count}: another {what} than rank 0's ({told[others[0]].get(what)} against {value}); {remedy}"
            )
    return None


def _listed(ranks: list[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {_few(ranks)}"


def _few(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"{', '.join(map(str, numbers[:8]))}{more}"


def _heard_of(store: Store, name: str, seconds: float) -> bool:
    """Wait until `name` is in the store; False when whoever sets it gives no sign of life for so long."""
    beats, since, pause = -1, time.monotonic(), 0.01
    while not store.check([name]):
        if (heard := store.add(f"{name}.beats", 0)) != beats:
            beats, since = heard, time.monotonic()
        elif time.monotonic() - since > seconds:
            return False
        time.sleep(pause)
        pause = min(1.5 * pause, 0.5)
    return True


@contextmanager
def _beating(store: Store, name: str) -> Iterator[None]:
    """A sign of life every second."""
    done = threading.Event()

    def beat() -> None:
        with suppress(RuntimeError):  # the store is gone, and with it everybody who would listen
            while not done.wait(_BEAT_SECONDS):
                store.add(f"{name}.beats", 1)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _part(store: Store, rank: int, count: int) -> None:
    """Leave after a failure: rank 0, which may hold the store and writes the verdict, last; nobody waits for long."""
    deadline = time.monotonic() + PARTING_SECONDS
    with suppress(RuntimeError):
        if rank == 0:
            store.set("left-0", "")
        others = [f"left-{other}" for other in range(1, count)] if rank == 0 else ["left-0"]
        while time.monotonic() < deadline and not store.check(others):
            time.sleep(0.02)
        if rank:  # the last word to the store, which may go now
            store.set(f"left-{rank}", "")


@contextmanager
def _losses_named(rank: int, *, active: bool = True) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not (active and is_of_ranks(error)):
            raise
        raise RankError(
            f"rank {rank} waited in {operation(error)} for a rank that is gone or hangs: {first_sentence(error)}; look at what the other "
            "ranks said, then start all of them again: quintet resume continues from the newest checkpoint"
        ) from error


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return KEYBOARD_INTERRUPT
    return error.exit_code if isinstance(error, QuintetError) else 1
