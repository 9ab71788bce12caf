"""Passes that turn a schedule into what a rank can run: they add messages between ranks.

A program's row mixes compute ops with `Exchange`s. An exchange is a batch of sends and receives that a rank issues together and does not
wait for; a compute op waits for the exchange that brings its input, and a sent tensor is kept until its exchange is over.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias

from quintet.schedule.clock import unit, walk
from quintet.schedule.op import UPSTREAM, Work
from quintet.schedule.table import Schedule


class Transfer(NamedTuple):
    """One end of a message: `send 2F5 to 3` sends the activation that 2F5 made, `receive 3F5 from 2` brings 3F5 its input."""

    action: Literal["send", "receive"]
    what: Literal["activation", "gradient"]
    stage: int
    """This rank's stage: the one that made what is sent, or that needs what is received."""
    microbatch: int
    peer: int
    """The rank at the other end."""

    def __str__(self) -> str:
        op = f"{self.stage}{'F' if self.what == 'activation' else 'B'}{self.microbatch}"
        return f"{self.action} {op} {'to' if self.action == 'send' else 'from'} {self.peer}"


class Exchange(NamedTuple):
    """Transfers that are issued as one batch (`batch_isend_irecv`), in this order."""

    transfers: tuple[Transfer, ...]

    @property
    def kind(self) -> Literal["X"]:
        """The name of its handler."""
        return "X"

    def __str__(self) -> str:
        return f"[{', '.join(map(str, self.transfers))}]"


Step: TypeAlias = Work | Exchange
"""What stands in a program's row."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """A schedule with its messages: what each rank runs, from first to last."""

    schedule: Schedule
    rows: tuple[tuple[Step, ...], ...]
    """One per rank."""

    def __str__(self) -> str:
        return "\n".join(f"rank {rank}: {' '.join(map(str, row))}" for rank, row in enumerate(self.rows))


def forward_only(schedule: Schedule) -> Schedule:
    """The schedule's forwards in their order, for evaluation; nothing is kept for a backward."""
    table = tuple(tuple(op for work in row for op in work.ops if op.kind == "F") for row in schedule.table)
    return replace(schedule, table=table)


def add_transfers(schedule: Schedule) -> Program:
    """The schedule's program. Raises SpecError for a schedule that cannot finish.

    Work and messages are put into one order, by when they begin if every op takes its ticks: a message when what it carries has been made,
    before work that begins at that time. Each rank's row is its share of this one order. So whatever comes first can always go on, even if
    both ends must meet and block until a message is over; and two ranks see the messages between them in the same order.
    """
    timeline = walk(schedule, unit(schedule))
    events: list[tuple[float, int, int, int]] = []  # (when, 0 for messages and 1 for work, rank, position in its row)
    for rank, (starts, ends) in enumerate(zip(timeline.starts, timeline.ends, strict=True)):
        for position in range(len(starts)):
            events.append((starts[position], 1, rank, position))
            events.append((ends[position], 0, rank, position))
    rows: list[list[Step]] = [[] for _ in schedule.table]
    pending: list[list[Transfer]] = [[] for _ in schedule.table]
    for _, is_work, rank, position in sorted(events):
        work = schedule.table[rank][position]
        if not is_work:
            for sender, receiver, at in messages(schedule, work):
                pending[rank].append(sender)
                pending[at].append(receiver)
        else:
            if pending[rank]:
                rows[rank].append(Exchange(tuple(pending[rank])))
                pending[rank] = []
            rows[rank].append(work)
    for row, rest in zip(rows, pending, strict=True):
        if rest:
            row.append(Exchange(tuple(rest)))
    return Program(schedule=schedule, rows=tuple(map(tuple, rows)))


def messages(schedule: Schedule, work: Work) -> list[tuple[Transfer, Transfer, int]]:
    """For each result of `work` that another rank needs: the send, the receive, and the rank that receives."""
    found = []
    for kind, stage, microbatch in work.ops:
        target = -1 if kind == "W" else stage - UPSTREAM[kind]
        if not 0 <= target < schedule.num_stages:
            continue
        source, peer = schedule.rank(stage, microbatch), schedule.rank(target, microbatch)
        if source != peer:
            what: Literal["activation", "gradient"] = "activation" if kind == "F" else "gradient"
            found.append((Transfer("send", what, stage, microbatch, peer), Transfer("receive", what, target, microbatch, source), peer))
    return found
