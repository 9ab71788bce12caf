"""Small models and random weights for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quintet.checkpoint import hub_names
from quintet.spec.model import Model, Yarn

SMALL = Model(
    vocab_size=48,
    hidden_size=16,
    num_layers=3,
    num_dense_layers=1,
    num_heads=2,
    q_lora_rank=12,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    dense_ffn_size=24,
    expert_ffn_size=12,
    num_routed_experts=8,
    num_shared_experts=1,
    num_experts_per_token=3,
    num_groups=4,
    num_groups_per_token=2,
    routed_scaling_factor=2.5,
    num_mtp_modules=1,
    max_context=64,
)


def like_small(**changes: Any) -> Model:
    """`SMALL` with other values."""
    return replace(SMALL, **changes)


VARIANTS = {
    "small": SMALL,
    "no q-LoRA": like_small(q_lora_rank=None),
    "YaRN as V3": like_small(yarn=Yarn(factor=4.0, original_context=16)),
    "YaRN as V2": like_small(yarn=Yarn(factor=8.0, original_context=8, mscale=0.707, mscale_all_dim=0.707), rope_theta=5000.0),
    "YaRN with other weights": like_small(yarn=Yarn(factor=4.0, original_context=16, mscale=0.5, mscale_all_dim=1.0, beta_fast=16.0)),
    "YaRN without weights": like_small(yarn=Yarn(factor=4.0, original_context=16, mscale=0.0, mscale_all_dim=0.0)),
    "one group": like_small(num_groups=1, num_groups_per_token=1, num_experts_per_token=2),
    "all groups": like_small(num_groups=2, num_groups_per_token=2),
    "two shared experts": like_small(num_shared_experts=2),
    "no shared expert": like_small(num_shared_experts=0),
    "two MTP modules": like_small(num_mtp_modules=2),
    "no MTP module": like_small(num_mtp_modules=0),
    "no dense layer": like_small(num_dense_layers=0),
    "all layers dense": like_small(num_dense_layers=3, num_mtp_modules=0),
    "tied": like_small(tie_embeddings=True),
    "tied, no MTP": like_small(tie_embeddings=True, num_mtp_modules=0),
    "plain gates": like_small(normalize_gates=False, routed_scaling_factor=1.0),
}


def weights(model: Model, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random values for every tensor of a model: norms near 1, router biases that matter, matrices of unit gain."""
    state = {}
    for name, shape in hub_names.shapes(model).items():
        draw = torch.randn(shape, generator=generator)
        if name.endswith("expert_bias"):
            state[name] = draw * 0.1
        elif "norm" in name:
            state[name] = (1 + 0.2 * draw).to(dtype)
        else:
            state[name] = (draw * (0.5 / shape[-1] ** 0.5)).to(dtype)
    return state
