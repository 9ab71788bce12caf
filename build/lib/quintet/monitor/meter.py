"""Throughput, model FLOPs utilization and the time that is left: pure arithmetic on tokens and seconds.

MFU = tokens/s x FLOPs per token / peak FLOP/s (PaLM, arXiv 2204.02311 appendix B). The FLOPs are those the model needs for
one token forward and backward, two per multiply-add, attention included, recomputation left out (`cost.flops` counts them);
the peak is that of dense matrix multiplication in the run's dtype, measured on this machine or published for the device.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Meter:
    """What one token costs and what the machine could do at most."""

    flops_per_token: float
    """FLOPs of training on one token."""
    peak_flops: float | None
    """FLOP/s of all devices together; absent: MFU is not told."""

    def tokens_per_second(self, tokens: int, seconds: float) -> float:
        """Throughput over `seconds`; 0 for no time."""
        return tokens / seconds if seconds > 0 else 0.0

    def mfu(self, tokens: int, seconds: float) -> float | None:
        """Model FLOPs utilization over `seconds`, 0 to 1; None without a peak."""
        if not self.peak_flops:
            return None
        return self.tokens_per_second(tokens, seconds) * self.flops_per_token / self.peak_flops


@dataclass(frozen=True)
class Pace:
    """Seconds per step of the last measurements; their median foretells the rest, so a first step that compiles does not."""

    recent: tuple[float, ...] = ()
    """Seconds per step, oldest first."""
    window: int = 20
    """Measurements that are kept."""

    def after(self, *, steps: int, seconds: float) -> Pace:
        """The pace when `steps` more steps took `seconds`."""
        return Pace((*self.recent, seconds / steps)[-self.window :], self.window) if steps > 0 else self

    def eta(self, steps_left: int) -> float | None:
        """Seconds that `steps_left` steps will take; None before the first measurement."""
        return statistics.median_low(self.recent) * steps_left if self.recent else None


def smoothed(values: list[float], *, weight: float = 0.9) -> list[float]:
    """Exponential moving average without the bias to the start (Adam's correction, arXiv 1412.6980); not-a-numbers are passed over."""
    average, norm, out = 0.0, 0.0, []
    for value in values:
        if value == value and abs(value) != float("inf"):
            average = weight * average + (1 - weight) * value
            norm = weight * norm + (1 - weight)
        out.append(average / norm if norm else value)
    return out
