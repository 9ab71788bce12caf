"""What one rank of a layout of any size holds: built as training builds it, with all its groups, but without memory or other ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from quintet.cost.balance import part_at
from quintet.model.transformer import Transformer
from quintet.parallel.collectives import Group
from quintet.parallel.mesh import make_mesh
from quintet.parallel.parallelize import parallelize
from quintet.parallel.zero import ShardedParameters
from quintet.spec.placement import Box
from quintet.spec.run import Run
from quintet.spec.stage import Part
from quintet.train.optimizer import AdamW

META = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class HeldBytes:
    """Bytes between steps, padding of the buckets included, and fp32 gradients as they add up over micro-batches."""

    weights: int
    gradients: int
    master: int
    moments: int

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return self.weights + self.gradients + self.master + self.moments


@dataclass(frozen=True, kw_only=True)
class Holding:
    """A rank's groups by axis; its boxes of parameters, by name; and the bytes that these, and what ZeRO leaves of them, take."""

    groups: dict[str, Group]
    part: Part
    boxes: dict[str, Box]
    bytes: HeldBytes


def survey(run: Run, rank: int) -> Holding:
    """Build rank `rank` of the run's layout, however many ranks that has. No process group may be open.

    Its mesh, parameters and optimizer come from the functions that training calls; tensors have shapes only, and groups send nothing.
    """
    layout = run.layout
    with _ranks_that_send_nothing(rank, layout.num_ranks):
        mesh = make_mesh(layout)
        with META:
            model = Transformer(run.model)
        parameters = parallelize(model, mesh, run.train, device=META)
        parameters.fill(lambda piece: torch.empty(piece.box.sizes, device=META))
        held = held_bytes(parameters, AdamW(parameters, run.optimizer))
        boxes = {piece.name: piece.box for bucket in parameters.buckets for piece in bucket.pieces}
        return Holding(groups=mesh.groups, part=part_at(run.model, layout, mesh.at.pp), boxes=dict(sorted(boxes.items())), bytes=held)


def held_bytes(parameters: ShardedParameters, optimizer: AdamW) -> HeldBytes:
    """What the buckets and the optimizer of this rank take between steps; views of one another are counted once."""
    weights = gradients = master = 0
    for bucket in parameters.buckets:
        shard = bucket.master.numel()
        kept = shard if bucket.keeps_shards else bucket.numel
        weights += bucket.weights.element_size() * kept
        gradients += 4 * (shard if parameters.stage >= 2 else bucket.numel)
        master += 0 if bucket.master is bucket.weight_shard else 4 * shard
    moments = sum(moment.numel() * moment.element_size() for moment in (*optimizer.exp_avg, *optimizer.exp_avg_sq))
    return HeldBytes(weights=weights, gradients=gradients, master=master, moments=moments)


@contextmanager
def _ranks_that_send_nothing(rank: int, count: int) -> Iterator[None]:
    """A default process group of `count` ranks of which only this one exists; its collectives return at once."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()

