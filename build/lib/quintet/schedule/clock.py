"""When each op of a schedule starts and ends, given how long everything takes: the one walk that `lower`, `check` and simulator share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from quintet.errors import SpecError
from quintet.schedule.op import UPSTREAM, does, needs
from quintet.schedule.table import Schedule


@dataclass(frozen=True, kw_only=True)
class Durations:
    """Seconds of everything that a schedule does. Lists have one entry per stage."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    """Of a full backward (B)."""
    backward_input: tuple[float, ...]
    weight: tuple[float, ...]
    pair: Mapping[tuple[int, int], float] = field(default_factory=dict)
    """Of a pair by (stage of the forward, stage of the backward); the sum of both where it is missing."""
    latency: float = 0.0
    """Of a message to another rank, besides the time that the link is busy with it."""
    wire: float = 0.0
    """How long a message keeps the link from one rank to another busy; messages of one link follow each other."""


def unit(schedule: Schedule) -> Durations:
    """A tick for F, I and W, two for B, three for a pair, none for messages."""
    one, two = (1.0,) * schedule.num_stages, (2.0,) * schedule.num_stages
    return Durations(forward=one, backward=two, backward_input=one, weight=one)


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """What happens when, in seconds from the start of the step; lists are per rank and run along the schedule's rows."""

    schedule: Schedule
    starts: list[list[float]]
    ends: list[list[float]]
    waits: list[float]
    """Per rank, the time it idled although what it waited for had been computed and was only under way."""

    @property
    def makespan(self) -> float:
        """When the last rank is done."""
        return max((ends[-1] for ends in self.ends if ends), default=0.0)

    def busy(self, rank: int) -> float:
        """Seconds that a rank works."""
        return sum(self.ends[rank]) - sum(self.starts[rank])


def walk(schedule: Schedule, durations: Durations) -> Timeline:
    """Every rank works through its row as soon as its inputs have arrived. Sending costs the sender nothing and needs no receiver.

    Raises SpecError where ranks wait for each other, with what each of them waits for.
    """
    table, width, last = schedule.table, schedule.num_stages + 1, schedule.num_stages - 1
    seconds = {"F": durations.forward, "B": durations.backward, "I": durations.backward_input, "W": durations.weight}
    pairs = _pairs(schedule, durations)
    wire, latency = durations.wire, durations.latency
    routes = [schedule.routes[schedule.direction(microbatch)] for microbatch in range(schedule.num_microbatches)]
    # When a stage's input has arrived, and when it was made: in slot `microbatch * width + stage`, by kind of the op that takes it.
    arrived = _inputs(schedule)
    made = _inputs(schedule) if wire or latency else arrived
    waiting: dict[str, dict[int, int]] = {"F": {}, "I": {}}
    waiting["B"] = waiting["I"]
    starts: list[list[float]] = [[] for _ in table]
    ends: list[list[float]] = [[] for _ in table]
    waits = [0.0] * len(table)
    link_free: dict[tuple[int, int], float] = defaultdict(float)
    runnable = list(range(len(table)))[::-1]
    while runnable:
        rank = runnable.pop()
        row, row_starts, row_ends = table[rank], starts[rank], ends[rank]
        now = row_ends[-1] if row_ends else 0.0
        for position in range(len(row_ends), len(row)):
            ops = row[position].ops
            start = computed = now
            for kind, stage, microbatch in ops:
                if kind == "W":
                    continue
                slot = microbatch * width + stage
                arrival = arrived[kind][slot]
                if arrival < 0:
                    waiting[kind][slot] = rank
                    break
                if arrival > start:
                    start = arrival
                if made[kind][slot] > computed:
                    computed = made[kind][slot]
            else:
                now = start + (pairs[ops[0][1], ops[1][1]] if len(ops) == 2 else seconds[kind][stage])
                waits[rank] += start - computed
                row_starts.append(start)
                row_ends.append(now)
                for kind, stage, microbatch in ops:
                    if kind == "W":
                        continue
                    target = stage - UPSTREAM[kind]
                    if target < 0 or target > last:
                        continue
                    slot = microbatch * width + target
                    made[kind][slot] = arrival = now
                    peer = routes[microbatch][target]
                    if peer != rank:
                        if wire:
                            link_free[rank, peer] = arrival = max(now, link_free[rank, peer]) + wire
                        arrival += latency
                    arrived[kind][slot] = arrival
                    if slot in waiting[kind]:
                        runnable.append(waiting[kind].pop(slot))
                continue
            break
    timeline = Timeline(schedule=schedule, starts=starts, ends=ends, waits=waits)
    _refuse_unfinished(timeline)
    return timeline


def _inputs(schedule: Schedule) -> dict[str, list[float]]:
    """A time for every input of every stage, -1 where it is not there yet; what comes from outside the pipeline is there from the start."""
    activations = ([0.0] + [-1.0] * schedule.num_stages) * schedule.num_microbatches
    gradients = ([-1.0] * (schedule.num_stages - 1) + [0.0, -1.0]) * schedule.num_microbatches
    return {"F": activations, "I": gradients, "B": gradients}


def _pairs(schedule: Schedule, durations: Durations) -> dict[tuple[int, int], float]:
    """Seconds of every pair that can be: of any two stages that share a rank."""
    return {
        (forward, backward): durations.pair.get((forward, backward), durations.forward[forward] + durations.backward[backward])
        for held in schedule.stages
        for _, forward in held
        for _, backward in held
    }


def _refuse_unfinished(timeline: Timeline) -> None:
    schedule, ends = timeline.schedule, timeline.ends
    next_up = {rank: row[len(ends[rank])] for rank, row in enumerate(schedule.table) if len(ends[rank]) < len(row)}
    if next_up:
        happened = {op for row, row_ends in zip(schedule.table, ends, strict=True) for work in row[: len(row_ends)] for op in does(work)}
        waits = []
        for rank, work in next_up.items():
            missing = [str(op) for op in needs(work, num_stages=schedule.num_stages) if op not in happened]
            waits.append(f"rank {rank} waits at {work} for {' and '.join(missing)}")
        raise SpecError(f"the schedule {schedule.name} cannot finish: {'; '.join(waits[:8])}{'; ...' if len(waits) > 8 else ''}")
