"""A deterministic weighted mixture: which source each sequence comes from, with shares exact to within one sequence.

Tijdeman's solution of the chairman assignment problem (Discrete Mathematics 32, 1980): among the sources whose deficit has
reached 1 / (2n - 2) the one whose deadline is earliest is next. After any number of sequences every source's count differs
from its exact share by at most 1 - 1 / (2n - 2). (Taking the largest deficit alone does not bound it by one for many sources.)
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import lcm


class Mixture:
    """`next()` names the source of the next sequence; `counts` (sequences so far per source) is the whole state."""

    def __init__(self, weights: Sequence[float], counts: Sequence[int] | None = None) -> None:
        """`weights` are positive and relative; `counts` continues from there."""
        exact = [Fraction(weight) for weight in weights]
        scale = lcm(*(weight.denominator for weight in exact))
        self._weights = [int(weight * scale) for weight in exact]
        self._total = sum(self._weights)
        self.counts = list(counts) if counts is not None else [0] * len(exact)
        assert len(self.counts) == len(exact) > 0 and min(self._weights) > 0

    def next(self) -> int:
        """Index of the source of the next sequence."""
        m = max(2 * len(self.counts) - 2, 1)
        k = sum(self.counts) + 1
        chosen, deadline = -1, (0, 1)
        for i, (weight, count) in enumerate(zip(self._weights, self.counts, strict=True)):
            if m * (weight * k - count * self._total) >= self._total:
                # The sequence number by which source i must come again, times constants: (count + 1 - 1/m) / weight.
                due = (m * count + m - 1, weight)
                if chosen < 0 or due[0] * deadline[1] < deadline[0] * due[1]:
                    chosen, deadline = i, due
        self.counts[chosen] += 1
        return chosen
