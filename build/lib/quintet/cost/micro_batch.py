"""Which size of micro-batches makes a pipeline's step shortest, from how long its stages took with the sizes that were tried.

Small ones fill and drain the pipeline sooner; large ones have less fixed cost each. How much of a stage's seconds is fixed cannot be seen
from one size, so the first change is a trial of the neighbour, half or double, that could gain more at best: if all were in proportion, or
all fixed. From two sizes on a stage's seconds are a line through those that were measured. The step is the walk through the schedule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quintet.cost.balance import WORTH_IT
from quintet.cost.pipeline import fewest_sequences, schedule_of
from quintet.schedule.clock import Durations, walk
from quintet.spec.layout import Layout


def better_micro_batch(layout: Layout, micro_batch: int, measured: Mapping[int, Sequence[float]], *, batch_sequences: int) -> int | None:
    """Half or twice `micro_batch` where a step of `batch_sequences` would be 5 % shorter or more, else None. `measured` has, for sizes
    that ran and this one among them, the seconds of each stage forward and backward."""
    now = step_seconds(layout, micro_batch, measured[micro_batch], batch_sequences=batch_sequences)
    best, found = WORTH_IT * now, None
    for size in ([micro_batch // 2] if micro_batch % 2 == 0 else []) + [2 * micro_batch]:
        fewest = fewest_sequences(layout, size) if layout.schedule is not None else 1
        if batch_sequences < max(size * layout.dp, fewest):
            continue
        seconds = step_seconds(layout, size, expected(size, measured), batch_sequences=batch_sequences)
        if seconds < best:
            best, found = seconds, size
    return found


def expected(size: int, measured: Mapping[int, Sequence[float]]) -> list[float]:
    """Seconds of each stage with micro-batches of `size`: as measured; by a line through two sizes or more; at best, from a single one."""
    if size in measured:
        return list(measured[size])
    if len(measured) == 1:
        ((known, seconds),) = measured.items()
        return [each * min(size / known, 1.0) for each in seconds]
    return [_on_line(size, dict(zip(measured, column, strict=True))) for column in zip(*measured.values(), strict=True)]


def step_seconds(layout: Layout, micro_batch: int, seconds: Sequence[float], *, batch_sequences: int) -> float:
    """Of a step whose stages take so long for each micro-batch, a third of it forward."""
    third = tuple(each / 3 for each in seconds)
    durations = Durations(forward=third, backward=tuple(2 * each for each in third), backward_input=third, weight=third)
    return walk(schedule_of(layout, layout.num_microbatches(batch_sequences, micro_batch)), durations).makespan


def _on_line(size: int, points: Mapping[int, float]) -> float:
    """The least-squares line through (size, seconds), which neither falls nor starts below nothing."""
    mean_x, mean_y = sum(points) / len(points), sum(points.values()) / len(points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points.items()) / sum((x - mean_x) ** 2 for x in points)
    slope = min(max(slope, 0.0), mean_y / mean_x)
    return mean_y + slope * (size - mean_x)
