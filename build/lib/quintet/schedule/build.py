"""Schedules by name."""

from __future__ import annotations

from collections.abc import Callable

from quintet.errors import SpecError, did_you_mean
from quintet.schedule.classic import gpipe, interleaved, one_f_one_b
from quintet.schedule.dualpipe import dualpipe, dualpipev
from quintet.schedule.table import Schedule
from quintet.schedule.zero_bubble import interleaved_zero_bubble, zb1p, zbv

_FIXED: dict[str, Callable[[int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "zb1p": zb1p,
    "zbv": zbv,
    "dualpipev": dualpipev,
    "dualpipe": dualpipe,
}
_CHUNKED: dict[str, Callable[[int, int, int], Schedule]] = {"interleaved": interleaved, "interleaved-zb": interleaved_zero_bubble}

NAMES = ("gpipe", "1f1b", "interleaved", "zb1p", "interleaved-zb", "zbv", "dualpipev", "dualpipe")


def fewest_microbatches(name: str, num_ranks: int) -> int:
    """The fewest micro-batches that the schedule of this name takes."""
    return 2 * num_ranks if name in ("dualpipe", "dualpipev") else 1


def build(name: str, num_ranks: int, num_microbatches: int, *, chunks: int = 2) -> Schedule:
    """The schedule of this name; `chunks` is how many stages a rank holds in the interleaved ones.

    Raises SpecError for an unknown name, and for ranks, micro-batches or chunks that the schedule does not take.
    """
    if name not in NAMES:
        raise SpecError(f"{name!r} is not a schedule{did_you_mean(name.lower(), NAMES)}; schedules: {', '.join(NAMES)}")
    if num_ranks < 1 or num_microbatches < 1:
        raise SpecError(f"num_ranks ({num_ranks}) and num_microbatches ({num_microbatches}) must be at least 1")
    if name in _FIXED:
        return _FIXED[name](num_ranks, num_microbatches)
    if chunks < 2:
        raise SpecError(f"chunks ({chunks}) must be at least 2 for {name}; with 1 it is {'1f1b' if name == 'interleaved' else 'zb1p'}")
    return _CHUNKED[name](num_ranks, num_microbatches, chunks)
