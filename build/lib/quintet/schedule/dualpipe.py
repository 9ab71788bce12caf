"""DualPipe and DualPipeV: forwards of one half meet backwards of the other, and run as overlapped pairs.

DeepSeek-V3 report, arXiv 2412.19437, section 3.2.1 and table 2; the eight phases and their counts follow github.com/deepseek-ai/DualPipe.

Both are one text. A rank holds two stages, queue 0 for its own half and queue 1 for the other. In DualPipe, ranks of the first half take
direction 0 as their own and those of the second half direction 1, so that the text is the same on mirror ranks r and P-1-r. DualPipeV
folds the mirror images onto one rank: 2P stages in a V, one direction.
"""

from __future__ import annotations

from quintet.errors import SpecError
from quintet.schedule.op import Work
from quintet.schedule.table import Schedule
from quintet.schedule.writer import Writer, places
from quintet.schedule.zero_bubble import v_route


def dualpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """Bidirectional: rank r holds stage r for micro-batches that enter at rank 0 and stage P-1-r for those that enter at rank P-1.

    Bubble (P/2-1)(F&B+B-3W), P+1 activations in flight, every parameter twice. Raises SpecError unless P and M are even and M at least 2P.
    """
    if num_ranks % 2:
        raise SpecError(
            f"num_ranks ({num_ranks}) must be even for dualpipe, whose ranks mirror each other in pairs; "
            f"choose {max(2, num_ranks - 1)}{f' or {num_ranks + 1}' if num_ranks > 1 else ''} ranks, or dualpipev, which takes any number"
        )
    if num_microbatches % 2:
        raise SpecError(
            f"num_microbatches ({num_microbatches}) must be even for dualpipe, which feeds half of them from each end; "
            f"choose {max(2 * num_ranks, num_microbatches + 1)}"
        )
    _refuse_too_few("dualpipe", num_ranks, num_microbatches)
    half, middle = num_microbatches // 2, num_ranks // 2
    rows = []
    for rank in range(num_ranks):
        directions = [places(rank, range(half)), places(num_ranks - 1 - rank, range(half, num_microbatches))]
        own, other = directions if rank < middle else reversed(directions)
        position = min(rank, num_ranks - 1 - rank)
        row = Writer({"0": own, "1": other}, {"0": own, "1": other})
        rows.append(_eight_phases(row, length=middle, position=position, num_pairs=half - num_ranks + position + 1))
    down = tuple(range(num_ranks))
    return Schedule(name="dualpipe", num_microbatches=num_microbatches, routes=(down, down[::-1]), table=tuple(rows))


def dualpipev(num_ranks: int, num_microbatches: int) -> Schedule:
    """DualPipe cut in half: 2P stages in a V, no parameter twice, one direction.

    Bubble (P-1)(F&B+B-3W) of a stage, 2P+1 stage activations in flight. Raises SpecError unless M is at least 2P.
    """
    _refuse_too_few("dualpipev", num_ranks, num_microbatches)
    rows = []
    for rank in range(num_ranks):
        down, up = places(rank, range(num_microbatches)), places(2 * num_ranks - 1 - rank, range(num_microbatches))
        row = Writer({"0": down, "1": up}, {"0": down, "1": up})
        rows.append(_eight_phases(row, length=num_ranks, position=rank, num_pairs=num_microbatches - 2 * num_ranks + rank + 1))
    return Schedule(name="dualpipev", num_microbatches=num_microbatches, routes=(v_route(num_ranks),), table=tuple(rows))


def _eight_phases(row: Writer, *, length: int, position: int, num_pairs: int) -> tuple[Work, ...]:
    """The row of the rank at `position` in a half of `length` ranks, whose main phase has `num_pairs` times two pairs."""
    outer = length - position - 1
    row.write("F0", times=2 * outer)
    row.write("F0 F1", times=position + 1)
    row.write("I1 W F1", times=outer)
    if outer == 0:
        # The middle has nothing to hide in its first pair, and its neighbours wait for the forward.
        row.write("F0 B1 F1&B0")
        num_pairs -= 1
    row.write("F0&B1 F1&B0", times=num_pairs)
    row.write("B1 F1&B0", times=outer)
    _drain(row, position)
    row.write("W I0", times=outer)
    return row.finish()


def _drain(row: Writer, position: int) -> None:
    """Phase 6, `B1 B0` position + 1 times, of which the second half puts its weight gradients off."""
    ops = "B1 B0 " * (position + 1)
    whole = position + 1
    row.write(" ".join(token if i < whole else token.replace("B", "I") for i, token in enumerate(ops.split())))


def _refuse_too_few(name: str, num_ranks: int, num_microbatches: int) -> None:
    if num_microbatches < 2 * num_ranks:
        raise SpecError(
            f"num_microbatches ({num_microbatches}) must be at least 2 x num_ranks ({2 * num_ranks}) for {name}, or its pairs never meet; "
            f"choose {2 * num_ranks} or more micro-batches, at most {num_microbatches // 2} ranks, or zbv, which takes any number"
        )
