"""Bytes of one training step on a single device, part by part, from the spec.

Weights, gradients and optimizer state follow from the precision (bytes per parameter, MTP included):

            weights  gradients  master  moments
    bf16       2         4         4       8       bf16 weights; fp32 accumulated gradients, master weights, AdamW moments
    fp32       4         4         -       8

Activations are what autograd keeps for backward when element-wise operations are fused. Per token, in elements of the compute type
(D hidden, H heads, r_q and r_kv the latents' widths, n p v the widths per head of no-position, rotary and value part, F an inner
width, K experts per token, S sequence), a layer keeps

    attention   x, norm(x)                2 D                the norm's input, and that of wq_a and wkv_a
                latents, normed latents   2 (r_q + r_kv) + p
                q, k, v                   H (2 (n+p) + v)    k with a copy of its rotary part per head
                output                    H v                the input of wo
                CPU: probabilities        H (S + 128)/2      in blocks of 128 queries, if S is at most 2,048
                CUDA: output again        H v                as the fused kernel laid it out
    dense ffn   x, norm(x)                2 D
                gate and up, product      3 F
    MoE ffn     x, norm(x)                2 D
                shared experts            3 F_s
                routed experts            K (D + 3 F_e)      gathered inputs, gate and up, product times the router's gate

and a few numbers in fp32: reciprocal RMS, log-sum-exp, scores. Each routed expert's rows are padded to a multiple of 16. Under `selective`
recompute the norms' outputs, normed latents, q, k, v and probabilities are made again (V3 3.2.3), but norm(x) stays where queries are
made straight from it; under `full` a layer keeps only x, and one layer at a time goes backward with all it needs. The loss turns its
logits into the gradients of hidden states (counted as activations) and head at once, chunk by chunk.

An estimate: the allocator's rounding, temporaries inside an operation and the working gradients of a single layer are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

from quintet.cost.flops import parameters
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


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes by part at the peak of a training step."""

    weights: int
    """Weights that compute."""
    gradients: int
    """Accumulated gradients, fp32."""
    master_weights: int
    """fp32 copy of bf16 weights; 0 if the weights are fp32."""
    moments: int
    """Both AdamW moments, fp32."""
    activations: int
    """What a micro-batch keeps from forward for backward."""
    recomputation: int
    """What the largest layer holds besides while backward computes it again; 0 without recompute."""
    logits: int
    """One chunk's logits and their gradient, and the head's gradient that the chunks add up to: fp32, then one per loss."""

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(getattr(self, field.name) for field in fields(self))


def step_memory(model: Model, train: Train, *, sequence_length: int, device: Device = "cpu") -> Memory:
    """Bytes of a step with micro-batches of `train.micro_batch` sequences of `sequence_length` tokens, on one device."""
    size, width, modules = element_bytes(train), model.hidden_size, model.num_mtp_modules
    tokens, count = train.micro_batch * sequence_length, parameters(model).total_with_mtp
    num_blocks = {False: model.num_dense_layers, True: model.num_moe_layers + modules}

    def block(moe: bool, policy: Train) -> int:
        return block_bytes(model, policy, moe=moe, sequence_length=sequence_length, device=device)

    # Per loss the last norm's input and the gradient of its output. Per module the inputs of its two norms and of eh_proj; a module that
    # is recomputed keeps the first two only, one of them in place of its block's input.
    losses = (1 + modules) * tokens * (2 * size * width + FP32 + 2 * INDEX)
    inputs = modules * tokens * (size * width if train.recompute == "full" else 4 * size * width + 2 * FP32)
    chunk = 2 * size * min(train.loss_chunk, tokens) * model.vocab_size
    return Memory(
        weights=size * count,
        gradients=FP32 * count,
        master_weights=FP32 * count if size < FP32 else 0,
        moments=2 * FP32 * count,
        activations=sum(num * block(moe, train) for moe, num in num_blocks.items()) + losses + inputs,
        recomputation=max(block(moe, replace(train, recompute="none")) - block(moe, train) for moe, num in num_blocks.items() if num),
        logits=chunk + (FP32 + size * modules) * model.vocab_size * width,
    )


def block_bytes(model: Model, train: Train, *, moe: bool, sequence_length: int, device: Device) -> int:
    """Bytes that a micro-batch keeps in one layer, dense or mixture of experts, outside of its own recomputation."""
    size, width, tokens = element_bytes(train), model.hidden_size, train.micro_batch * sequence_length
    if train.recompute == "full":
        return tokens * size * width
    kept, again, exact = _attention_elements(model, sequence_length=sequence_length, device=device)
    kept, again = kept + width, again + width  # the other norm's input and output
    if not moe:
        kept += 3 * model.dense_ffn_size
    else:
        kept += 3 * model.num_shared_experts * model.expert_ffn_size
        exact += model.num_routed_experts
    per_token = size * (kept + (again if train.recompute == "none" else 0)) + FP32 * exact
    return tokens * per_token + (_routed_bytes(model, tokens, size=size) if moe else 0)


def _attention_elements(model: Model, *, sequence_length: int, device: Device) -> tuple[int, int, int]:
    """Per token of one layer: elements that are always kept, those that selective recompute makes again, and numbers in fp32."""
    width, heads, compressed = model.hidden_size, model.num_heads, model.q_lora_rank is not None
    latents = (model.q_lora_rank or 0) + model.kv_lora_rank
    kept = width + latents + model.qk_rope_head_dim + heads * model.v_head_dim
    again = latents + heads * (2 * model.qk_head_dim + model.v_head_dim)
    exact = 3 + compressed  # norms of this layer, the one before the feed-forward included
    if compressed:
        again += width
    else:
        kept += width
    if device == "cuda":
        kept += heads * model.v_head_dim
        exact += heads
    elif sequence_length <= KEEP_PROBABILITIES_BELOW:
        again += heads * (sequence_length + min(sequence_length, QUERY_BLOCK)) // 2
    return kept, again, exact


def _routed_bytes(model: Model, tokens: int, *, size: int) -> int:
    """Bytes that the routed experts of one layer keep: rows, gates and where each row lies."""
    slots = tokens * model.num_experts_per_token
    padded = slots >= 4 * model.num_routed_experts * ROW_ALIGNMENT
    rows = slots + (model.num_routed_experts * (ROW_ALIGNMENT - 1) if padded else 0)
    return rows * (size * (model.hidden_size + 3 * model.expert_ffn_size) + FP32 + INDEX) + slots * (FP32 + 2 * INDEX)


def element_bytes(train: Train) -> int:
    """Bytes of one weight or activation."""
    return 2 if train.precision == "bf16" else FP32
