"""The schedule that the steps of a layout go by: one of a name, or one that was constructed and kept in a file."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from quintet.errors import SpecError
from quintet.schedule import Schedule, build, check, fewest_microbatches
from quintet.schedule.text import read
from quintet.spec.layout import ARRANGEMENT, Layout, PipelineName
from quintet.spec.run import Train

PAIRED: tuple[PipelineName, ...] = ("dualpipev", "dualpipe")
"""Schedules with overlapped pairs."""


def schedule_of(layout: Layout, num_microbatches: int) -> Schedule:
    """The schedule of a step of so many micro-batches on each replica: that of `layout.schedule_file` where it has as many, else the one
    that `layout.schedule` names. Raises SpecError where they are too few, or the file does not suit the layout."""
    return kept_schedule(layout, num_microbatches) or named_schedule(layout, num_microbatches)


@lru_cache
def named_schedule(layout: Layout, num_microbatches: int) -> Schedule:
    """The schedule that `layout.schedule` names. Raises SpecError where the micro-batches are too few."""
    return build(layout.schedule_for(num_microbatches), layout.pp, num_microbatches, chunks=layout.chunks)


def kept_schedule(layout: Layout, num_microbatches: int) -> Schedule | None:
    """The schedule of the layout's file, if there is one and it has so many micro-batches. Raises SpecError."""
    if layout.schedule_file is None:
        return None
    kept = read_schedule(layout.schedule_file)
    require_suited(kept, layout)
    return kept if kept.num_microbatches == num_microbatches else None


@lru_cache
def read_schedule(file: str) -> Schedule:
    """The schedule in a file, which can run. Raises SpecError."""
    try:
        kept = read(Path(file))
        check(kept)
    except SpecError as error:
        raise SpecError(f"layout.schedule_file {file!r}: {error}") from None
    return kept


def fewest_sequences(layout: Layout, micro_batch: int) -> int:
    """The smallest batch, over all replicas, of as many micro-batches as the schedule takes that `layout.schedule` or its default names."""
    fewest = fewest_microbatches(layout.pipeline, layout.pp) if layout.pp > 1 else 1
    rounded = layout.arrangement == "mirror" and fewest % 2 == 0  # an odd number gets an empty one
    return layout.dp * micro_batch * (fewest - 1 - rounded) + 1


def at_odds(layout: Layout, train: Train) -> list[str]:
    """What a pipeline's schedule and recomputation take from each other, each in a sentence."""
    if layout.pp == 1 or train.recompute != "full":
        return []
    told, name = [], layout.pipeline
    if name in PAIRED and layout.ep > 1:
        told.append(
            f"pairs of {name} hide no all-to-all under train.recompute full, which computes whole blocks again inside of their backward; "
            "selective lets them"
        )
    if name not in ("gpipe", "1f1b", "interleaved"):
        told.append(
            f"{name} puts weight gradients off and keeps the inputs of their products until then, which train.recompute full frees; 1f1b "
            "and interleaved put none off"
        )
    return told


def require_suited(kept: Schedule, layout: Layout) -> None:
    """Raise SpecError unless the schedule has the layout's ranks, and its stages lie on them as those of `layout.schedule` do."""
    file = f"layout.schedule_file {layout.schedule_file!r}"
    if kept.num_ranks != layout.pp:
        raise SpecError(f"{file} is for {kept.num_ranks} ranks, but layout.pp is {layout.pp}; set layout.pp, or search one for it")
    if kept.routes != _routes(layout):
        names = suited(kept, layout)
        remedy = f"set layout.schedule to {' or '.join(names)}" if names else "no layout.schedule puts them so"
        chunks = f" and layout.chunks to {kept.num_stages // layout.pp}" if names and names[0].startswith("interleaved") else ""
        raise SpecError(
            f"{file} has its stages on the ranks {[list(route) for route in kept.routes]}, {layout.pipeline} on "
            f"{[list(route) for route in _routes(layout)]}; {remedy}{chunks}"
        )


def suited(schedule: Schedule, layout: Layout) -> list[PipelineName]:
    """The names of `layout.schedule` whose stages lie on the layout's ranks as those of a schedule do."""
    several = schedule.num_stages > layout.pp
    return [
        name
        for name, arrangement in ARRANGEMENT.items()
        if (arrangement != "loop" or several) and schedule.routes == _routes(_named(layout, name, schedule.num_stages))
    ]


def laid_out(schedule: Schedule, layout: Layout) -> Layout:
    """The layout with this schedule's ranks and stages in place of its own. Raises SpecError where no layout has such."""
    at = replace(layout, pp=schedule.num_ranks, cut=None, schedule_file=None)
    names = suited(schedule, at)
    if not names:
        lie = f"{schedule.name} has its stages on the ranks {[list(route) for route in schedule.routes]}"
        raise SpecError(f"{lie}, which no layout has: on one rank it has one stage, on more the stages of a named schedule")
    name = next((name for name in names if name == schedule.name), names[0])
    return replace(at, schedule=name, chunks=max(schedule.num_stages // at.pp, 2) if name.startswith("interleaved") else at.chunks)


def _named(layout: Layout, name: PipelineName, num_stages: int) -> Layout:
    return Layout(pp=layout.pp, schedule=name, chunks=max(num_stages // layout.pp, 1))


def _routes(layout: Layout) -> tuple[tuple[int, ...], ...]:
    """The place of every stage, for micro-batches from each end that they enter at."""
    route = tuple(layout.place_of(stage) for stage in range(layout.num_stages))
    return (route, route[::-1]) if layout.arrangement == "mirror" else (route,)
