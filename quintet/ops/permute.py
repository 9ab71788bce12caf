"""Moving token rows to their experts and back, with gathers in both directions of autograd (no scatter, no atomics).

Letters: T tokens, K experts per token, N = T*K rows sorted by expert, D width.
`token_of_row` [N] names the token of each row, `row_of_slot` [T, K] the row of each token's k-th expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def sort_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """experts [T, K] int -> token_of_row [N], row_of_slot [T, K], rows per expert [E]; stable, so the order is deterministic."""
    flat = experts.reshape(-1)
    slot_of_row = torch.sort(flat, stable=True).indices
    row_of_slot = torch.empty_like(slot_of_row)
    row_of_slot[slot_of_row] = torch.arange(flat.numel(), device=flat.device)
    return slot_of_row // experts.shape[1], row_of_slot.view(experts.shape), torch.bincount(flat, minlength=num_experts)


def sum_rows_reference(rows: Tensor, row_of_slot: Tensor) -> Tensor:
    """rows [N, D], row_of_slot [T, K] -> [T, D]: each token's rows summed in fp32."""
    return rows[row_of_slot].float().sum(1).to(rows.dtype)


def _sum_rows(rows: Tensor, row_of_slot: Tensor) -> Tensor:
    return F.embedding_bag(row_of_slot, rows, mode="sum")


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
        ctx.save_for_backward(row_of_slot)
        return x.index_select(0, token_of_row)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (row_of_slot,) = ctx.saved_tensors
        return _sum_rows(grads[0].contiguous(), row_of_slot), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, token_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
        ctx.save_for_backward(token_of_row)
        return _sum_rows(rows, row_of_slot)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (token_of_row,) = ctx.saved_tensors
        return grads[0].index_select(0, token_of_row), None, None


def spread(x: Tensor, token_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
    """x [T, D] -> [N, D]: a copy of each token's row for each of its experts; backward sums them."""
    out: Tensor = _Spread.apply(x, token_of_row, row_of_slot)
    return out


def collect(rows: Tensor, token_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
    """rows [N, D] -> [T, D]: the sum of each token's rows; backward spreads."""
    out: Tensor = _Collect.apply(rows, token_of_row, row_of_slot)
    return out
