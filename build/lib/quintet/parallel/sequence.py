"""Sequence parallelism: each rank of the cp axis holds a part of every sequence, and what its keys are made of goes round a ring.

Zigzag. Of 2n chunks of a sequence, n the ranks, rank r holds chunks r and 2n-1-r. Then with causal attention every rank has the same
work in each of the n steps, s^2/2 scores per head for its s tokens, and no step but the first needs a causal mask:

    keys of an earlier rank j < r      all queries see chunk j; none sees chunk 2n-1-j
    its own                            causal over the two chunks, which stand in the order of their positions
    keys of a later rank j > r         the queries of chunk 2n-1-r see both chunks; those of chunk r none

Forward merges the steps' outputs by their log-sum-exps in fp32 (ring attention, arXiv 2310.01889). Backward needs the merged output and
log-sum-exp only; the payload goes round again, and the gradient of each rank's payload follows it from rank to rank, gathering terms,
until it is home. A transfer is started before the computation that hides it. Every rank of the group sends the same messages in the same
order, whatever it computes.

Document ids are not sent: every rank of the group reads the whole sequences, and so knows those of all their tokens.

The payload of latent attention may be the latents themselves, C + R values per token instead of H (N + V) + R. Keys and values are then
expanded where they arrive, and a payload's gradient is that of the latents: `quintet.cost.ring_comm` says when which is faster.

Letters: B batch, H heads of this rank, s tokens of this rank, N width of a key without and R with rotary embedding, V width of the value,
C width of the latent, W width of the payload.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from quintet.cost.ring_comm import FLOPS_PER_SECOND, LINK_BYTES_PER_SECOND, Payload, ring_payload
from quintet.errors import SpecError
from quintet.model.attention import LatentAttention, Latents
from quintet.model.recompute import recomputed
from quintet.ops.attention import attend_block, attend_block_backward, merge
from quintet.ops.pointwise import rotate
from quintet.parallel.collectives import Group, Shift


def shard_positions(length: int, group: Group) -> Tensor:
    """Positions in a sequence of `length` tokens that this rank holds, in the order in which it holds them: [length / n] int64.

    Raises SpecError if the sequence cannot be cut into 2n equal chunks (a group of one takes any length).
    """
    count = group.size
    if count == 1:
        return torch.arange(length)
    if length % (2 * count):
        near = 2 * count * max(round(length / (2 * count)), 1)
        raise SpecError(f"the sequence's {length} tokens must be divisible by 2 x cp ({2 * count}); use {near} tokens, or another cp")
    return torch.arange(length).view(2 * count, -1)[[group.rank, 2 * count - 1 - group.rank]].flatten()


def shard_tokens(x: Tensor, group: Group, *, dim: int) -> Tensor:
    """[.., S, ..] -> [.., S/n, ..]: this rank's tokens along `dim`, by `shard_positions`. Raises SpecError as that does."""
    return x if group.size == 1 else x.index_select(dim, shard_positions(x.shape[dim], group).to(x.device))


@dataclass(frozen=True)
class RingAttention:
    """Takes the place of `attend_alone` where a sequence is shared out over `group`: an `Attend`.

    `payload` says what travels: latents, expanded keys and values, or ("auto") what `cost.ring_comm.ring_payload` takes to be faster at the
    shape at hand, on a link of `link_bytes_per_second` and with products at `flops_per_second`.
    """

    group: Group
    payload: Payload | Literal["auto"] = "auto"
    link_bytes_per_second: float = LINK_BYTES_PER_SECOND
    flops_per_second: float = FLOPS_PER_SECOND

    def __call__(self, layer: LatentAttention, x: Latents, rotation: tuple[Tensor, Tensor], document_ids: Tensor | None) -> Tensor:
        """Latents and rotation [s, R/2] of this rank's tokens, document ids [B, n s] of all -> [B, H, s, V], H the heads of `layer`'s
        weights."""
        model = layer.model
        widths = (model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim)
        step = _Step(self.group, layer.scale, *widths, num_heads=_num_heads(layer))
        payload = self.choose(layer, tokens_per_rank=x.kv.shape[1])

        def up() -> tuple[Tensor, Tensor]:
            return _queries(layer, x, rotation), _payload(layer, x, rotation, payload)

        q, own = up()
        with recomputed((q, own), up, active=layer.recompute):
            weight = layer.wkv_b.weight if payload == "latent" else None
            return cast(Tensor, _Ring.apply(q, own, weight, document_ids, step))

    def choose(self, layer: LatentAttention, *, tokens_per_rank: int) -> Payload:
        """What travels at this shape; the same on every rank."""
        if self.payload != "auto":
            return self.payload
        return ring_payload(
            layer.model,
            tokens_per_rank=tokens_per_rank,
            cp=self.group.size,
            tp=layer.model.num_heads // _num_heads(layer),
            element_bytes=layer.wkv_b.weight.element_size(),
            link_bytes_per_second=self.link_bytes_per_second,
            flops_per_second=self.flops_per_second,
        )


def _num_heads(layer: LatentAttention) -> int:
    """Heads whose weights are here."""
    return layer.wkv_b.weight.shape[0] // (layer.model.qk_nope_head_dim + layer.model.v_head_dim)


def _queries(layer: LatentAttention, x: Latents, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotated queries [B, H, s, N+R]."""
    cos, sin = rotation
    q_nope, q_pe = layer.queries(x.q).split((layer.model.qk_nope_head_dim, layer.model.qk_rope_head_dim), -1)
    return torch.cat((q_nope, rotate(q_pe, cos[:, None], sin[:, None])), -1).transpose(1, 2).contiguous()


def _payload(layer: LatentAttention, x: Latents, rotation: tuple[Tensor, Tensor], payload: Payload) -> Tensor:
    """What this rank sends: normalised latents [B, s, C] or keys and values [B, s, H(N+V)], and behind them the rotated shared key
    -> [B, s, W]."""
    sent = layer.kv_norm(x.kv)
    if payload == "kv":
        normed = sent
        with recomputed((normed,), lambda: (layer.kv_norm(x.kv),), active=layer.recompute):
            sent = layer.wkv_b(normed)
    return torch.cat((sent, rotate(x.k_pe, *rotation)), -1)


@dataclass(frozen=True)
class _Step:
    """One step of the ring: the shapes, and what is computed with one rank's payload."""

    group: Group
    scale: float
    nope: int
    rope: int
    value: int
    num_heads: int

    def seen(self, source: int, length: int) -> tuple[slice, slice, bool]:
        """This rank's queries that look at the source's keys, the keys that they look at, and whether causally."""
        first, second, everything = slice(length // 2), slice(length // 2, length), slice(length)
        if source == self.group.rank:
            return everything, everything, True
        return (everything, first, False) if source < self.group.rank else (second, everything, False)

    def documents(self, ids: Tensor | None, source: int, queries: slice, keys: slice) -> tuple[Tensor, Tensor] | None:
        """Document ids of whole sequences [B, n s] -> those of this rank's queries and of the source's keys."""
        if ids is None:
            return None
        chunks = ids.unflatten(1, (2 * self.group.size, -1)) if self.group.size > 1 else ids[:, None]

        def held(rank: int) -> Tensor:
            return chunks[:, sorted({rank, chunks.shape[1] - 1 - rank})].flatten(1)

        return held(self.group.rank)[:, queries], held(source)[:, keys]

    def expand(self, payload: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """payload [B, K, W] -> k [B, H, K, N+R] and v [B, H, K, V]; `weight` is wkv_b's for latents."""
        sent, k_pe = payload.split((payload.shape[-1] - self.rope, self.rope), -1)
        kv = (sent if weight is None else F.linear(sent, weight)).unflatten(-1, (self.num_heads, self.nope + self.value)).transpose(1, 2)
        k_nope, v = kv.split((self.nope, self.value), -1)
        return torch.cat((k_nope, k_pe[:, None].expand(-1, self.num_heads, -1, -1)), -1), v.contiguous()

    def collapse(self, dk: Tensor, dv: Tensor, payload: Tensor, weight: Tensor | None, dweight: Tensor | None) -> Tensor:
        """The gradient of `expand`: of the payload [B, K, W]; that of the weight is added to `dweight`, in fp32."""
        dk_nope, dk_pe = dk.split((self.nope, self.rope), -1)
        sent = torch.cat((dk_nope, dv), -1).transpose(1, 2).flatten(2)
        if weight is not None and dweight is not None:
            dweight += sent.flatten(0, 1).t() @ payload[..., : -self.rope].flatten(0, 1)
            sent = sent @ weight
        return torch.cat((sent.float(), dk_pe.sum(1, dtype=torch.float32)), -1)


class _Ring(torch.autograd.Function):
    """Queries [B, H, s, N+R] and this rank's payload [B, s, W] -> [B, H, s, V]. For backward it keeps them, its output and log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, payload: Tensor, weight: Tensor | None, document_ids: Tensor | None, step: _Step) -> Tensor:
        batch, heads, length, _ = q.shape
        out = q.new_empty(batch, heads, length, step.value, dtype=torch.float32)
        lse = q.new_empty(batch, heads, length, dtype=torch.float32)
        for source, arrived in _round(payload, step.group):
            queries, keys, causal = step.seen(source, length)
            k, v = step.expand(arrived[:, keys], weight)
            documents = step.documents(document_ids, source, queries, keys)
            block = attend_block(q[:, :, queries], k, v, scale=step.scale, causal=causal, documents=documents)
            if source == step.group.rank:
                out.copy_(block[0]), lse.copy_(block[1])
            else:
                merge(out[:, :, queries], lse[:, :, queries], *block)
        # Heads inside tokens, as the output projection wants them: it keeps this very tensor for backward, not a copy.
        laid_out = torch.empty(batch, length, heads, step.value, dtype=q.dtype, device=q.device).transpose(1, 2).copy_(out)
        ctx.save_for_backward(q, payload, weight, document_ids, laid_out, lse)
        ctx.step = step
        return laid_out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, payload, weight, document_ids, out, lse = ctx.saved_tensors
        step, grad, length = ctx.step, grads[0], q.shape[2]
        dq = torch.zeros_like(q, dtype=torch.float32)
        dweight = None if weight is None else torch.zeros_like(weight, dtype=torch.float32)
        home, following = payload, None
        for source, arrived in _round(payload, step.group):
            queries, keys, causal = step.seen(source, length)
            k, v = step.expand(arrived[:, keys], weight)
            documents = step.documents(document_ids, source, queries, keys)
            grad_here, q_here, out_here, lse_here = (t[:, :, queries] for t in (grad, q, out, lse))
            dq_block, dk, dv = attend_block_backward(
                grad_here, q_here, k, v, out_here, lse_here, scale=step.scale, causal=causal, documents=documents
            )
            dq[:, :, queries] += dq_block
            # A sum that travels is rounded at each hop. Latents are few: theirs goes in fp32 and still hides behind the scores.
            term = torch.zeros_like(payload, dtype=payload.dtype if weight is None else torch.float32)
            term[:, keys] = step.collapse(dk, dv, arrived[:, keys], weight, dweight).to(term.dtype)
            if source == step.group.rank:
                home = term
                continue
            if following is not None:
                term += following.wait()[0]
            following = _start([term], step.group)
        if following is not None:
            home += following.wait()[0]
        return dq.to(q.dtype), home.to(payload.dtype), None if dweight is None else dweight.to(weight.dtype), None, None


def _round(payload: Tensor, group: Group) -> Iterator[tuple[int, Tensor]]:
    """Every rank's payload with its place in the group, beginning with this one's, then the previous rank's, and so on; while the caller
    computes with one, the next is on its way."""
    for hop in range(group.size):
        shift = _start([payload], group) if hop + 1 < group.size else None
        yield (group.rank - hop) % group.size, payload
        if shift is not None:
            (payload,) = shift.wait()


def _start(tensors: list[Tensor], group: Group) -> Shift | None:
    """Send to the next rank; nothing where a micro-batch has no sequences, which all ranks of the group know."""
    return Shift(tensors, group) if tensors[0].numel() else None
