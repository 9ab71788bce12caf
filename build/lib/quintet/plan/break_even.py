"""How much an overlapped pair must gain before a schedule that is made of pairs pays."""

from __future__ import annotations

from dataclasses import replace

from quintet.plan.costs import Costs
from quintet.plan.simulate import simulate
from quintet.schedule.table import Schedule


def break_even(schedule: Schedule, costs: Costs, *, against: float, precision: float = 0.001) -> float | None:
    """The largest F&B / (F + B) with which the schedule takes no longer than `against` seconds; None if even 0.5 is too much.

    The costs must be given as F, I and W; with a layer's components, the pair follows from them.
    """
    low, high = 0.5, 1.0
    if _makespan(schedule, costs, low) > against:
        return None
    if _makespan(schedule, costs, high) <= against:
        return high
    while high - low > precision:
        middle = (low + high) / 2
        low, high = (middle, high) if _makespan(schedule, costs, middle) <= against else (low, middle)
    return low


def _makespan(schedule: Schedule, costs: Costs, pair: float) -> float:
    return simulate(schedule, replace(costs, pair=pair)).makespan
