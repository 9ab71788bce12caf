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
    f, w = share.forward, share.weight
    b = share.backward_input + w
    known: dict[str, tuple[str, float | None, float | None]] = {
        "gpipe": ("(P-1)(F+B)", (p - 1) * (f + b), m),
        "1f1b": ("(P-1)(F+B)", (p - 1) * (f + b), min(p, m)),
        "interleaved": (f"(P-1)(F+B)/{v}", (p - 1) * (f + b) / v, None),
        "zb1p": ("(P-1)(F+B-2W)", (p - 1) * (f + b - 2 * w), min(p, m)),
        "interleaved-zb": (f"(P-1)(F+B-2W)/{v}", (p - 1) * (f + b - 2 * w) / v, None),
        "zbv": ("(P-1)F/2", (p - 1) * f / 2, min(p, m)),
        "dualpipev": ("(P-1)/2 (F&B+B-3W)", (p - 1) / 2 * (pair + b - 3 * w), p + 0.5),
        "dualpipe": ("(P/2-1)(F&B+B-3W)", (p / 2 - 1) * (pair + b - 3 * w), p + 1),
    }
    text, bubble, activations = known.get(schedule.name, ("", None, None))
    return Formula(text=text, bubble=bubble, activations=activations, parameters=len(schedule.routes))
