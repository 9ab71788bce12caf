"""Schedules with a full backward: GPipe, 1F1B and interleaved 1F1B.

GPipe: Huang et al., arXiv 1811.06965. 1F1B: PipeDream-flush, Narayanan et al., arXiv 2006.09503.
Interleaved: Narayanan et al., arXiv 2104.04473.
"""

from __future__ import annotations

from quintet.schedule.table import Schedule
from quintet.schedule.writer import Place, Writer


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards. Bubble (P-1)(F+B), all M activations in flight."""
    rows = []
    for rank in range(num_ranks):
        row = looped(rank, num_ranks, num_microbatches, chunks=1)
        row.write("F", times=num_microbatches)
        row.write("B", times=num_microbatches)
        rows.append(row.finish())
    return Schedule(name="gpipe", num_microbatches=num_microbatches, routes=(tuple(range(num_ranks)),), table=tuple(rows))


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """One forward, one backward once the pipeline is full. Bubble (P-1)(F+B), P activations in flight on rank 0, one on the last."""
    return _alternating("1f1b", num_ranks, num_microbatches, chunks=1, lead=1)


def interleaved(num_ranks: int, num_microbatches: int, chunks: int) -> Schedule:
    """1F1B with v = `chunks` stages per rank, in a loop over the ranks. Bubble (P-1)(F+B) of one stage, for more messages and memory.

    Any number of micro-batches: they pass the loop in rounds of P or somewhat more (see `rounds`), not in rounds of equal size.
    """
    return _alternating("interleaved", num_ranks, num_microbatches, chunks=chunks, lead=2)


def _alternating(name: str, num_ranks: int, num_microbatches: int, *, chunks: int, lead: int) -> Schedule:
    rows = []
    for rank in range(num_ranks):
        row = looped(rank, num_ranks, num_microbatches, chunks=chunks)
        warm_up = warm_up_length(rank, num_ranks, num_microbatches, chunks=chunks, lead=lead)
        row.write("F", times=warm_up)
        row.write("F B", times=chunks * num_microbatches - warm_up)
        row.write("B", times=warm_up)
        rows.append(row.finish())
    routes = (tuple(range(num_ranks)) * chunks,)
    return Schedule(name=name, num_microbatches=num_microbatches, routes=routes, table=tuple(rows))


def rounds(num_ranks: int, num_microbatches: int) -> list[range]:
    """Micro-batches cut into rounds that pass one chunk after the other: as many as hold P, of sizes that differ by one at most.

    A round below P would leave every rank idle at each turn of the loop, so the remainder is spread. 120 at P = 16: one of 18, six of 17.
    """
    count = max(1, num_microbatches // num_ranks)
    small, larger = divmod(num_microbatches, count)
    sizes = [small + (i < larger) for i in range(count)]
    starts = [sum(sizes[:i]) for i in range(count)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def warm_up_length(rank: int, num_ranks: int, num_microbatches: int, *, chunks: int, lead: int) -> int:
    """Forwards before the first backward's own: a round through all chunks but the last, and `lead` for every rank that follows."""
    first_round = len(rounds(num_ranks, num_microbatches)[0])
    return min((chunks - 1) * first_round + lead * (num_ranks - 1 - rank), chunks * num_microbatches)


def looped(rank: int, num_ranks: int, num_microbatches: int, *, chunks: int) -> Writer:
    """A writer with the one forward and the one backward order of a rank whose stages are rank, rank + P, rank + 2P, ..."""
    forwards: list[Place] = []
    backwards: list[Place] = []
    for microbatches in rounds(num_ranks, num_microbatches):
        for chunk in range(chunks):
            forwards += [(chunk * num_ranks + rank, m) for m in microbatches]
            backwards += [((chunks - 1 - chunk) * num_ranks + rank, m) for m in microbatches]
    return Writer({"": forwards}, {"": backwards})
