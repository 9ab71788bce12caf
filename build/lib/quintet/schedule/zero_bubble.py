"""Schedules that split the backward: weight gradients wait for nobody and fill what would be bubbles.

Qi et al., "Zero Bubble Pipeline Parallelism", arXiv 2401.10241 (ZB-H1, here zb1p as in DeepSeek's table) and "Pipeline Parallelism with
Controllable Memory", arXiv 2405.15362 (ZB-V).
"""

from __future__ import annotations

from quintet.schedule.classic import looped, warm_up_length
from quintet.schedule.op import Op
from quintet.schedule.table import Schedule
from quintet.schedule.writer import Writer, places


def zb1p(num_ranks: int, num_microbatches: int) -> Schedule:
    """1F1B whose rank r puts off r weight gradients. Bubble (P-1)(F+B-2W), P activations in flight on every rank."""
    return _alternating("zb1p", num_ranks, num_microbatches, chunks=1)


def interleaved_zero_bubble(num_ranks: int, num_microbatches: int, chunks: int) -> Schedule:
    """The same with v = `chunks` stages per rank, in a loop over the ranks. Bubble (P-1)(F+B-2W) of one stage."""
    return _alternating("interleaved-zb", num_ranks, num_microbatches, chunks=chunks)


def _alternating(name: str, num_ranks: int, num_microbatches: int, *, chunks: int) -> Schedule:
    rows = []
    for rank in range(num_ranks):
        row = looped(rank, num_ranks, num_microbatches, chunks=chunks)
        warm_up = warm_up_length(rank, num_ranks, num_microbatches, chunks=chunks, lead=1)
        steady = chunks * num_microbatches - warm_up
        put_off, put_off_later = min(rank, steady), min(max(rank - steady, 0), warm_up)
        row.write("F", times=warm_up)
        row.write("F I", times=put_off)
        row.write("F I W", times=steady - put_off)
        row.write("I", times=put_off_later)
        row.write("I W", times=warm_up - put_off_later)
        rows.append(row.finish())
    routes = (tuple(range(num_ranks)) * chunks,)
    return Schedule(name=name, num_microbatches=num_microbatches, routes=routes, table=tuple(rows))


def zbv(num_ranks: int, num_microbatches: int) -> Schedule:
    """Two stages per rank in a V, so that the last stage lies on rank 0 beside the first. With F = I = W no rank idles between its first
    and last op; a step that ends for all ranks together keeps the skew (P-1) F of a stage. P activations (of a rank's share) in flight.

    Fewer than 2P - 1 micro-batches: the order for 2P - 1, with the others left out.
    """
    count = max(num_microbatches, 2 * num_ranks - 1)
    rows = []
    for rank in range(num_ranks):
        down, up = places(rank, range(count)), places(2 * num_ranks - 1 - rank, range(count))
        row = Writer({"0": down, "1": up}, {"0": down, "1": up})
        row.write("F0", times=2 * (num_ranks - rank) - 1)
        row.write("F1 F0", times=rank)
        row.write("F1 I1 W1", times=num_ranks - rank)
        row.write("F0 I0 W0 F1 I1 W1", times=count - 2 * num_ranks + rank + 1)
        row.write("I0 W0 F1 I1 W1", times=num_ranks - rank - 1)
        row.write("I0 I1", times=rank)
        row.write("I0 W0", times=num_ranks - rank)
        row.write("W1", times=rank)
        rows.append(tuple(op for op in row.finish() if isinstance(op, Op) and op.microbatch < num_microbatches))
    return Schedule(name="zbv", num_microbatches=num_microbatches, routes=(v_route(num_ranks),), table=tuple(rows))


def v_route(num_ranks: int) -> tuple[int, ...]:
    """The ranks of 2P stages that go down the ranks and up again."""
    return (*range(num_ranks), *reversed(range(num_ranks)))
