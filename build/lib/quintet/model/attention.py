"""Multi-head latent attention (V2 2.1, V3 2.1.1): queries, keys and values come up from low-rank latents.

Letters: B batch, S sequence, K cached length, D hidden, H heads, N width without and R with rotary embedding, V width of the value,
C width of the key-value latent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from quintet.model.layers import Alone, Exchange, Linear, RMSNorm
from quintet.model.recompute import recomputed
from quintet.model.rope import softmax_scale
from quintet.ops.attention import attention, visible
from quintet.ops.pointwise import Kernels, rotate
from quintet.spec.model import Model

LATENT_NORM_EPS = 1e-6
"""Of the norms on the latents: fixed in V3's code and in transformers, whatever `rms_norm_eps` says."""


@dataclass
class LatentCache:
    """What generation keeps of one layer: the normalised latent [B, K, C] and the rotated shared key [B, K, R]."""

    kv: Tensor
    k_pe: Tensor

    def append(self, kv: Tensor, k_pe: Tensor) -> None:
        """Add the latents of new tokens: [B, S, C] and [B, S, R]."""
        self.kv = torch.cat((self.kv, kv), 1)
        self.k_pe = torch.cat((self.k_pe, k_pe), 1)


@dataclass(frozen=True)
class Latents:
    """What attention is made of, before any projection up to heads: q [B, S, .] (the hidden state where queries are not compressed),
    kv [B, S, C] not yet normalised, and k_pe [B, S, R] not yet rotated."""

    q: Tensor
    kv: Tensor
    k_pe: Tensor


class Attend(Protocol):
    """The seam that ring attention replaces: from latents to the heads' outputs, with the weights of `layer`."""

    def __call__(self, layer: LatentAttention, x: Latents, rotation: tuple[Tensor, Tensor], document_ids: Tensor | None) -> Tensor:
        """Latents of S tokens, rotation cos and sin [S, R/2], document_ids [B, S] or None (of whole sequences, if these are but parts of
        them) -> [B, H, S, V]."""
        ...


def attend_alone(layer: LatentAttention, x: Latents, rotation: tuple[Tensor, Tensor], document_ids: Tensor | None) -> Tensor:
    """The whole sequence is here: project up, then causal attention."""

    def up() -> tuple[Tensor, Tensor, Tensor]:
        return layer.up_project(x, rotation)

    q, k, v = up()
    with recomputed((q, k, v), up, active=layer.recompute):
        return attention(q, k, v, scale=layer.scale, document_ids=document_ids, save_memory=layer.recompute)


class LatentAttention(nn.Module):
    """MLA with the rotary part apart. `attend` and `exchange` are seams; with split heads the weights hold only this rank's."""

    def __init__(self, model: Model, *, kernels: Kernels) -> None:
        super().__init__()
        self.model, self.kernels = model, kernels
        self.attend: Attend = attend_alone
        self.exchange: Exchange = Alone()
        self.recompute = False
        self.scale = softmax_scale(model)
        heads = model.num_heads
        if model.q_lora_rank is None:
            self.wq = Linear(model.hidden_size, heads * model.qk_head_dim)
        else:
            self.wq_a = Linear(model.hidden_size, model.q_lora_rank)
            self.q_norm = RMSNorm(model.q_lora_rank, eps=LATENT_NORM_EPS, kernels=kernels)
            self.wq_b = Linear(model.q_lora_rank, heads * model.qk_head_dim)
        self.wkv_a = Linear(model.hidden_size, model.kv_lora_rank + model.qk_rope_head_dim)
        self.kv_norm = RMSNorm(model.kv_lora_rank, eps=LATENT_NORM_EPS, kernels=kernels)
        self.wkv_b = Linear(model.kv_lora_rank, heads * (model.qk_nope_head_dim + model.v_head_dim))
        self.wo = Linear(heads * model.v_head_dim, model.hidden_size)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], document_ids: Tensor | None) -> Tensor:
        """x [B, S, D], rotation cos and sin [S, R/2], document_ids [B, S] or None -> [B, S, D].

        Under tensor parallelism x holds this rank's S/tp tokens: the latents, not the hidden states, are what ranks exchange.
        """
        q_latent, kv_a = self.exchange.gather(x if self.model.q_lora_rank is None else self.wq_a(x), self.wkv_a(x), dim=1)
        kv_latent, k_pe = kv_a.split((self.model.kv_lora_rank, self.model.qk_rope_head_dim), -1)
        out = self.attend(self, Latents(q_latent, kv_latent, k_pe), rotation, document_ids)
        return self.exchange.scatter(self.wo(out.transpose(1, 2).flatten(2)), dim=1)

    def up_project(self, x: Latents, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Latents of S tokens -> q [B, H, S, N+R] and k [B, H, S, N+R], rotated, and v [B, H, S, V]."""
        q = self.queries(x.q)
        normed = self.kv_norm(x.kv)
        with recomputed((normed,), lambda: (self.kv_norm(x.kv),), active=self.recompute):
            kv = self.wkv_b(normed).unflatten(-1, (-1, self.model.qk_nope_head_dim + self.model.v_head_dim))
        return self.kernels.assemble_qkv(q, kv, x.k_pe, *rotation)

    def queries(self, q_latent: Tensor) -> Tensor:
        """[B, S, .] -> [B, S, H, N+R], not yet rotated."""
        if self.model.q_lora_rank is None:
            q = self.wq(q_latent)
        else:
            normed = self.q_norm(q_latent)
            with recomputed((normed,), lambda: (self.q_norm(q_latent),), active=self.recompute):
                q = self.wq_b(normed)
        return q.unflatten(-1, (-1, self.model.qk_head_dim))

    def empty_cache(self, batch: int) -> LatentCache:
        """A cache without tokens for `batch` sequences, in the weights' dtype and on their device."""
        like = self.wkv_a.weight
        return LatentCache(kv=like.new_empty(batch, 0, self.model.kv_lora_rank), k_pe=like.new_empty(batch, 0, self.model.qk_rope_head_dim))

    def decode(self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: LatentCache) -> Tensor:
        """New tokens against the latent cache: x [B, S, D] -> [B, S, D].

        The up-projections are absorbed (V2 2.1.2): with W_UK and W_UV the two parts of wkv_b, q_nope (W_UK c) = (q_nope W_UK) c
        and sum p (W_UV c) = W_UV (sum p c), so keys and values are never expanded.
        """
        q_latent = x if self.model.q_lora_rank is None else self.wq_a(x)
        q_nope, q_pe = self.queries(q_latent).split((self.model.qk_nope_head_dim, self.model.qk_rope_head_dim), -1)
        cos, sin = rotation
        kv_latent, k_pe = self.wkv_a(x).split((self.model.kv_lora_rank, self.model.qk_rope_head_dim), -1)
        cache.append(self.kv_norm(kv_latent), rotate(k_pe, cos, sin))
        widths = (self.model.qk_nope_head_dim, self.model.v_head_dim)
        up_k, up_v = self.wkv_b.weight.view(-1, sum(widths), self.model.kv_lora_rank).split(widths, 1)
        absorbed = torch.einsum("bshn,hnc->bhsc", q_nope, up_k)
        scores = absorbed @ cache.kv[:, None].transpose(2, 3) + rotate(q_pe, cos[:, None], sin[:, None]).transpose(1, 2) @ cache.k_pe[
            :, None
        ].transpose(2, 3)
        mask = visible(x.shape[1], cache.kv.shape[1], document_ids=None, device=x.device)
        weights = (scores.float() * self.scale).masked_fill(~mask, -math.inf).softmax(-1).to(x.dtype)
        out = torch.einsum("bhsc,hvc->bshv", weights @ cache.kv[:, None], up_v)
        return self.wo(out.flatten(2))
