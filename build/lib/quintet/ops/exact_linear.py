"""A linear map computed in fp32 from bf16 inputs, for the router: only the bf16 tensors are kept for backward.

Letters: T tokens, I and O widths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def exact_linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, I], weight [O, I] of any dtype -> x W^T [T, O] in fp32."""
    return x.float() @ weight.float().t()


def exact_linear(x: Tensor, weight: Tensor) -> Tensor:
    """As the reference, whose fp32 copies autograd would keep."""
    out: Tensor = _ExactLinear.apply(x, weight)
    return out


class _ExactLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return exact_linear_reference(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return (grads[0] @ weight.float()).to(x.dtype), (grads[0].t() @ x.float()).to(weight.dtype)
