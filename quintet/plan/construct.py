"""Constructs a schedule for given costs and memory, instead of choosing a named one.

The search begins with every named schedule that memory allows, and with schedules that are built greedily: a rank that is free runs a pair
if it can, waits for a partner that comes soon, and otherwise runs what is there. Then it improves the best of them by simulated annealing:
an op is moved, a pair made or broken, a backward split or joined; the same change may be made on a few ranks at once, and on DualPipe's
routes always on mirror ranks. Each attempt is timed by the same walk that the simulator uses.

Long steps are searched with few micro-batches, enough to fill the pipeline; the middle of what is found is then repeated, since that is
where all good schedules look alike: pairs in turn.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from quintet.errors import SpecError
from quintet.plan.bound import lower_bound
from quintet.plan.costs import Costs, durations, stages
from quintet.plan.greedy import Policy, greedy
from quintet.plan.simulate import Simulation, simulate
from quintet.schedule import NAMES, Op, Pair, Schedule, build, check
from quintet.schedule.clock import Durations, Timeline, walk
from quintet.schedule.op import Kind, Work
from quintet.schedule.zero_bubble import v_route

Token: TypeAlias = tuple[tuple[Kind, int], ...]
"""Work without its micro-batch, which follows from the order: one (kind, n) or a pair's two, for the n-th stage that the rank holds."""
Rows: TypeAlias = list[list[Token]]


@dataclass(frozen=True, kw_only=True)
class Found:
    """The best schedule that was found, and what to compare it with."""

    simulation: Simulation
    named: Simulation | None
    """The fastest named schedule within the same memory; None if there is none."""
    bound: float
    """Seconds that no schedule on the found one's routes can beat, within the same memory."""
    tried: int
    """Schedules that were timed."""


def search(
    num_ranks: int, num_microbatches: int, costs: Costs, *, memory: float, seconds: float, seed: int = 0, once: bool = False
) -> Found:
    """The fastest schedule found in about `seconds` in which no rank keeps more than `memory` activations (of `activation_bytes` each).

    `once` leaves out DualPipe's routes, on which every parameter is held twice. Raises SpecError if nothing fits into the memory.
    """
    rng = random.Random(seed)
    limit = memory * (costs.activation_bytes or 1.0)
    names = [name for name in NAMES if not (once and name == "dualpipe")]
    named = [one for one in _simulated(names, num_ranks, num_microbatches, costs) if max(one.peak_activations) <= limit + 1e-9]
    few = min(num_microbatches, 2 * num_ranks + 2)
    few += (num_microbatches - few) % 2
    short = [one.timeline.schedule for one in _simulated(names, num_ranks, few, costs) if max(one.peak_activations) <= limit + 1e-9]
    short += _greedy(num_ranks, few, costs, limit, rng)
    found = [one.timeline.schedule for one in named] + _greedy(num_ranks, num_microbatches, costs, limit, rng)
    tried = 0
    for start in _fastest(short, costs)[:3]:
        annealing = _Annealing(start, costs, limit, rng)
        tried += annealing.run(seconds / 4)
        found += _stretched(annealing, num_microbatches)
    if not found:
        raise SpecError(f"memory ({memory:g}) holds no schedule of {num_ranks} ranks; choose at least {_least(num_ranks, costs):g}")
    annealing = _Annealing(_fastest(found, costs)[0], costs, limit, rng)
    tried += annealing.run(seconds / 4)
    best = annealing.best if annealing.best.name in NAMES else replace(annealing.best, name="found")
    check(best)
    return Found(
        simulation=simulate(best, costs),
        named=min(named, key=lambda one: one.makespan, default=None),
        bound=lower_bound(best, costs, memory=limit),
        tried=tried,
    )


def _simulated(names: list[str], num_ranks: int, num_microbatches: int, costs: Costs) -> Iterator[Simulation]:
    for name in names:
        try:
            yield simulate(build(name, num_ranks, num_microbatches), costs)
        except SpecError:
            continue


def _fastest(schedules: list[Schedule], costs: Costs) -> list[Schedule]:
    """Distinct schedules, fastest first."""
    distinct = {one.table: one for one in schedules}.values()
    return sorted(distinct, key=lambda one: walk(one, durations(one, costs)).makespan)


def _greedy(num_ranks: int, num_microbatches: int, costs: Costs, limit: float, rng: random.Random) -> list[Schedule]:
    """The best of some greedy schedules on a V."""
    found: list[tuple[float, Schedule]] = []
    for _ in range(max(5, 30_000 // (num_ranks * num_microbatches * 4))):
        schedule = greedy(v_route(num_ranks), num_microbatches, costs, limit=limit, policy=Policy.drawn(rng, num_ranks))
        if schedule is not None:
            found.append((walk(schedule, durations(schedule, costs)).makespan, schedule))
    return [min(found, key=lambda one: one[0])[1]] if found else []


def _least(num_ranks: int, costs: Costs) -> float:
    """Activations of one micro-batch on a V, which is the least that any schedule keeps."""
    cut = stages(costs, num_ranks=num_ranks, num_stages=2 * num_ranks)
    return max(cut[r].activation_bytes + cut[-1 - r].activation_bytes for r in range(num_ranks)) / (costs.activation_bytes or 1.0)


class _Annealing:
    """One search from one schedule."""

    def __init__(self, schedule: Schedule, costs: Costs, limit: float, rng: random.Random) -> None:
        self.schedule, self.rng = schedule, rng
        self.durations: Durations = durations(schedule, costs)
        size = [stage.activation_bytes for stage in stages(costs, num_ranks=schedule.num_ranks, num_stages=schedule.num_stages)]
        self.size = [[size[stage] for _, stage in held] for held in schedule.stages]
        self.kept, self.limit = costs.kept_for_weight, limit + 1e-9
        self.rows = tokens(schedule)
        self.best = schedule
        self.mirrored = len(schedule.routes) == 2 and self.rows == self.rows[::-1]

    def run(self, seconds: float) -> int:
        """Anneal for this long; returns how many schedules were timed."""
        begin, tried = time.monotonic(), 0
        timeline = walk(self.best, self.durations)
        table = self.best.table
        now, best = _score(timeline), timeline.makespan
        while (elapsed := (time.monotonic() - begin) / seconds) < 1:
            changes = self._changes(timeline)
            if not changes or not all(self._fits(rank, row) for rank, row in changes.items()):
                continue
            tried += 1
            rows = [_numbered(self.schedule, rank, changes[rank]) if rank in changes else row for rank, row in enumerate(table)]
            candidate = replace(self.schedule, name="found", table=tuple(rows))
            try:
                new = walk(candidate, self.durations)
            except SpecError:
                accepted = False
            else:
                score, temperature = _score(new), 1e-3 * best * (1 - elapsed) ** 2
                accepted = score <= now or self.rng.random() < math.exp((now - score) / max(temperature, 1e-12 * best))
            if not accepted:
                continue
            self.rows = [changes.get(rank, row) for rank, row in enumerate(self.rows)]
            timeline, now, table = new, score, candidate.table
            if new.makespan < best - 1e-12:
                best, self.best = new.makespan, candidate
        return tried

    def _changes(self, timeline: Timeline) -> dict[int, list[Token]]:
        """New rows of the ranks that change, all by the same move at the same distance from the row's beginning or end."""
        rng, num_ranks = self.rng, len(self.rows)
        rank = rng.randrange(num_ranks)
        row = self.rows[rank]
        position = rng.randrange(len(row))
        if rng.random() < 0.7:
            gaps = [i + 1 for i, (a, b) in enumerate(zip(timeline.ends[rank], timeline.starts[rank][1:], strict=False)) if b - a > 1e-9]
            position = min(len(row) - 1, max(0, rng.choice(gaps) + rng.randint(-3, 3))) if gaps else position
        ranks = range(rank, min(num_ranks, rank + rng.choice((2, 3, num_ranks)))) if rng.random() < 0.25 else range(rank, rank + 1)
        from_end = position - len(row)
        move, seed = rng.choice(MOVES), rng.random()
        found: dict[int, list[Token]] = {}
        for one in ranks:
            at = position if position < len(row) / 2 else from_end + len(self.rows[one])
            changed = move(self.rows[one], at, random.Random(seed)) if 0 <= at < len(self.rows[one]) else None
            if changed is not None and changed != self.rows[one]:
                found[one] = changed
                if self.mirrored:
                    found[num_ranks - 1 - one] = changed[:]
        return found

    def _fits(self, rank: int, row: list[Token]) -> bool:
        """Whether a row's own order is possible: backwards after forwards, weight gradients after their I, activations within the limit."""
        size, num = self.size[rank], len(self.size[rank])
        forwards, backwards, put_off, kept = [0] * num, [0] * num, [0] * num, 0.0
        for token in row:
            available = forwards[token[-1][1]]
            for kind, n in token:
                if kind == "F":
                    forwards[n] += 1
                    kept += size[n]
                elif kind == "W":
                    put_off[n] -= 1
                    kept -= size[n] * self.kept
                    if put_off[n] < 0:
                        return False
                else:
                    backwards[n] += 1
                    if backwards[n] > available:
                        return False
                    put_off[n] += kind == "I"
                    kept -= size[n] * (1.0 if kind == "B" else 1 - self.kept)
                if kept > self.limit:
                    return False
        return True


def _score(timeline: Timeline) -> float:
    """The makespan, and a little of when ranks end and work starts on average, so that progress shows before the makespan falls."""
    ends = sum(row[-1] for row in timeline.ends) / len(timeline.ends)
    starts = sum(sum(row) / len(row) for row in timeline.starts) / len(timeline.starts)
    return timeline.makespan + 0.02 * (ends + starts)


def tokens(schedule: Schedule) -> Rows:
    """A schedule's rows without micro-batches. With two directions, a rank of the second half counts its second direction as the first."""
    rows: Rows = []
    for rank, row in enumerate(schedule.table):
        index = {held: n for n, held in enumerate(_held(schedule, rank))}
        rows.append([tuple((op.kind, index[schedule.direction(op.microbatch), op.stage]) for op in work.ops) for work in row])
    return rows


def numbered(schedule: Schedule, rows: Rows) -> Schedule:
    """Tokens as a schedule on the same routes: every stage takes its micro-batches in order, in forwards as in backwards."""
    return replace(schedule, name="found", table=tuple(_numbered(schedule, rank, row) for rank, row in enumerate(rows)))


def _numbered(schedule: Schedule, rank: int, row: list[Token]) -> tuple[Work, ...]:
    each = schedule.num_microbatches // len(schedule.routes)
    held = _held(schedule, rank)
    forwards, backwards = ([direction * each for direction, _ in held] for _ in range(2))
    put_off: list[list[int]] = [[] for _ in held]
    new: list[Work] = []
    for token in row:
        ops = []
        for kind, n in token:
            if kind == "F":
                microbatch = forwards[n]
                forwards[n] += 1
            elif kind == "W":
                microbatch = put_off[n].pop(0)
            else:
                microbatch = backwards[n]
                backwards[n] += 1
                if kind == "I":
                    put_off[n].append(microbatch)
            ops.append(Op(kind, held[n][1], microbatch))
        new.append(ops[0] if len(ops) == 1 else Pair(*ops))
    return tuple(new)


def _held(schedule: Schedule, rank: int) -> tuple[tuple[int, int], ...]:
    held = schedule.stages[rank]
    return held[::-1] if len(schedule.routes) == 2 and rank >= schedule.num_ranks // 2 else held


def _stretched(annealing: _Annealing, num_microbatches: int) -> Iterator[Schedule]:
    """What was found, with pairs in turn repeated in the middle until there are this many micro-batches, in the ways that can run."""
    found = annealing.best
    extra, over = divmod(num_microbatches - found.num_microbatches, len(found.routes))
    if not extra and not over:
        yield found
        return
    longer = replace(found, num_microbatches=num_microbatches)
    timeline = walk(found, annealing.durations)
    for eighth in range(2, 7):
        rows = [
            _repeated(row, starts, timeline.makespan * eighth / 8, extra)
            for row, starts in zip(tokens(found), timeline.starts, strict=True)
        ]
        if over or not all(annealing._fits(rank, row) for rank, row in enumerate(rows)):
            continue
        candidate = numbered(longer, rows)
        try:
            check(candidate)
        except SpecError:
            continue
        yield candidate


def _repeated(row: list[Token], starts: list[float], middle: float, extra: int) -> list[Token]:
    """The row with `extra` times a pair of each kind after the pair that begins closest to `middle`, or where the row has no two stages
    or pairs, with a forward and a backward."""
    pairs = [i for i, token in enumerate(row) if len(token) == 2]
    if not pairs:
        return row
    at = min(pairs, key=lambda i: abs(starts[i] - middle))
    (_, f), (_, b) = row[at]
    if f == b:
        period: list[Token] = [(("F", n), ("B", n)) for n in sorted({n for token in row for _, n in token})]
    else:
        period = [(("F", b), ("B", f)), (("F", f), ("B", b))]
    return row[: at + 1] + period * extra + row[at + 1 :]


# Moves: each gives a changed copy of a row, or None where it does not apply.


def _shift(row: list[Token], i: int, rng: random.Random) -> list[Token] | None:
    new = row[:]
    token = new.pop(i)
    new.insert(min(len(new), max(0, i + rng.choice((-8, -6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6, 8)))), token)
    return new


def _swap(row: list[Token], i: int, rng: random.Random) -> list[Token] | None:
    new = row[:]
    j = min(len(row) - 1, max(0, i + rng.randint(-8, 8)))
    new[i], new[j] = new[j], new[i]
    return new


def _break_pair(row: list[Token], i: int, rng: random.Random) -> list[Token] | None:
    if len(row[i]) != 2:
        return None
    forward, backward = row[i]
    return [*row[:i], *rng.choice((((forward,), (backward,)), ((backward,), (forward,)))), *row[i + 1 :]]


def _make_pair(row: list[Token], i: int, rng: random.Random) -> list[Token] | None:
    if len(row[i]) == 2 or row[i][0][0] not in "FB":
        return None
    kind = row[i][0][0]
    partners = [
        j for j in range(max(0, i - 5), min(len(row), i + 6)) if len(row[j]) == 1 and row[j][0][0] == ("B" if kind == "F" else "F")
    ]
    if not partners:
        return None
    j = rng.choice(partners)
    new = row[:]
    new[j] = (row[i][0], row[j][0]) if kind == "F" else (row[j][0], row[i][0])
    del new[i]
    return new


def _split(row: list[Token], i: int, rng: random.Random) -> list[Token] | None:
    if len(row[i]) == 2 or row[i][0][0] != "B":
        return None
    n = row[i][0][1]
    new = row[:]
    new[i] = (("I", n),)
    new.insert(min(len(new), i + 1 + rng.choice((0, 0, 1, 2, 3, 5, 8))), (("W", n),))
    return new


def _join(row: list[Token], i: int, rng: random.Random) -> list[Token] | None:
    if len(row[i]) == 2 or row[i][0][0] != "I":
        return None
    n = row[i][0][1]
    weight: Token = (("W", n),)
    later = [j for j in range(i + 1, min(len(row), i + 14)) if row[j] == weight]
    if not later:
        return None
    new = row[:]
    new[i] = (("B", n),)
    del new[rng.choice(later)]
    return new


MOVES: tuple[Callable[[list[Token], int, random.Random], list[Token] | None], ...] = (
    _shift,
    _shift,
    _shift,
    _swap,
    _break_pair,
    _make_pair,
    _make_pair,
    _split,
    _join,
)
