"""The process groups of a rank: made from the layout, one for each axis that it exchanges along."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

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


def make_mesh(layout: Layout, *, seconds: float | None = None) -> Mesh:
    """The groups of this process, whose default process group is open (or needs not be, for a layout of one rank); `seconds` is how long
    they wait for a rank, which torch does not take over from the default group.

    Each rank makes only the groups that it is in, equal ones once, but for that of ep: what waits for experts' rows must not queue behind
    weights and gradients. Raises UsageError unless as many processes were started as the layout
    takes.
    """
    started = dist.get_world_size() if dist.is_initialized() else 1
    require_ranks(layout, started)
    if layout.num_ranks == 1:
        return Mesh(layout, 0, single().groups)
    rank, timeout = dist.get_rank(), None if seconds is None else timedelta(seconds=seconds)
    made: dict[tuple[bool, tuple[int, ...]], dist.ProcessGroup | None] = {(False, tuple(range(started))): dist.group.WORLD}
    groups: dict[str, Group] = {"world": Group("world", tuple(range(started)), rank, dist.group.WORLD)}
    for axis in GROUPS:
        ranks = layout.group_of(rank, axis)
        key = axis == "ep", ranks
        if len(ranks) > 1 and key not in made:
            made[key] = dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True)
        groups[axis] = Group(axis, ranks, ranks.index(rank), made.get(key) if len(ranks) > 1 else None)
    return Mesh(layout, rank, groups)
