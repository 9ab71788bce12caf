"""A time that no schedule on the same routes and costs can beat."""

from __future__ import annotations

from itertools import pairwise

from quintet.plan.costs import Costs, durations, stages
from quintet.schedule.clock import Durations
from quintet.schedule.table import Schedule


def lower_bound(schedule: Schedule, costs: Costs, *, memory: float | None = None) -> float:
    """Seconds below which no order of the schedule's work can get, whatever it pairs and splits; `memory` limits a rank's activations.

    For each rank: before the first gradient reaches it, at `first`, it can only run forwards, from `head` on, and no more than memory
    holds. After its last forward a path of at least `tail` leads to the end of the step, on which it can only run backwards. Between the
    two lies the rest of its work. Forwards without a partner cost what their pairs would have gained; the bound is the least over their
    number.
    """
    d = durations(schedule, costs)
    cut = stages(costs, num_ranks=schedule.num_ranks, num_stages=schedule.num_stages)
    each = schedule.num_microbatches // len(schedule.routes)
    best = 0.0
    for held in schedule.stages:
        mine = [stage for _, stage in held]
        window, first, tail = _path(schedule, held, d)
        forward, backward = max(d.forward[s] for s in mine), max(d.backward[s] for s in mine)
        gain = max(0.0, *(d.forward[f] + d.backward[b] - d.pair[f, b] for f in mine for b in mine))
        work = each * sum(d.forward[s] + d.backward[s] for s in mine)
        count = each * len(held)
        smallest = min(cut[s].activation_bytes for s in mine)
        room = count if memory is None or smallest == 0 else min(count, int(memory / smallest + 1e-9))
        saved = [min(window, min(n, room) * forward) + (count - n) * gain - max(0.0, tail - n * backward) for n in range(count)]
        # Without any pair, the last forward may lie before the first gradient, and its tail with it.
        saved.append(min(window, room * forward))
        best = max(best, first + work - max(saved))
    return best


def _path(schedule: Schedule, held: tuple[tuple[int, int], ...], d: Durations) -> tuple[float, float, float]:
    """Seconds between the first activation and the first gradient that reach a rank, until the latter, and after its last forward."""
    heads, firsts, tails = [], [], []
    for direction, stage in held:
        hops = [d.latency + d.wire if here != there else 0.0 for here, there in pairwise(schedule.routes[direction])]
        there_and_back = sum(hops) + sum(hops[stage:])
        heads.append(sum(d.forward[:stage]) + sum(hops[:stage]))
        firsts.append(sum(d.forward) + sum(d.backward_input[stage + 1 :]) + there_and_back)
        tails.append(sum(d.forward[stage + 1 :]) + sum(d.backward_input) + d.weight[0] + there_and_back)
    return min(firsts) - min(heads), min(firsts), min(tails)
