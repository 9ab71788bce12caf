"""Hypothesis strategies: every schedule at all shapes that it takes."""

from __future__ import annotations

from hypothesis import strategies as st

from quintet.schedule import NAMES, Schedule, build


@st.composite
def schedules(draw: st.DrawFn, *, names: tuple[str, ...] = NAMES, most_ranks: int = 9, most_microbatches: int = 40) -> Schedule:
    """A schedule by name, ranks, micro-batches and chunks."""
    name = draw(st.sampled_from(names))
    ranks = draw(st.integers(1, most_ranks))
    if name == "dualpipe":
        ranks += ranks % 2
    least = 2 * ranks if name.startswith("dualpipe") else 1
    microbatches = draw(st.integers(least, least + most_microbatches))
    if name == "dualpipe":
        microbatches += microbatches % 2
    return build(name, ranks, microbatches, chunks=draw(st.integers(2, 4)))
