"""Multi-head latent attention (V2 2.1, V3 2.1.1): queries, keys and values come up from low-rank latents.

Letters: B batch, S sequence, K cached length, D hidden, H heads, N width without and R with rotary embedding, V width of the value,
C width of the key-value latent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quintet.model.layers import Linear, RMSNorm
from quintet.model.recompute import recomputed
from quintet.model.rope import softmax_scale
from quintet.ops.attention import CoreAttention, attention, visible
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


class LatentAttention(nn.Module):
    """MLA with the rotary part apart; `core` is the seam that ring attention replaces."""

    def __init__(self, model: Model, *, kernels: Kernels) -> None:
        super().__init__()
        self.model, self.kernels = model, kernels
        self.core: CoreAttention = attention
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
        """x [B, S, D], rotation cos and sin [S, R/2], document_ids [B, S] or None -> [B, S, D]."""
        q_latent = x if self.model.q_lora_rank is None else self.wq_a(x)
        kv_latent, k_pe = self.wkv_a(x).split((self.model.kv_lora_rank, self.model.qk_rope_head_dim), -1)

        def up() -> tuple[Tensor, Tensor, Tensor]:
            return self._up_project(q_latent, kv_latent, k_pe, rotation)

        q, k, v = up()
        with recomputed((q, k, v), up, active=self.recompute):
            out = self.core(q, k, v, scale=self.scale, document_ids=document_ids, save_memory=self.recompute)
        return self.wo(out.transpose(1, 2).flatten(2))

    def _up_project(
        self, q_latent: Tensor, kv_latent: Tensor, k_pe: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [B, S, .] -> q [B, H, S, N+R], k [B, H, S, N+R], v [B, H, S, V]."""
        q = self._queries(q_latent)
        normed = self.kv_norm(kv_latent)
        with recomputed((normed,), lambda: (self.kv_norm(kv_latent),), active=self.recompute):
            kv = self.wkv_b(normed).unflatten(-1, (self.model.num_heads, -1))
        return self.kernels.assemble_qkv(q, kv, k_pe, *rotation)

    def _queries(self, q_latent: Tensor) -> Tensor:
        """[B, S, .] -> [B, S, H, N+R], not yet rotated."""
        if self.model.q_lora_rank is None:
            q = self.wq(q_latent)
        else:
            normed = self.q_norm(q_latent)
            with recomputed((normed,), lambda: (self.q_norm(q_latent),), active=self.recompute):
                q = self.wq_b(normed)
        return q.unflatten(-1, (self.model.num_heads, self.model.qk_head_dim))

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
        q_nope, q_pe = self._queries(q_latent).split((self.model.qk_nope_head_dim, self.model.qk_rope_head_dim), -1)
        cos, sin = rotation
        kv_latent, k_pe = self.wkv_a(x).split((self.model.kv_lora_rank, self.model.qk_rope_head_dim), -1)
        cache.append(self.kv_norm(kv_latent), rotate(k_pe, cos, sin))
        up_k, up_v = self.wkv_b.weight.view(self.model.num_heads, -1, self.model.kv_lora_rank).split(
            (self.model.qk_nope_head_dim, self.model.v_head_dim), 1
        )
        absorbed = torch.einsum("bshn,hnc->bhsc", q_nope, up_k)
        scores = absorbed @ cache.kv[:, None].transpose(2, 3) + rotate(q_pe, cos[:, None], sin[:, None]).transpose(1, 2) @ cache.k_pe[
            :, None
        ].transpose(2, 3)
        mask = visible(x.shape[1], cache.kv.shape[1], document_ids=None, device=x.device)
        weights = (scores.float() * self.scale).masked_fill(~mask, -math.inf).softmax(-1).to(x.dtype)
        out = torch.einsum("bhsc,hvc->bshv", weights @ cache.kv[:, None], up_v)
        return self.wo(out.flatten(2))
