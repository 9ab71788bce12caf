"""What a rank sends: bytes in forward and in backward, as the formulas of each kind of parallelism yield them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sent:
    """Bytes that one rank sends, or would send (a mean), in forward and in backward, recomputation included."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward

    def __add__(self, other: Sent) -> Sent:
        return Sent(forward=self.forward + other.forward, backward=self.backward + other.backward)
