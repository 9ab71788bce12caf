"""Causal core attention with unequal head widths: a blocked path for CPU, flash for CUDA, and the plain reference.

Letters: B batch, H heads, S query length, K key length, D width of query and key, V width of value.

PyTorch's fused CPU attention wants equal widths and reaches a tenth of the matmul speed; its unfused path computes the masked
half too. `BlockedAttention` walks over blocks of queries, multiplies each with the keys up to its end only, and leaves the
work to batched matmul and softmax, which are fast (benchmarks/attention.py).

A ring sees the keys of one rank at a time. `attend_block` returns the output over those keys with its log-sum-exp, the log of the sum
that divided it; two such pairs merge exactly (`merge`, arXiv 1805.02867), and with the merged pair every block's gradients follow
independently (`attend_block_backward`, arXiv 2205.14135 appendix B).
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
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
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
        return out.unflatten(0, (batch, heads))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, document_ids, *kept = ctx.saved_tensors
        batch, heads, length, _ = grads[0].shape
        grad = grads[0].flatten(0, 1)
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
        dq, dk, dv = (t.unflatten(0, (batch, heads)) for t in (dq.mul_(ctx.scale), dk, dv))
        return dq, dk, dv, None, None, None


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + QUERY_BLOCK, length)) for begin in range(0, length, QUERY_BLOCK))


def _probabilities(scaled: Tensor, k: Tensor, begin: int, end: int, document_ids: Tensor | None) -> Tensor:
    """Softmax of the scores of queries begin..end against keys 0..end: [B*H, end-begin, end]."""
    scores = torch.bmm(scaled[:, begin:end], k[:, :end].transpose(1, 2))
    size = end - begin
    scores[:, :, begin:].add_(torch.full((size, size), -math.inf, dtype=scores.dtype).triu_(1))
    if document_ids is not None:
        foreign = document_ids[:, begin:end, None] != document_ids[:, None, :end]
        _mask_foreign(scores, foreign)
    return torch.softmax(scores, -1)


Documents = tuple[Tensor, Tensor]
"""Document ids of the queries [B, S] and of the keys [B, K]: a query looks into its own document only."""


def attend_block_reference(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, documents: Documents | None = None
) -> tuple[Tensor, Tensor]:
    """`attend_block` as written, and differentiable."""
    scores = (q @ k.transpose(2, 3)).float() * scale
    if causal:
        scores = scores.masked_fill(~visible(q.shape[2], k.shape[2], document_ids=None, device=q.device), -math.inf)
    if documents is not None:
        scores = scores.masked_fill((documents[0][:, :, None] != documents[1][:, None, :])[:, None], -math.inf)
    lse = scores.logsumexp(-1)
    p = (scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()
    return p.to(v.dtype) @ v, lse


def attend_block(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, documents: Documents | None = None
) -> tuple[Tensor, Tensor]:
    """Queries against one block of keys: q [B, H, S, D], k [B, H, K, D], v [B, H, K, V] -> output [B, H, S, V] in v's dtype and
    log-sum-exp of the scores [B, H, S] in fp32.

    `causal` makes the queries the last S of the K keys (S <= K); without it every query sees every key, of its document. A query that sees
    no key has output 0 and log-sum-exp -inf. Scores exist for `QUERY_BLOCK` queries at a time. Not differentiable by autograd.
    """
    out, lse = v.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)
    q_, k_, v_, out_, lse_ = (t.flatten(0, 1) for t in (q, k, v, out, lse))
    for begin, end in _blocks(q.shape[2]):
        scores, seen = _scores(q_, k_, begin, end, scale=scale, causal=causal, documents=documents)
        largest = scores.amax(-1, keepdim=True)
        p = scores.sub_(largest.masked_fill(largest == -math.inf, 0.0)).exp_()
        total = p.sum(-1, keepdim=True)
        # A query that sees a key has a total of at least 1, that of its largest score.
        out_[:, begin:end] = torch.bmm(p.to(v.dtype), v_[:, :seen]) / total.clamp(min=1.0)
        lse_[:, begin:end] = (largest + total.log()).squeeze(-1)
    return out, lse


def attend_block_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The part of one block of keys in the gradients: with the merged output and log-sum-exp over all blocks and the merged output's
    gradient (`grad`) -> the block's term of q's gradient [B, H, S, D], and the gradients of its k and v, in the inputs' dtype."""
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros_like(t, dtype=torch.float32, memory_format=torch.contiguous_format) for t in (k, v))
    q_, k_, v_, out_, lse_, grad_, dq_, dk_, dv_ = (t.flatten(0, 1) for t in (q, k, v, out, lse, grad, dq, dk, dv))
    for begin, end in _blocks(q.shape[2]):
        scores, seen = _scores(q_, k_, begin, end, scale=scale, causal=causal, documents=documents)
        lse_now, g, keys = lse_[:, begin:end, None], grad_[:, begin:end], slice(0, seen)
        p = scores.sub_(lse_now.masked_fill(lse_now == -math.inf, 0.0)).exp_()
        dv_[:, keys] += torch.bmm(p.to(v.dtype).transpose(1, 2), g)
        # What softmax's normalisation takes back: sum_k p dp = out . grad, over all blocks.
        taken = (out_[:, begin:end].float() * g).sum(-1, keepdim=True)
        ds = torch.bmm(g, v_[:, keys].transpose(1, 2)).float().sub_(taken).mul_(p).mul_(scale).to(q.dtype)
        dq_[:, begin:end] = torch.bmm(ds, k_[:, keys])
        dk_[:, keys] += torch.bmm(ds.transpose(1, 2), q_[:, begin:end])
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Outputs [B, H, S, V] over two sets of keys and their log-sum-exps [B, H, S] -> over both, in place in `out` and `lse` (fp32)."""
    total = torch.logaddexp(lse, other_lse)
    finite = total.masked_fill(total == -math.inf, 0.0)
    out.mul_((lse - finite).exp_()[..., None]).add_(other_out * (other_lse - finite).exp_()[..., None])
    lse.copy_(total)


def _scores(
    q: Tensor, k: Tensor, begin: int, end: int, *, scale: float, causal: bool, documents: Documents | None
) -> tuple[Tensor, int]:
    """Scaled scores, in fp32, of queries begin..end of q [B*H, S, D] against the first keys of k [B*H, K, D], those that a causal mask lets
    the last of them see: [B*H, end-begin, seen], and their number."""
    before = k.shape[1] - q.shape[1]
    seen = before + end if causal else k.shape[1]
    scores = torch.bmm(q[:, begin:end], k[:, :seen].transpose(1, 2)).float().mul_(scale)
    if causal:
        size = end - begin
        scores[:, :, before + begin :].add_(scores.new_full((size, size), -math.inf).triu_(1))
    if documents is not None:
        foreign = documents[0][:, begin:end, None] != documents[1][:, None, :seen]
        _mask_foreign(scores, foreign)
    return scores, seen


def _mask_foreign(scores: Tensor, foreign: Tensor) -> None:
    """Scores [B*H, S, K], in place, where foreign [B, S, K] is true: -inf."""
    batch = foreign.shape[0]
    scores.unflatten(0, (batch, scores.shape[0] // max(batch, 1))).masked_fill_(foreign[:, None], -math.inf)
