"""Refusing an illegal layout with the nearest legal ones, and finding a smaller one that divides the same dimensions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from quintet.errors import SpecError
from quintet.spec.layout import Degree, Layout, broken_rules
from quintet.spec.model import Model

AXES: tuple[Degree, ...] = ("dp", "tp", "pp", "ep", "cp")
_TRIED = 256
"""Degrees of an axis that are looked at one by one."""
_NEAREST = 6
"""Degrees of an axis, legal by themselves, that are combined with those of the others."""
_ENOUGH = 40
"""Legal layouts, found in about the order of their distance, among which the nearest are chosen."""


def require_legal(layout: Layout, model: Model, sequence_lengths: Iterable[int]) -> None:
    """Raise SpecError with every broken rule and the nearest legal layouts."""
    lengths = tuple(sequence_lengths)
    if broken := broken_rules(layout, model, lengths):
        near = nearest_legal(layout, model, lengths)
        remedy = "".join(f"\n  {other} ({other.num_ranks} rank{'s' * (other.num_ranks > 1)})" for other in near)
        raise SpecError("\n".join(broken) + (f"\nnearest legal layouts:{remedy}" if near else ""))


def nearest_legal(layout: Layout, model: Model, sequence_lengths: Iterable[int], *, count: int = 3) -> list[Layout]:
    """Legal layouts that differ least, by the sum of the degrees' ratios in octaves; those of the same number of ranks come first. A single
    device is always legal, so there is at least one."""
    lengths = tuple(sequence_lengths)

    def octaves(degrees: Sequence[int]) -> float:
        return sum(abs(math.log2(degree / layout.degree(axis))) for axis, degree in zip(AXES, degrees, strict=True))

    def distance(other: Layout) -> tuple[float, int]:
        return octaves([other.degree(axis) for axis in AXES]) + 0.5 * (other.num_ranks != layout.num_ranks), other.num_ranks

    tp, pp, ep, cp = (_degrees(axis, layout, model, lengths) for axis in AXES[1:])
    found: list[Layout] = []
    for degrees in sorted(itertools.product(_replicas(layout, ep), tp, pp, ep, cp), key=octaves):
        for other in _with_degrees(layout, *degrees):
            if not broken_rules(other, model, lengths):
                found.append(other)
                break
        if len(found) >= _ENOUGH:
            break
    return sorted(found, key=distance)[:count]


def _degrees(axis: Degree, layout: Layout, model: Model, lengths: Sequence[int]) -> list[int]:
    """The nearest degrees of an axis that no rule forbids where all other degrees are 1; 1 among them."""
    now = layout.degree(axis)
    alone = Layout(schedule=layout.schedule, chunks=layout.chunks, node_size=1)

    def legal(degree: int) -> bool:
        replicas = degree if axis == "ep" else 1  # experts are split over replicas
        changes: dict[str, Any] = {"dp": replicas, axis: degree}
        return not broken_rules(replace(alone, **changes), model, lengths)

    near = sorted({1, now, *_around(now), *range(1, min(2 * now, _TRIED) + 1)}, key=lambda degree: abs(math.log2(degree / now)))
    return [1, *itertools.islice((degree for degree in near if degree > 1 and legal(degree)), _NEAREST)]


def _around(degree: int) -> set[int]:
    """Powers of two and divisors near a degree."""
    powers = {2**i for i in range(14) if degree / 8 <= 2**i <= degree * 4}
    return powers | {d for d in range(max(1, degree // 8), min(degree, 8 * _TRIED) + 1) if degree % d == 0}


def _replicas(layout: Layout, ep: Iterable[int]) -> list[int]:
    """Values of dp near the layout's, among them such as whole nodes and groups of experts take."""
    dp = layout.dp
    units = {unit for degree in ep for unit in (degree, math.lcm(degree, layout.node_size))}
    fitting = {max(1, round(dp / unit)) * unit for unit in units}
    return sorted({1, dp, max(dp - 1, 1), dp + 1} | _around(dp) | fitting)


def _divided(layout: Layout, degrees: Sequence[int], *, zero_ranks: int | None) -> Layout:
    """The layout with other degrees, in the order of `AXES`, and of what else it says that which fits them."""
    dp, tp, pp, ep, cp = degrees
    return replace(
        layout,
        dp=dp,
        tp=tp,
        pp=pp,
        ep=ep,
        cp=cp,
        expert_tp=tp if layout.expert_tp > 1 else 1,
        zero_ranks=zero_ranks,
        zero=min(layout.zero, 1) if pp > 1 else layout.zero,
        cut=None,
        schedule_file=layout.schedule_file if pp == layout.pp > 1 else None,
    )


def _with_degrees(layout: Layout, dp: int, tp: int, pp: int, ep: int, cp: int) -> list[Layout]:
    """The layout with other degrees: experts split over tp if they were and, then, whole."""
    shared = layout.zero_ranks if layout.zero_ranks and dp * cp % layout.zero_ranks == 0 and layout.zero else None
    other = _divided(layout, (dp, tp, pp, ep, cp), zero_ranks=shared)
    return [other, replace(other, expert_tp=1)] if other.expert_tp > 1 else [other]


def fewer_ranks(layout: Layout, model: Model, sequence_lengths: Iterable[int], *, most: int) -> Layout | None:
    """The legal layout of at most `most` ranks, as many as can be, that divides what this one divides: each degree above 1 stays above 1,
    and so, if it can be, do an expert's replicas. None where there is none."""
    lengths = tuple(sequence_lengths)

    def below(degree: int) -> list[int]:
        return [d for d in range(min(degree, most), 1, -1) if degree % d == 0 or d & (d - 1) == 0] if degree > 1 else [1]

    def smaller(degrees: tuple[int, ...]) -> Layout:
        dp, *_, cp = degrees
        shared = next((s for s in below(layout.zero_ranks) if dp * cp % s == 0), dp * cp) if layout.zero_ranks else None
        return _divided(layout, degrees, zero_ranks=shared)

    fitting = (smaller(degrees) for degrees in itertools.product(*(below(layout.degree(axis)) for axis in AXES)))
    legal = [other for other in fitting if other.num_ranks <= most and not broken_rules(other, model, lengths)]

    def good(other: Layout) -> tuple[int, ...]:
        return int((other.expert_dp > 1) == (layout.expert_dp > 1)), other.num_ranks, other.ep, other.pp

    return max(legal, key=good, default=None)
