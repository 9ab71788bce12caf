"""The one recipe that makes a single-device model parallel, from outside: its seams, its parameters, its traffic."""

from __future__ import annotations

import torch

from quintet.cost.balance import part_at
from quintet.model.attention import LatentAttention
from quintet.model.transformer import Transformer
from quintet.parallel.expert import apply_expert
from quintet.parallel.mesh import Mesh
from quintet.parallel.precision import DTYPES
from quintet.parallel.sequence import RingAttention
from quintet.parallel.tensor import apply_tensor
from quintet.parallel.zero import ShardedParameters
from quintet.spec.run import Train

WITHIN_NODE, BETWEEN_NODES = 200e9, 50e9
"""Bytes per second of a link of an H800 node (V3 3.1): what decides whether latents or keys and values go round the ring."""


def parallelize(model: Transformer, mesh: Mesh, train: Train, *, device: torch.device) -> ShardedParameters:
    """Fit a model on the meta device to this rank of the mesh: its part of the pipeline, tensor, expert and sequence seams, recomputation,
    then ZeRO's buckets, which bring the parameters (0 until they are filled) to `device` in the precision that training has."""
    if mesh.layout.pp > 1:
        model.keep(part_at(model.model, mesh.layout, mesh.at.pp).holds)
        model.in_steps = True
    apply_tensor(model, mesh)
    apply_expert(model, mesh)
    if mesh["cp"].size > 1:
        within_node = len(mesh.layout.nodes_of(mesh["cp"].ranks)) == 1
        ring = RingAttention(mesh["cp"], link_bytes_per_second=WITHIN_NODE if within_node else BETWEEN_NODES)
        for part in model.modules():
            if isinstance(part, LatentAttention):
                part.attend = ring
    model.set_recompute(train.recompute)
    return ShardedParameters(model, mesh, dtype=DTYPES[train.precision], device=device)
