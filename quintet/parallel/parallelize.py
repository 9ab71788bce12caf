"""The one recipe that makes a single-device model parallel, from outside: its seams, its parameters, its traffic."""

from __future__ import annotations

import torch

from quintet.model.attention import LatentAttention
from quintet.model.transformer import Transformer
from quintet.parallel.expert import apply_expert
from quintet.parallel.mesh import Mesh
from quintet.parallel.precision import DTYPES
from quintet.parallel.sequence import RingAttention
from quintet.parallel.tensor import apply_tensor
from quintet.parallel.zero import ShardedParameters
from quintet.spec.run import Train


def parallelize(model: Transformer, mesh: Mesh, train: Train, *, device: torch.device) -> ShardedParameters:
    """Fit a model on the meta device to this rank of the mesh: tensor, expert and sequence seams, recomputation, then ZeRO's buckets,
    which bring the parameters (0 until they are filled) to `device` in the precision that training has."""
    apply_tensor(model, mesh)
    apply_expert(model, mesh)
    if mesh["cp"].size > 1:
        for part in model.modules():
            if isinstance(part, LatentAttention):
                part.attend = RingAttention(mesh["cp"])
    model.set_recompute(train.recompute)
    return ShardedParameters(model, mesh, dtype=DTYPES[train.precision], device=device)
