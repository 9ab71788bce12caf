"""Bytes that autograd keeps from forward for backward on one rank, layer by layer, from the spec.

They hold for fused element-wise operations. Of the T tokens that the ranks of a tp group share (micro-batch x sequence / cp), a rank keeps
per token, in elements of the compute type (t = tp, D hidden, h = H/t heads here, r_q and r_kv the latents' widths, n p v the widths per
head of no-position, rotary and value part, F an inner width, K experts per token, S sequence)

    attention   x, norm(x)                2 D/t              the norm's input, and that of wq_a and wkv_a
                t > 1, without wq_a: D                       norm(x) of all tokens, for wq
                latents, normed latents   2 (r_q + r_kv) + p
                q, k, v                   h (2 (n+p) + v)    k with a copy of its rotary part per head
                output                    h v                the input of wo
                CPU: probabilities        h (S + 128)/2      in blocks of 128 queries, if S is at most 2,048
                CUDA: output again        h v                as the fused kernel laid it out
                ring: q and payload in place of q, k, v, probabilities and, where it is the payload, the normed latent
    dense ffn   x, norm(x)                2 D/t              t > 1: of norm(x) all tokens, D
                gate and up, product      3 F/t
    MoE ffn     x, norm(x)                2 D/t
                shared experts            3 F_s/t            t > 1: and norm(x) of all tokens, D
                routed experts            K/t (D + 3 F_e)    gathered inputs, gate and up, product times the router's gate;
                                                             with expert_tp t times as many rows of D + 3 F_e/t

and a few numbers in fp32: reciprocal RMS, log-sum-exp, scores. Expert parallelism brings a rank as many rows as it sends, where experts are
chosen equally often. Each routed expert's rows are padded to a multiple of 16. Under `selective` recompute the norms' outputs, normed
latents, q, k, v (or the payload) and probabilities are made again (V3 3.2.3), but norm(x) stays where queries are made straight from it,
and D/t of it where a split feed-forward gathers it again; under `full` a layer keeps only x, and one layer at a time goes backward with
all it needs.
"""

from __future__ import annotations

from typing import Literal

from quintet.cost.expert_comm import ranks_per_token
from quintet.cost.ring_comm import ring_payload, ring_width
from quintet.spec.layout import Layout
from quintet.spec.model import Model
from quintet.spec.run import Train

Device = Literal["cpu", "cuda"]

FP32 = 4
INDEX = 8
KEEP_PROBABILITIES_BELOW = 2048
"""Longest sequence whose attention probabilities are kept on a CPU. These three are those of `ops`, which needs torch."""
QUERY_BLOCK = 128
"""Queries whose probabilities reach to the same key."""
ROW_ALIGNMENT = 16
"""What the rows of each expert are padded to a multiple of, unless they are few."""


def block_bytes(model: Model, train: Train, layout: Layout, *, moe: bool, sequence_length: int, device: Device) -> int:
    """Bytes that a micro-batch keeps in one layer, dense or mixture of experts, outside of its own recomputation."""
    size, width = element_bytes(train), model.hidden_size
    tokens = tokens_of(train, layout, sequence_length)
    own = tokens // layout.tp
    if train.recompute == "full":
        return own * size * width
    kept, again, exact = _attention(model, train, layout, sequence_length=sequence_length, device=device)
    kept, exact = kept + own * width, exact + own  # the other norm
    if moe:
        again += own * width
        kept += tokens * model.num_shared_experts * (3 * model.expert_ffn_size // layout.tp)
        exact += own * model.num_routed_experts
        gathered = layout.tp > 1 and model.num_shared_experts > 0
    else:
        again += own * width if layout.tp == 1 else 0
        kept += tokens * (3 * model.dense_ffn_size // layout.tp)
        gathered = layout.tp > 1
    kept += (own if train.recompute == "selective" else tokens) * width * gathered
    routed = _routed_bytes(model, layout, tokens=tokens, size=size) if moe else 0
    return size * (kept + (again if train.recompute == "none" else 0)) + FP32 * exact + routed


def _attention(model: Model, train: Train, layout: Layout, *, sequence_length: int, device: Device) -> tuple[int, int, int]:
    """Of one layer: elements that are always kept, those that selective recompute makes again, and numbers in fp32."""
    width, query, latent = model.hidden_size, model.q_lora_rank, model.kv_lora_rank
    heads, tokens = model.num_heads // layout.tp, tokens_of(train, layout, sequence_length)
    own = tokens // layout.tp
    kept = own * width + tokens * ((query or 0) + latent + model.qk_rope_head_dim + heads * model.v_head_dim)
    again = tokens * (query or 0)
    exact = own + tokens * (1 + (query is not None))
    if query is None:
        kept += own * width + (tokens * width if layout.tp > 1 else 0)
    else:
        again += own * width
    if layout.cp > 1:
        size, own_tokens = element_bytes(train), sequence_length // layout.cp
        payload = ring_payload(model, tokens_per_rank=own_tokens, cp=layout.cp, tp=layout.tp, element_bytes=size)
        again += tokens * (heads * model.qk_head_dim + ring_width(model, tp=layout.tp, payload=payload))
        again += tokens * latent if payload == "kv" else 0
        return kept, again, exact + tokens * heads
    again += tokens * (latent + heads * (2 * model.qk_head_dim + model.v_head_dim))
    if device == "cuda":
        kept += tokens * heads * model.v_head_dim
        exact += tokens * heads
    elif sequence_length <= KEEP_PROBABILITIES_BELOW:
        again += tokens * (heads * (sequence_length + min(sequence_length, QUERY_BLOCK)) // 2)
    return kept, again, exact


def _routed_bytes(model: Model, layout: Layout, *, tokens: int, size: int) -> int:
    """Bytes that the routed experts of one layer keep: copies of rows, gates, and where each row and copy lies."""
    own, per_token = tokens // layout.tp, model.num_experts_per_token
    sharing = layout.tp if layout.expert_tp > 1 else 1
    travelled = layout.ep > 1 or sharing > 1
    slots, experts = own * per_token, model.num_routed_experts // layout.ep
    copies = slots * sharing
    copies += experts * (ROW_ALIGNMENT - 1) if copies >= 4 * experts * ROW_ALIGNMENT else 0
    if travelled:  # see ops.permute: copies of what arrived come in few sizes
        step = 1 << max(copies.bit_length() - 4, 0)
        copies = -(-copies // step) * step
    rows = round(own * ranks_per_token(model, layout)) if travelled else 0
    per_copy = size * (model.hidden_size + 3 * model.expert_ffn_size // layout.expert_tp) + FP32 + INDEX
    indices = slots * (3 if travelled else 2) + rows * (1 + sharing * per_token)
    return copies * per_copy + slots * FP32 + indices * INDEX


def outside_bytes(model: Model, train: Train, layout: Layout, *, sequence_length: int, losses: int, modules: int) -> int:
    """Bytes that are kept outside of layers, where `losses` losses are computed and `modules` MTP modules run."""
    size, width, tokens = element_bytes(train), model.hidden_size, tokens_of(train, layout, sequence_length)
    own = tokens // layout.tp
    # Per loss the last norm's input and the gradient of its output. Per module the inputs of its two norms and of eh_proj; a module that
    # is recomputed keeps the first two only, one of them in place of its block's input.
    per_loss = own * (size * width + FP32) + tokens * (size * width + 2 * INDEX)
    per_module = own * (size * width if train.recompute == "full" else 4 * size * width + 2 * FP32)
    looked_up = tokens * (INDEX + 1) * (losses if layout.tp > 1 else 0)  # rows of a split vocabulary, and whether they are here
    return losses * per_loss + modules * per_module + looked_up


def tokens_of(train: Train, layout: Layout, sequence_length: int) -> int:
    """Tokens of a micro-batch that the ranks of one tp group share."""
    return train.micro_batch * sequence_length // layout.cp


def element_bytes(train: Train) -> int:
    """Bytes of one weight or activation."""
    return 2 if train.precision == "bf16" else FP32
