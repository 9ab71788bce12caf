"""The dtype that weights and activations have; under bf16, ZeRO's shards keep fp32 masters."""

from __future__ import annotations

import torch
from torch import nn

from quintet.spec.run import Precision

DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


def cast(model: nn.Module, precision: Precision) -> None:
    """Round the parameters to the precision, leaving buffers (the router's bias) as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.detach().to(DTYPES[precision])
