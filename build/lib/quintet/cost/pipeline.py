"""The schedule that the steps of a layout go by: one of a name, or one that was constructed and kept in a file."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from quintet.errors import SpecError
from quintet.schedule import Schedule, build, check, fewest_microbatches
from quintet.schedule.text import read
from quintet.spec.layout import ARRANGEMENT, Layout


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


def require_suited(kept: Schedule, layout: Layout) -> None:
    """Raise SpecError unless the schedule has the layout's ranks, and its stages lie on them as those of `layout.schedule` do."""
    file = f"layout.schedule_file {layout.schedule_file!r}"
    if kept.num_ranks != layout.pp:
        raise SpecError(f"{file} is for {kept.num_ranks} ranks, but layout.pp is {layout.pp}; set layout.pp, or search one for it")
    if kept.routes != _routes(layout):
        several = kept.num_stages > layout.pp
        suited = [
            name
            for name, arrangement in ARRANGEMENT.items()
            if (arrangement != "loop" or several) and kept.routes == _routes(_named(layout, name, kept.num_stages))
        ]
        remedy = f"set layout.schedule to {' or '.join(suited)}" if suited else "no layout.schedule puts them so"
        chunks = f" and layout.chunks to {kept.num_stages // layout.pp}" if suited and suited[0].startswith("interleaved") else ""
        raise SpecError(
            f"{file} has its stages on the ranks {[list(route) for route in kept.routes]}, {layout.pipeline} on "
            f"{[list(route) for route in _routes(layout)]}; {remedy}{chunks}"
        )


def _named(layout: Layout, name: str, num_stages: int) -> Layout:
    return Layout(pp=layout.pp, schedule=name, chunks=max(num_stages // layout.pp, 1))  # type: ignore[arg-type]


def _routes(layout: Layout) -> tuple[tuple[int, ...], ...]:
    """The place of every stage, for micro-batches from each end that they enter at."""
    route = tuple(layout.place_of(stage) for stage in range(layout.num_stages))
    return (route, route[::-1]) if layout.arrangement == "mirror" else (route,)
