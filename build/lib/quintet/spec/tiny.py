"""A run of the same structure that fits a laptop: what a layout does to it, it does to the large one."""

from __future__ import annotations

import math
from dataclasses import replace

from quintet.spec.layout import Layout
from quintet.spec.model import Model
from quintet.spec.run import Run


def tiny(run: Run) -> Run:
    """The run with small widths, few layers and experts and a short sequence, legal for its layout; one phase, no compilation.

    What decides how parts work together stays: compressed queries, dense and MoE layers, shared experts, group-limited routing, MTP,
    tied embeddings, YaRN, capacity, precision, recomputation, masks.
    """
    length = 16 * run.layout.cp * run.layout.tp
    phase = replace(run.phases[0], sequence_length=length)
    micro_batch = min(run.train.micro_batch, 2)
    return replace(
        run,
        model=_tiny_model(run.model, run.layout, length),
        layout=replace(run.layout, cut=None),
        phases=(phase,),
        train=replace(run.train, micro_batch=micro_batch, loss_chunk=min(run.train.loss_chunk, 3 * length // 2), compile=False),
    )


def _tiny_model(model: Model, layout: Layout, length: int) -> Model:
    num_moe = min(model.num_moe_layers, max(2, layout.num_stages - min(model.num_dense_layers, 1)))
    num_dense = min(model.num_dense_layers, max(1, layout.num_stages - num_moe))
    per_group = 2
    num_groups = min(model.num_groups, 4)
    num_experts = math.lcm(layout.ep, num_groups * per_group)
    while num_experts < min(model.num_routed_experts, 8):
        num_experts *= 2
    groups_per_token = min(model.num_groups_per_token, num_groups)
    reachable = num_experts // num_groups * groups_per_token
    return replace(
        model,
        vocab_size=math.lcm(96, layout.tp),
        hidden_size=32,
        num_layers=num_dense + num_moe,
        num_dense_layers=num_dense,
        num_heads=math.lcm(4, layout.tp),
        q_lora_rank=None if model.q_lora_rank is None else 24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=12,
        dense_ffn_size=math.lcm(40, layout.tp),
        expert_ffn_size=math.lcm(16, layout.tp),
        num_routed_experts=num_experts,
        num_shared_experts=min(model.num_shared_experts, 1),
        num_experts_per_token=min(model.num_experts_per_token, 3, reachable),
        num_groups=num_groups,
        num_groups_per_token=groups_per_token,
        num_mtp_modules=min(model.num_mtp_modules, 2),
        max_context=max(length, 64),
        init_std=0.1,
    )
