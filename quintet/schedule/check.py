"""Proves that a schedule and its program are right: complete, ordered, without deadlock, and how much each rank must keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from quintet.errors import SpecError
from quintet.schedule.clock import unit, walk
from quintet.schedule.held import peak
from quintet.schedule.lower import Exchange, Program, Transfer, add_transfers
from quintet.schedule.op import UPSTREAM, Op, does, needs
from quintet.schedule.table import Schedule


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A schedule that was found right, with what follows from its order alone."""

    program: Program
    peak_activations: tuple[int, ...]
    """Per rank, the most stage activations kept at once: from a forward to the end of its weight gradient."""
    peak_deferred: tuple[int, ...]
    """Per rank, the most weight gradients put off at once: from an I to its W. They are among the activations above."""


def check(schedule: Schedule) -> Checked:
    """Raises SpecError, with rank, op and what it waits for, unless the schedule does all work once and can be run in each of these ways:

    with sends that are buffered; with sends that block until they are received (rendezvous), a whole batch at a time; with one queue per
    pair of ranks for both directions, as NCCL has for single sends and receives.
    """
    check_complete(schedule)
    check_order(schedule)
    walk(schedule, unit(schedule))
    program = add_transfers(schedule)
    check_program(program)
    return Checked(
        program=program,
        peak_activations=in_flight(schedule),
        peak_deferred=_peaks(schedule, kept=0, put_off=1),
    )


def in_flight(schedule: Schedule) -> tuple[int, ...]:
    """Per rank, the most stage activations kept at once: from a forward to the end of its weight gradient."""
    return _peaks(schedule, kept=1, put_off=1)


def _peaks(schedule: Schedule, *, kept: int, put_off: int) -> tuple[int, ...]:
    stages = range(schedule.num_stages)
    sizes = {"kept": dict.fromkeys(stages, kept), "put_off": dict.fromkeys(stages, put_off)}
    return tuple(int(peak(row, **sizes)) for row in schedule.table)


def check_complete(schedule: Schedule) -> None:
    """Every stage does F, and B or I and W, once for every micro-batch, on its route's rank."""
    for rank, row in enumerate(schedule.table):
        for work in row:
            for op in work.ops:
                if not (0 <= op.stage < schedule.num_stages and 0 <= op.microbatch < schedule.num_microbatches):
                    there = f"{schedule.num_stages} stages and {schedule.num_microbatches} micro-batches"
                    raise SpecError(f"rank {rank} has {op}, but there are {there}")
                if schedule.rank(op.stage, op.microbatch) != rank:
                    raise SpecError(f"rank {rank} has {op}, which belongs to rank {schedule.rank(op.stage, op.microbatch)}")
    counts = Counter(op for row in schedule.table for work in row for op in does(work))
    for stage in range(schedule.num_stages):
        for microbatch in range(schedule.num_microbatches):
            for kind in ("F", "I", "W"):
                count = counts[Op(kind, stage, microbatch)]
                if count != 1:
                    whole = "" if kind == "F" else f" (or as part of {stage}B{microbatch})"
                    raise SpecError(f"{stage}{kind}{microbatch}{whole} must happen once in {schedule.name}, and happens {count} times")


def check_order(schedule: Schedule) -> None:
    """On every rank, an op comes after those of the same rank that it needs."""
    for rank, row in enumerate(schedule.table):
        happened: set[Op] = set()
        own = {op for work in row for op in does(work)}
        for work in row:
            for op in needs(work, num_stages=schedule.num_stages):
                if op in own and op not in happened:
                    raise SpecError(f"rank {rank} has {work} before {op}, which it needs")
            happened.update(does(work))


def check_program(program: Program) -> None:
    """Inputs are received before they are needed, results sent after they are made, in one order at both ends; nothing blocks for ever."""
    _check_order_of_pairs(program)
    _meet(program)


def _check_order_of_pairs(program: Program) -> None:
    """Between any two ranks, the n-th transfer of the one is the other end of the n-th transfer of the other."""
    queues: dict[tuple[int, int], list[Transfer]] = {}
    for rank, row in enumerate(program.rows):
        for step in row:
            for transfer in step.transfers if isinstance(step, Exchange) else ():
                queues.setdefault((rank, transfer.peer), []).append(transfer)
    for (rank, peer), ours in queues.items():
        theirs = [_other_end(transfer, peer) for transfer in queues.get((peer, rank), [])]
        if ours != theirs:
            n = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
            sides = [f"{queue[n]}" if n < len(queue) else "nothing" for queue in (ours, queues.get((peer, rank), []))]
            raise SpecError(f"transfer {n} between ranks {rank} and {peer} differs: rank {rank} has {sides[0]}, rank {peer} has {sides[1]}")


def _other_end(transfer: Transfer, peer: int) -> Transfer:
    """The transfer of the rank `peer` as the rank at its other end must have it."""
    step = 1 if (transfer.what == "activation") == (transfer.action == "send") else -1
    action = "receive" if transfer.action == "send" else "send"
    return Transfer(action, transfer.what, transfer.stage + step, transfer.microbatch, peer)  # type: ignore[arg-type]


def _meet(program: Program) -> None:
    """Run the program with transfers that are over only once both ends are at them, and exchanges that block until all of theirs are."""
    rows, num_stages = program.rows, program.schedule.num_stages
    at = [0] * len(rows)
    open_: list[set[Transfer]] = [set() for _ in rows]
    happened: list[set[Op]] = [set() for _ in rows]
    entered = [False] * len(rows)
    runnable = list(range(len(rows)))
    while runnable:
        rank = runnable.pop()
        while at[rank] < len(rows[rank]):
            step = rows[rank][at[rank]]
            if not isinstance(step, Exchange):
                missing = [op for op in needs(step, num_stages=num_stages) if op not in happened[rank]]
                if missing:
                    raise SpecError(f"rank {rank} runs {step} before it has {', '.join(map(str, missing))}")
                happened[rank].update(does(step))
            elif not entered[rank]:
                entered[rank] = True
                open_[rank] = set(step.transfers)
                runnable += _complete(rank, step, open_, happened)
            if open_[rank]:
                break
            entered[rank] = False
            at[rank] += 1
    stuck = [f"rank {r} waits for {' and '.join(map(str, sorted(open_[r])))}" for r in range(len(rows)) if at[r] < len(rows[r])]
    if stuck:
        raise SpecError(f"{program.schedule.name} deadlocks if sends block until they are received: {'; '.join(stuck[:8])}")


def _complete(rank: int, step: Exchange, open_: list[set[Transfer]], happened: list[set[Op]]) -> Iterator[int]:
    """Close the transfers whose other end is open too; yields the peers that may go on."""
    for transfer in step.transfers:
        peer = transfer.peer
        other = _other_end(transfer, rank)
        if other in open_[peer]:
            for here, end in ((rank, transfer), (peer, other)):
                open_[here].remove(end)
                made = Op("F" if end.what == "activation" else "I", end.stage, end.microbatch)
                if end.action == "receive":
                    happened[here].add(made._replace(stage=end.stage + UPSTREAM[made.kind]))
                elif made not in happened[here]:
                    raise SpecError(f"rank {here} has {end} before it was made")
            if not open_[peer]:
                yield peer
