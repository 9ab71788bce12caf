"""Moving token rows to their experts and back, with gathers in both directions of autograd (no scatter-add, no atomics).

Letters: T tokens, K experts per token, E experts, N rows, D width. A row is a copy of a token for one of its experts; rows lie sorted
by expert, and each expert's part is padded to a multiple of ROW_ALIGNMENT. The number E in place of an expert stands for none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROW_ALIGNMENT = 16
"""Rows per expert are a multiple of this. A dropless router gives every expert another number of rows at every step, and oneDNN
generates code anew for each size of matrix, which takes as long as the product itself; CUDA's grouped kernel wants aligned parts."""


@dataclass(frozen=True)
class Permutation:
    """Where rows come from and go to.

    token_of_row [N]: the token of each row (0 for padding); row_of_slot [T, K]: the row of each token's k-th expert;
    load [E]: tokens per expert; ends [E] int32: the row where each expert's padded part stops. Rows behind the last end are unused.
    With `spare` the last row is one of these, slots without an expert point to it, and sums leave it out.
    """

    token_of_row: Tensor
    row_of_slot: Tensor
    load: Tensor
    ends: Tensor
    spare: bool = False


def sort_by_expert(
    experts: Tensor, num_experts: int, *, padded: bool = True, spare: bool = False, taken: int | None = None
) -> Permutation:
    """experts [T, K] int64 -> Permutation. The sort is stable, so the order of rows is deterministic; N depends on T, K, E alone.

    Without `padded` the experts' parts follow each other closely; with `spare` some of `experts` may be E. If the host knows how many
    are not, it says so (`taken`), and the others take no room: then N depends on that number, and with `padded` is rounded up to one of
    eight sizes per octave, so that compiled functions and memory allocators meet few sizes though each step brings another number.
    """
    flat = experts.reshape(-1)
    spare = spare and flat.numel() > 0
    taken_or_all = flat.numel() if taken is None else taken
    alignment = _alignment(taken_or_all, num_experts) if padded else 1
    order = flat.sort(stable=True)
    first = torch.searchsorted(order.values, torch.arange(num_experts + 1, device=flat.device))
    load = first.diff()
    begins, ends = _padded_parts(load, alignment)
    row_of_slot = torch.empty_like(flat)
    row_of_slot[order.indices] = torch.arange(flat.numel(), device=flat.device) + F.pad(begins - first[:-1], (0, 1))[order.values]
    num_rows = taken_or_all + num_experts * (alignment - 1) + spare
    token_of_row = flat.new_zeros(_one_of_few_sizes(num_rows) if padded and taken is not None and flat.numel() else num_rows)
    if spare:
        row_of_slot.masked_fill_(flat == num_experts, token_of_row.numel() - 1)
    token_of_row[row_of_slot] = torch.arange(flat.numel(), device=flat.device) // experts.shape[1]
    return Permutation(token_of_row=token_of_row, row_of_slot=row_of_slot.view(experts.shape), load=load, ends=ends, spare=spare)


def _one_of_few_sizes(count: int) -> int:
    step = 1 << max(count.bit_length() - 4, 0)
    return -(-count // step) * step


def _alignment(num_rows: int, num_experts: int) -> int:
    # Few rows per expert (generation) would drown in padding.
    return ROW_ALIGNMENT if num_rows >= 4 * num_experts * ROW_ALIGNMENT else 1


def _padded_parts(load: Tensor, alignment: int) -> tuple[Tensor, Tensor]:
    """load [E] -> the rows where the experts' padded parts begin, int64, and stop, int32."""
    padded = (load + alignment - 1) // alignment * alignment
    ends = padded.cumsum(0)
    return ends - padded, ends.to(torch.int32)


def sum_rows_reference(rows: Tensor, row_of_slot: Tensor, *, spare: bool = False) -> Tensor:
    """rows [N, D], row_of_slot [T, K] -> [T, D]: each token's rows summed in fp32, with `spare` all but the row N - 1."""
    if spare:
        rows = torch.cat((rows[:-1], torch.zeros_like(rows[-1:])))
    return rows[row_of_slot].float().sum(1).to(rows.dtype)


def sum_rows(rows: Tensor, row_of_slot: Tensor, *, spare: bool = False) -> Tensor:
    """As the reference, in one pass."""
    return F.embedding_bag(row_of_slot, rows, mode="sum", padding_idx=rows.shape[0] - 1 if spare else None)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token_of_row: Tensor, row_of_slot: Tensor, spare: bool) -> Tensor:
        ctx.save_for_backward(row_of_slot)
        ctx.spare = spare
        return x.index_select(0, token_of_row)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (row_of_slot,) = ctx.saved_tensors
        return sum_rows(grads[0].contiguous(), row_of_slot, spare=ctx.spare), None, None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, token_of_row: Tensor, row_of_slot: Tensor, spare: bool) -> Tensor:
        ctx.save_for_backward(token_of_row)
        return sum_rows(rows, row_of_slot, spare=spare)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (token_of_row,) = ctx.saved_tensors
        return grads[0].index_select(0, token_of_row), None, None, None


def spread(x: Tensor, to: Permutation) -> Tensor:
    """x [T, D] -> [N, D]: a copy of each token for each of its experts; backward sums them."""
    out: Tensor = _Spread.apply(x, to.token_of_row, to.row_of_slot, to.spare)
    return out


def spread_gates(gates: Tensor, to: Permutation) -> Tensor:
    """gates [T, K] (0 where no expert is) -> [N]: each row's gate, 0 for padding, which takes padding out of every sum and gradient."""
    return gates.new_zeros(to.token_of_row.shape).scatter(0, to.row_of_slot.flatten(), gates.flatten())


def collect(rows: Tensor, back: Permutation) -> Tensor:
    """rows [N, D] -> [T, D]: the sum of each token's rows; backward spreads."""
    out: Tensor = _Collect.apply(rows, back.token_of_row, back.row_of_slot, back.spare)
    return out
