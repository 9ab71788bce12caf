"""Bytes that a rank sends for tensor parallelism, from the spec.

A gather of tokens sends this rank's to each of the n - 1 others, and a scatter of sums sends as much; the backward of one is the other. So
each element of width costs (n-1)/n T elements forward and the same backward, for T tokens of the group (D hidden, r_q
and r_kv the latents' widths, p the rotary width):

    embedding, and again for each MTP module     D             scatter
    attention                                    r_q + r_kv + p (D in place of r_q without query compression), and D
    dense feed-forward, shared experts           D, and D      gather, scatter
    head, and again for each MTP module          D             gather; forward also two fp32 numbers per token, from each rank to all

Under selective recompute split feed-forwards gather their tokens a second time. Under full recompute blocks run forward again, only that a
block whose split feed-forward is the last to run (dense; shared experts without a dispatch to other ranks) stops before its scatter. What
routed experts send with `expert_tp` depends on the rows that arrive: see `cost.expert_comm`. On the axis of sequences the mixtures of
experts sum their counts, sequences x experts in fp32, in one message behind forward.
"""

from __future__ import annotations

from dataclasses import dataclass

from quintet.cost.sent import Sent
from quintet.spec.layout import Layout
from quintet.spec.model import Model
from quintet.spec.run import Recompute
from quintet.spec.stage import Stage

FP32 = 4
INDEX = 8


@dataclass(frozen=True, kw_only=True)
class Passed:
    """What of a model a micro-batch passes: blocks by kind, those of MTP modules among them, look-ups of tokens, and heads."""

    dense: int
    moe: int
    lookups: int
    heads: int


def passed(model: Model, *, num_mtp: int | None = None, stage: Stage | None = None) -> Passed:
    """In the whole model or in a stage of it; `num_mtp` is the number of MTP modules that run, all of them by default."""
    modules = model.num_mtp_modules if num_mtp is None else num_mtp
    layers, first, last = (range(model.num_layers), 1, 1) if stage is None else (stage.layers, int(stage.first), int(stage.last))
    dense = sum(layer < model.num_dense_layers for layer in layers)
    return Passed(
        dense=dense, moe=len(layers) - dense + last * modules, lookups=first + last * modules, heads=last * (1 + modules)
    )


def tensor_bytes(
    model: Model,
    layout: Layout,
    *,
    tokens: int,
    element_bytes: int,
    recompute: Recompute = "none",
    num_mtp: int | None = None,
    stage: Stage | None = None,
) -> Sent:
    """On the axis tp, for a micro-batch of `tokens` on the ranks of one tp group (its sequences x their length / cp), in what of the model
    it passes."""
    share, width = tokens * (layout.tp - 1) / layout.tp, model.hidden_size
    here = passed(model, num_mtp=num_mtp, stage=stage)
    attention = (model.q_lora_rank or width) + model.kv_lora_rank + model.qk_rope_head_dim + width
    in_moe = share * element_bytes * (attention + 2 * width * bool(model.num_shared_experts))
    in_dense = share * element_bytes * (attention + 2 * width)
    blocks = here.moe * in_moe + here.dense * in_dense
    shared_last = model.num_shared_experts and layout.ep == layout.expert_tp == 1
    stopping = here.dense + (here.moe if shared_last else 0)
    again = blocks - stopping * share * element_bytes * width if recompute == "full" else 0.0
    if recompute == "selective":
        again = (here.dense + here.moe * bool(model.num_shared_experts)) * share * element_bytes * width
    outside = (here.lookups + here.heads) * share * element_bytes * width
    return Sent(
        forward=blocks + outside + here.heads * tokens * (layout.tp - 1) * 2 * FP32,
        backward=blocks + outside + again,
    )


def sequence_bytes(
    model: Model,
    layout: Layout,
    *,
    sequences: int,
    recompute: Recompute = "none",
    num_mtp: int | None = None,
    stage: Stage | None = None,
) -> Sent:
    """On the axis of the ranks that share sequences (cp x tp), for a micro-batch of `sequences`: the experts' counts."""
    ranks = layout.cp * layout.tp
    moe_layers = passed(model, num_mtp=num_mtp, stage=stage).moe
    counts = sequences * model.num_routed_experts
    ahead = 0
    if model.capacity_factor is not None:
        pieces = 2 if layout.cp > 1 and layout.tp % 2 else 1
        ahead = moe_layers * INDEX * counts * pieces * (ranks - 1)
    together = 2 * FP32 * moe_layers * counts * (ranks - 1) // ranks
    return Sent(forward=ahead + together, backward=ahead if recompute == "full" else 0)
