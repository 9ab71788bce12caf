"""One matrix product per expert over rows sorted by expert: torch's grouped kernel, and a loop as its reference.

Letters: N rows (token-expert pairs), E experts, I inner width, O outer width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quintet.ops.deferred import deferred, parameter_of


def grouped_matmul_reference(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows [N, I], weight [E, O, I], ends [E] (row where each expert's part stops) -> [ends[-1], O], by a loop over experts."""
    begin, parts = 0, []
    for expert, end in enumerate(ends.tolist()):
        parts.append(rows[begin:end] @ weight[expert].t())
        begin = end
    return torch.cat(parts)


def grouped_matmul(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """As the reference, with a weight gradient that can be put off (see ops.deferred) and for weights [E, ..., I] whose middle dims are
    taken as one; and the last entry of `ends` (int32) may be below N: what comes out behind it is undefined.

    The kernel wants rows of a multiple of 16 bytes, and at least one; others take the loop.
    """
    if not rows.shape[0]:
        return rows @ weight.flatten(1, -2)[0].t()  # weights get a gradient of 0, and nobody waits for `ends`
    if any(width * weight.element_size() % 16 for width in (math.prod(weight.shape[1:-1]), weight.shape[-1])):
        return F.pad(grouped_matmul_reference(rows, weight.flatten(1, -2), ends), (0, 0, 0, rows.shape[0] - int(ends[-1])))
    out: Tensor = _GroupedMatmul.apply(rows, weight, ends)
    return out


class _GroupedMatmul(torch.autograd.Function):
    """Autograd's own formula yields the weight's gradient transposed, and a slow copy turns it; here it comes out as it is stored."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, ends)
        ctx.parameter = parameter_of(weight)
        return F.grouped_mm(rows, weight.flatten(1, -2).transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, ends = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_rows = F.grouped_mm(grad, weight.flatten(1, -2), offs=ends) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = deferred(ctx.parameter, lambda: F.grouped_mm(grad.t(), rows, offs=ends).view_as(weight))
        return grad_rows, grad_weight, None
