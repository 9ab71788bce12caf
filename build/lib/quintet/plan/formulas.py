"""The published bubbles and activation counts of the schedules, to set beside what is simulated.

DeepSeek-V3 report, table 2; for interleaved 1F1B arXiv 2104.04473, section 2.2; for ZB-V arXiv 2405.15362. All are exact for F = I = W,
equal stages, no message time, nothing gained from overlap and enough micro-batches; GPipe's and 1F1B's for other times too.
"""

from __future__ import annotations

from dataclasses import dataclass

from quintet.plan.costs import Costs, share_of_rank
from quintet.schedule.table import Schedule


@dataclass(frozen=True, kw_only=True)
class Formula:
    """What a schedule's formula says."""

    text: str
    """With F, B = I + W, W and F&B of a rank's share, and P ranks."""
    bubble: float | None
    """Seconds that a rank idles in a step; None where no formula is known."""
    activations: float | None
    """Micro-batches of a rank's share in flight at most; None where no formula is known."""
    parameters: int
    """How often each parameter is held."""


def formula(schedule: Schedule, costs: Costs, *, pair: float) -> Formula:
    """The formula of a schedule, by its name; `pair` is the time of an overlapped pair of two ranks' shares, in seconds."""
    p, m, v = schedule.num_ranks, schedule.num_microbatches, schedule.num_stages // schedule.num_ranks
    share = share_of_rank(costs)
    bubble = None
    if schedule.name in BUBBLES and (m >= p or schedule.name in ("gpipe", "1f1b")):  # with fewer micro-batches the others' do not hold
        bubble = bubble_seconds(
            schedule.name,
            num_ranks=p,
            chunks=v,
            forward=share.forward,
            backward_input=share.backward_input,
            weight=share.weight,
            pair=pair,
        )
    text = BUBBLES.get(schedule.name, "").format(v=v)
    return Formula(text=text, bubble=bubble, activations=peak_microbatches(schedule.name, p, m), parameters=len(schedule.routes))


BUBBLES = {
    "gpipe": "(P-1)(F+B)",
    "1f1b": "(P-1)(F+B)",
    "interleaved": "(P-1)(F+B)/{v}",
    "zb1p": "(P-1)(F+B-2W)",
    "interleaved-zb": "(P-1)(F+B-2W)/{v}",
    "zbv": "(P-1)F/2",
    "dualpipev": "(P-1)/2 (F&B+B-3W)",
    "dualpipe": "(P/2-1)(F&B+B-3W)",
}
"""Schedule -> its bubble's formula."""


def bubble_seconds(name: str, *, num_ranks: int, chunks: int, forward: float, backward_input: float, weight: float, pair: float) -> float:
    """Seconds that a rank idles in a step by the formula of the schedule `name`, one of BUBBLES."""
    p, f, w = num_ranks, forward, weight
    b = backward_input + w
    if name in ("gpipe", "1f1b", "interleaved"):
        return (p - 1) * (f + b) / chunks
    if name in ("zb1p", "interleaved-zb"):
        return (p - 1) * (f + b - 2 * w) / chunks
    if name == "zbv":
        return (p - 1) * f / 2
    return ((p - 1) / 2 if name == "dualpipev" else p / 2 - 1) * (pair + b - 3 * w)


def peak_microbatches(name: str, num_ranks: int, num_microbatches: int) -> float | None:
    """Micro-batches of a rank's share in flight at most; None where no formula is known."""
    p, m = num_ranks, num_microbatches
    known: dict[str, float] = {
        "gpipe": m,
        "1f1b": min(p, m),
        "zb1p": min(p, m),
        "zbv": min(p, m),
        "dualpipev": p + 0.5,
        "dualpipe": p + 1,
    }
    return known.get(name)
