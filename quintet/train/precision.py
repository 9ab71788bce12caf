"""Choosing the dtype of the weights: bf16 with fp32 masters in the optimizer, or fp32."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from quintet.spec.run import Precision

DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


def cast(model: nn.Module, precision: Precision) -> tuple[Iterable[tuple[str, nn.Parameter]], dict[str, Tensor]]:
    """Round the parameters to the precision, leaving buffers (the router's bias) as they are.

    Returns the parameters by name, and the fp32 values that rounding lost, from which the masters start.
    """
    masters: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.dtype != DTYPES[precision]:
            masters[name] = parameter.detach()
            parameter.data = parameter.detach().to(DTYPES[precision])
    return model.named_parameters(), masters
