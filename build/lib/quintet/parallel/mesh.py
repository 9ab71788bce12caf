"""The process groups of a rank: made from the layout, one for each axis that it exchanges along.

A process group sends one message behind the other, in the order in which it was asked, and all its ranks must ask in the same order: each
rank walks the same rows and graphs, so they do. Axes with the same ranks share a group, but not where one would wait for the other:

    experts' rows                                 in a pair of micro-batches, forward's and backward's in turns
    the numbers of these rows                     which the host waits for: never behind rows of the other micro-batch
    tokens, latents, stages (tp, cp, sequence, pp)    which the next product waits for
    weights, gradients, sums over the step        large, and beside the computation

NCCL makes a group's connections at its first message, of which all its ranks must be a part; a pipeline's first would be of two neighbours.
So every group sends one number when it is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from quintet.errors import UsageError
from quintet.parallel.collectives import Group, alone
from quintet.spec.layout import GROUPS, Coordinates, Layout


@dataclass(frozen=True)
class Mesh:
    """A layout, this rank's place in it, and its groups by axis (the names of `spec.layout.GROUPS`, and `world`)."""

    layout: Layout
    rank: int
    groups: dict[str, Group]

    def __getitem__(self, axis: str) -> Group:
        return self.groups[axis]

    @property
    def at(self) -> Coordinates:
        """This rank's place on each axis."""
        return self.layout.coordinates(self.rank)


def single() -> Mesh:
    """The mesh of one device: every group has one rank, and no process group is needed."""
    return Mesh(Layout(), 0, {axis: alone(axis) for axis in (*GROUPS, "world")})


def require_ranks(layout: Layout, started: int) -> None:
    """Raise UsageError unless as many processes were started as the layout takes."""
    if started != layout.num_ranks:
        raise UsageError(
            f"the layout ({layout}) takes {layout.num_ranks} ranks (pp {layout.pp} x dp {layout.dp} x cp {layout.cp} x tp {layout.tp}), "
            f"but {started} {'process was' if started == 1 else 'processes were'} started; start as many as it takes, for example: "
            f"torchrun --nproc-per-node {layout.num_ranks} -m quintet train RECIPE, or change the layout"
        )


def make_mesh(layout: Layout, *, seconds: float | None = None, device: torch.device | None = None) -> Mesh:
    """The groups of this process, whose default process group is open (or needs not be, for a layout of one rank); `seconds` is how long
    they wait for a rank, which torch does not take over from the default group, and `device` is where messages lie.

    Each rank makes only the groups that it is in. Raises UsageError unless as many processes were started as the layout takes.
    """
    started = dist.get_world_size() if dist.is_initialized() else 1
    require_ranks(layout, started)
    if layout.num_ranks == 1:
        return Mesh(layout, 0, single().groups)
    rank, timeout = dist.get_rank(), None if seconds is None else timedelta(seconds=seconds)
    everybody = tuple(range(started))
    made: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup | None] = {}

    def process_group(use: str, ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
        if len(ranks) > 1 and (use, ranks) not in made:
            is_default = (use, ranks) == ("state", everybody)
            group = dist.group.WORLD if is_default else dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True)
            dist.all_reduce(torch.zeros(1, device=device), group=group)
            made[use, ranks] = group
        return made.get((use, ranks))

    groups: dict[str, Group] = {"world": Group("world", everybody, rank, process_group("state", everybody))}
    for axis in GROUPS:
        ranks = layout.group_of(rank, axis)
        numbers = process_group("numbers of rows", ranks) if axis == "ep" else None
        groups[axis] = Group(axis, ranks, ranks.index(rank), process_group(_USES.get(axis, "state"), ranks), numbers)
    return Mesh(layout, rank, groups)


_USES = {"ep": "rows", "tp": "tokens", "cp": "tokens", "sequence": "tokens", "pp": "tokens"}
"""Axis -> what it shares its process group with; all others with weights and gradients."""
