"""A schedule built in one go: every rank, whenever it is free, runs the best of what is there, or waits a little for something better."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Literal

from quintet.plan.costs import Costs, durations, stages
from quintet.schedule.op import UPSTREAM, Op, Pair, Work
from quintet.schedule.table import Schedule


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How ranks choose. Times are in forwards of one stage."""

    forward_waits: float = 1.0
    """How long a forward waits for a backward to pair with."""
    backward_waits: float = 1.0
    """How long a backward waits for a forward to pair with."""
    deep_first: tuple[bool, bool] = (True, True)
    """Whether the deeper of two stages goes first: in forwards, in backwards."""
    most_forwards: tuple[int, ...] = ()
    """Per rank, the most forwards before its first backward; empty: as memory allows."""

    @classmethod
    def drawn(cls, rng: random.Random, num_ranks: int) -> Policy:
        """A policy at random."""
        waits = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
        slope, base = rng.choice((0, 1, 2)), 2 * num_ranks + rng.randint(-1, num_ranks)
        most = tuple(max(2, base - slope * rank + slope * (num_ranks // 2)) for rank in range(num_ranks))
        return cls(
            forward_waits=rng.choice(waits),
            backward_waits=rng.choice(waits),
            deep_first=(rng.random() < 0.5, rng.random() < 0.5),
            most_forwards=most if rng.random() < 0.7 else (),
        )


def greedy(route: tuple[int, ...], num_microbatches: int, costs: Costs, *, limit: float, policy: Policy) -> Schedule | None:
    """A schedule on this route in which no rank keeps more than `limit` bytes of activations; None where the policy runs into a dead end.

    One activation of room is left for the deeper stage of a rank, so that what has entered can always leave.
    """
    empty = Schedule(name="greedy", num_microbatches=num_microbatches, routes=(route,), table=((),) * (max(route) + 1))
    state = _State(empty, costs, limit, policy)
    state.run()
    if sum(len(work.ops) for row in state.rows for work in row if work.kind != "W") < 2 * len(route) * num_microbatches:
        return None
    return Schedule(name="greedy", num_microbatches=num_microbatches, routes=(route,), table=tuple(map(tuple, state.rows)))


class _State:
    """Ranks at work."""

    def __init__(self, schedule: Schedule, costs: Costs, limit: float, policy: Policy) -> None:
        self.route, self.num_microbatches, self.policy = schedule.routes[0], schedule.num_microbatches, policy
        self.durations, self.limit = durations(schedule, costs), limit + 1e-9
        self.size = [stage.activation_bytes for stage in stages(costs, num_ranks=schedule.num_ranks, num_stages=schedule.num_stages)]
        self.kept_for_weight = costs.kept_for_weight
        self.stages = [[stage for _, stage in held] for held in schedule.stages]
        self.rows: list[list[Work]] = [[] for _ in self.stages]
        self.weights: list[list[Op]] = [[] for _ in self.stages]
        self.kept = [0.0] * len(self.stages)
        self.free = [0.0] * len(self.stages)
        # The times at which inputs arrive, per kind and stage in the order of micro-batches, and how many have been used.
        self.arrivals: dict[tuple[str, int], list[float]] = defaultdict(list)
        self.arrivals["F", 0] = [0.0] * schedule.num_microbatches
        self.used: dict[tuple[str, int], int] = defaultdict(int)
        self.events = [(0.0, rank) for rank in range(len(self.stages))]

    def run(self) -> None:
        heapify(self.events)
        while self.events:
            now, rank = heappop(self.events)
            if self.free[rank] <= now:
                self.decide(rank, now)

    def decide(self, rank: int, now: float) -> None:
        """Start something, or come back when the next input arrives."""
        forward, next_forward = self.choose(rank, now, "F")
        backward, next_backward = self.choose(rank, now, "I")
        unit = self.durations.forward[self.stages[rank][0]]
        soon = min(next_forward, next_backward)
        if forward and backward:
            self.start(rank, now, Pair(forward, backward._replace(kind="B")))
        elif backward and next_forward - now > self.policy.backward_waits * unit:
            self.start(rank, now, backward)
        elif forward and next_backward - now > self.policy.forward_waits * unit:
            self.start(rank, now, forward)
        elif self.weights[rank] and self.durations.weight[self.weights[rank][0].stage] <= 1.5 * (soon - now):
            self.start(rank, now, self.weights[rank].pop(0))
        elif soon < math.inf:
            heappush(self.events, (soon, rank))

    def choose(self, rank: int, now: float, kind: str) -> tuple[Op | None, float]:
        """The op of this kind to run now, and when the next one comes."""
        here, soon = [], math.inf
        for stage in self.stages[rank]:
            n = self.used[kind, stage]
            arrivals = self.arrivals[kind, stage]
            if n < len(arrivals) and (kind == "I" or self.has_room(rank, stage)):
                if arrivals[n] <= now:
                    here.append(stage)
                else:
                    soon = min(soon, arrivals[n])
        if not here:
            return None, soon
        stage = (max if self.policy.deep_first[kind == "I"] else min)(here)
        return Op("F" if kind == "F" else "I", stage, self.used[kind, stage]), soon

    def has_room(self, rank: int, stage: int) -> bool:
        """Whether a forward fits into memory and, before the first backward, into the policy."""
        mine, used = self.stages[rank], self.used
        first = not any(used["I", one] for one in mine)
        most = self.policy.most_forwards
        if first and most and stage == mine[0] and sum(used["F", one] for one in mine) >= most[rank]:
            return False
        reserve = self.size[mine[-1]] if stage != mine[-1] else 0.0
        return self.kept[rank] + self.size[stage] + reserve <= self.limit

    def start(self, rank: int, now: float, work: Work) -> None:
        """Run it, and tell where its results go when they will be there."""
        d = self.durations
        if isinstance(work, Pair):
            seconds = d.pair[work.forward.stage, work.backward.stage]
        else:
            seconds = {"F": d.forward, "B": d.backward, "I": d.backward_input, "W": d.weight}[work.kind][work.stage]
        end = now + seconds
        self.rows[rank].append(work)
        self.free[rank] = end
        heappush(self.events, (end, rank))
        for kind, stage, microbatch in work.ops:
            size = self.size[stage]
            change = {"F": 1.0, "I": self.kept_for_weight - 1, "W": -self.kept_for_weight, "B": -1.0}[kind]
            self.kept[rank] += change * size
            if kind == "W":
                continue
            if kind == "I":
                self.weights[rank].append(Op("W", stage, microbatch))
            self.used["F" if kind == "F" else "I", stage] += 1
            self.deliver(kind, stage, rank, end)

    def deliver(self, kind: str, stage: int, rank: int, end: float) -> None:
        last = len(self.route) - 1
        if kind == "F" and stage == last:
            self.arrivals["I", last].append(end)
            return
        queue: Literal["F", "I"] = "F" if kind == "F" else "I"
        target = stage - UPSTREAM[queue]
        if 0 <= target <= last:
            peer = self.route[target]
            at = end + (self.durations.latency + self.durations.wire if peer != rank else 0.0)
            self.arrivals[queue, target].append(at)
            heappush(self.events, (max(at, self.free[peer]), peer))
