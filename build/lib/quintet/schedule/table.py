"""A pipeline schedule as data: which rank does which work in which order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from quintet.schedule.op import Work


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Compute ops only, in the order that each rank runs them; when they run follows from what each of them needs."""

    name: str
    """As `build` knows it."""
    num_microbatches: int
    """Over all directions."""
    routes: tuple[tuple[int, ...], ...]
    """One route per direction: the rank of each stage. One direction is usual; DualPipe has two, the second one mirrored, and so every
    stage on two ranks. Of two directions, the first half of the micro-batches takes route 0, the other half route 1."""
    table: tuple[tuple[Work, ...], ...]
    """One row per rank."""

    @property
    def num_ranks(self) -> int:
        """Rows of the table."""
        return len(self.table)

    @property
    def num_stages(self) -> int:
        """Parts that the model is cut into."""
        return len(self.routes[0])

    def direction(self, microbatch: int) -> int:
        """Which route a micro-batch takes."""
        return microbatch * len(self.routes) // self.num_microbatches

    def rank(self, stage: int, microbatch: int) -> int:
        """The rank that works on this micro-batch at this stage."""
        return self.routes[self.direction(microbatch)][stage]

    @cached_property
    def stages(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """For each rank, the (direction, stage) that it holds, which a rank may do work for."""
        held: list[list[tuple[int, int]]] = [[] for _ in self.table]
        for direction, route in enumerate(self.routes):
            for stage, rank in enumerate(route):
                held[rank].append((direction, stage))
        return tuple(map(tuple, held))

    def __str__(self) -> str:
        return "\n".join(f"rank {rank}: {' '.join(map(str, row))}" for rank, row in enumerate(self.table))
