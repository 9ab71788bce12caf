"""The degrees of parallelism, and every rule between them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from quintet.errors import SpecError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many ways each dimension is split; all 1 is a single device."""

    dp: int = 1
    """Data-parallel replicas."""
    tp: int = 1
    """Tensor-parallel ways."""
    pp: int = 1
    """Pipeline stages."""
    ep: int = 1
    """Expert-parallel ways, inside dp x cp."""
    cp: int = 1
    """Context-parallel ways: the sequence is split."""
    zero: Literal[0, 1, 2, 3] = 0
    """ZeRO stage: what the data-parallel replicas shard (1 optimizer, 2 and gradients, 3 and weights)."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name != "zero" and getattr(self, field.name) < 1:
                raise SpecError(f"{field.name} ({getattr(self, field.name)}) must be at least 1")
        if (self.dp * self.cp) % self.ep:
            divisors = [d for d in range(1, self.dp * self.cp + 1) if (self.dp * self.cp) % d == 0]
            raise SpecError(f"dp x cp ({self.dp * self.cp}) must be divisible by ep ({self.ep}); choose ep from {divisors}")

    @property
    def num_ranks(self) -> int:
        """Devices that the layout takes."""
        return self.dp * self.tp * self.pp * self.cp
