"""Why a measured step of a pipeline takes longer than the simulated one: the chain of ops that it waited for, and what each of them cost.

A step ends with some op. That op began when the later of two things was over: the op before it on its rank, and the op whose result it
needs. Followed to the beginning, this is a chain without gaps but those of a runtime: from the end of one op of the chain to the begin of
the next, on one rank (a turn) or by way of a message. The measured step is the sum of the chain; the simulated step is at least the sum of
what its ops take on paper. So the difference falls apart into ops that took longer, turns, messages, a late start, and what the chain is
shorter on paper than the longest one there.
"""

from __future__ import annotations

from dataclasses import dataclass

from quintet.schedule.clock import Timeline
from quintet.schedule.op import does, needs


@dataclass(frozen=True, kw_only=True)
class Link:
    """An op of the chain."""

    rank: int
    position: int
    """In the rank's row."""
    gap: float
    """Seconds from the end of the op before it in the chain to its begin."""
    by_message: bool
    """Whether that op is another rank's."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What adds up to measured less simulated seconds."""

    measured: float
    simulated: float
    num_ops: int
    ops: float
    """What the chain's ops took longer than on paper."""
    num_turns: int
    turns: float
    """From op to op on one rank."""
    num_messages: int
    messages: float
    """From op to op of two ranks, beyond what messages take on paper."""
    start: float
    """Before the chain's first op."""
    other_chain: float
    """What the chain takes less on paper than the longest one there; not positive."""

    def __str__(self) -> str:
        parts = (
            f"ops {_ms(self.ops)} ({_each(self.ops, self.num_ops)})",
            f"{self.num_turns} turns on a rank {_ms(self.turns)} ({_each(self.turns, self.num_turns)})",
            f"{self.num_messages} messages {_ms(self.messages)} ({_each(self.messages, self.num_messages)})",
            f"the start {_ms(self.start)}, and {_ms(self.other_chain)} that this chain takes less on paper than the longest there",
        )
        more = f"a difference of {_ms(self.measured - self.simulated)}, along the chain of {self.num_ops} ops that ended last"
        return f"measured {self.measured:.4g} s, simulated {self.simulated:.4g} s, {more}: {', '.join(parts)}"


def chain(timeline: Timeline) -> list[Link]:
    """The ops that the last op of a timeline waited for, one behind the other, first to last."""
    table, num_stages = timeline.schedule.table, timeline.schedule.num_stages
    made = {op: (rank, position) for rank, row in enumerate(table) for position, work in enumerate(row) for op in does(work)}
    at = max(((rank, len(row) - 1) for rank, row in enumerate(table) if row), key=lambda place: timeline.ends[place[0]][place[1]])
    found: list[Link] = []
    while True:
        rank, position = at
        before = [(rank, position - 1)] if position else []
        before += [made[op] for op in needs(table[rank][position], num_stages=num_stages)]
        if not before:
            found.append(Link(rank=rank, position=position, gap=timeline.starts[rank][position], by_message=False))
            return found[::-1]
        last = max(before, key=lambda place: timeline.ends[place[0]][place[1]])
        gap = timeline.starts[rank][position] - timeline.ends[last[0]][last[1]]
        found.append(Link(rank=rank, position=position, gap=gap, by_message=last[0] != rank))
        at = last


def difference(measured: Timeline, simulated: Timeline, *, message: float = 0.0) -> Difference:
    """Both are of one schedule; `message` is what a message takes on paper, in seconds."""
    assert measured.schedule == simulated.schedule
    links = chain(measured)

    def seconds(of: Timeline) -> float:
        return sum(of.ends[link.rank][link.position] - of.starts[link.rank][link.position] for link in links)

    turns, messages = ([link.gap for link in links[1:] if link.by_message == sent] for sent in (False, True))
    return Difference(
        measured=measured.makespan,
        simulated=simulated.makespan,
        num_ops=len(links),
        ops=seconds(measured) - seconds(simulated),
        num_turns=len(turns),
        turns=sum(turns),
        num_messages=len(messages),
        messages=sum(messages) - message * len(messages),
        start=links[0].gap,
        other_chain=seconds(simulated) + message * len(messages) - simulated.makespan,
    )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds + 0.0:+.1f} ms"


def _each(seconds: float, count: int) -> str:
    return f"{1e3 * seconds / count + 0.0:+.2f} each" if count else "none"
