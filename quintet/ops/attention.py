"""Causal core attention with unequal head widths: a blocked path for CPU, flash for CUDA, and the plain reference.

Letters: B batch, H heads, S query length, K key length, D width of query and key, V width of value.

PyTorch's fused CPU attention wants equal widths and reaches a tenth of the matmul speed; its unfused path computes the masked
half too. `BlockedAttention` walks over blocks of queries, multiplies each with the keys up to its end only, and leaves the
work to batched matmul and softmax, which are fast (benchmarks/attention.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

QUERY_BLOCK = 128
"""Queries of one block: the score block of one head then stays in the second-level cache."""
KEEP_PROBABILITIES_BELOW = 2048
"""Sequences up to this length keep their probabilities for backward, unless memory is to be saved; longer ones never do."""


def visible(num_queries: int, num_keys: int, *, document_ids: Tensor | None, device: torch.device) -> Tensor:
    """True where a query may look: not later than itself and, with document_ids [B, K], inside its document.

    The queries are the last `num_queries` of the keys. Returns [S, K], or [B, 1, S, K] with document_ids.
    """
    causal = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril_(num_keys - num_queries)
    if document_ids is None:
        return causal
    same = document_ids[:, -num_queries:, None] == document_ids[:, None, :]
    return (causal & same).unsqueeze(1)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, *, scale: float, document_ids: Tensor | None = None) -> Tensor:
    """softmax(q k^T scale) v as written, with a causal mask: q [B, H, S, D], k [B, H, K, D], v [B, H, K, V], document_ids [B, K] or
    None -> [B, H, S, V]. The queries are the last S of K keys."""
    mask = visible(q.shape[2], k.shape[2], document_ids=document_ids, device=q.device)
    scores = (q @ k.transpose(2, 3)).float() * scale
    return scores.masked_fill(~mask, -math.inf).softmax(-1).to(v.dtype) @ v


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, document_ids: Tensor | None = None, save_memory: bool = False
) -> Tensor:
    """The fastest path for the device at hand; equals `attention_reference` with S = K. With save_memory nothing of size S x S is kept
    for backward."""
    if q.device.type == "cpu":
        out: Tensor = BlockedAttention.apply(q, k, v, scale, document_ids, save_memory)
        return out
    if document_ids is not None:
        mask = visible(q.shape[2], k.shape[2], document_ids=document_ids, device=q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    # Fused CUDA kernels want equal widths: zero columns of the value change nothing but the width.
    padded = F.pad(v, (0, q.shape[-1] - v.shape[-1])) if v.shape[-1] < q.shape[-1] else v
    return F.scaled_dot_product_attention(q, k, padded, is_causal=True, scale=scale)[..., : v.shape[-1]]


class BlockedAttention(torch.autograd.Function):
    """Causal attention in blocks of queries, with batched matmuls over batch and heads."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, document_ids: Tensor | None, save_memory: bool) -> Tensor:
        batch, heads, length, _ = q.shape
        q, k, v = (t.reshape(batch * heads, length, -1) for t in (q, k, v))
        out = torch.empty_like(v)
        keep = not save_memory and length <= KEEP_PROBABILITIES_BELOW and any(ctx.needs_input_grad)
        kept: list[Tensor] = []
        scaled = q * scale
        for begin, end in _blocks(length):
            p = _probabilities(scaled, k, begin, end, document_ids)
            out[:, begin:end] = torch.bmm(p, v[:, :end])
            if keep:
                kept.append(p)
        ctx.save_for_backward(q, k, v, document_ids, *kept)
        ctx.scale = scale
        return out.view(batch, heads, length, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, document_ids, *kept = ctx.saved_tensors
        batch, heads, length, _ = grads[0].shape
        grad = grads[0].reshape(batch * heads, length, -1)
        scaled = q * ctx.scale
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for i, (begin, end) in enumerate(_blocks(length)):
            p = kept[i] if kept else _probabilities(scaled, k, begin, end, document_ids)
            g = grad[:, begin:end]
            dv[:, :end] += torch.bmm(p.transpose(1, 2), g)
            dp = torch.bmm(g, v[:, :end].transpose(1, 2))
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, begin:end] = torch.bmm(ds, k[:, :end])
            dk[:, :end] += torch.bmm(ds.transpose(1, 2), scaled[:, begin:end])
        shape = (batch, heads, length, -1)
        return dq.mul_(ctx.scale).view(shape), dk.view(shape), dv.view(shape), None, None, None


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + QUERY_BLOCK, length)) for begin in range(0, length, QUERY_BLOCK))


def _probabilities(scaled: Tensor, k: Tensor, begin: int, end: int, document_ids: Tensor | None) -> Tensor:
    """Softmax of the scores of queries begin..end against keys 0..end: [B*H, end-begin, end]."""
    scores = torch.bmm(scaled[:, begin:end], k[:, :end].transpose(1, 2))
    size = end - begin
    scores[:, :, begin:].add_(torch.full((size, size), -math.inf, dtype=scores.dtype).triu_(1))
    if document_ids is not None:
        foreign = document_ids[:, begin:end, None] != document_ids[:, None, :end]
        scores.unflatten(0, (document_ids.shape[0], -1)).masked_fill_(foreign[:, None], -math.inf)
    return torch.softmax(scores, -1)
