"""Bytes of one training step on a single device, part by part, from the spec.

Weights, gradients and optimizer state follow from the precision (bytes per parameter, MTP included):

            weights  gradients  master  moments
    bf16       2         4         4       8       bf16 weights; fp32 accumulated gradients, master weights, AdamW moments
    fp32       4         4         -       8

Activations are what autograd keeps for backward: the inputs of each operation whose gradient needs them. Per token, in elements of the
compute type (D hidden, H heads, r a latent's width, n/p/v the no-position, rotary and value widths per head, F an inner width, K experts
per token), a layer keeps

    attention   x, norm(x)                        2 D              input of the norm; input of wq_a and wkv_a
                latents before and after norm     2 (r_q + r_kv)
                q, k, v                           H (2(n+p) + v)   k with its shared rotary part copied to each head
                attention's output                H v              input of wo, and kept by the fused kernel
    dense ffn   x, norm(x)                        2 D
                gate and up, their product        3 F
    MoE ffn     x, norm(x)                        2 D
                shared: gate and up, product      3 F_s
                routed, per expert passed         2 D + 3 F_e      its gathered input, w2's output for the gate's gradient

and a few numbers in fp32: the reciprocal RMS of each norm, log-sum-exp per head, router scores. Under `selective` recompute the norms'
outputs, the normed latents, q, k and v are computed again (V3 3.2.3); under `full` a layer keeps only its input x, and one layer's
activations exist at a time while it goes backward. This is an estimate: it leaves out the allocator's rounding and the
temporaries inside an operation.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from quintet.cost.flops import parameters
from quintet.spec.model import Model
from quintet.spec.run import Train

FP32 = 4
INDEX = 8


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
    """What a micro-batch keeps for backward."""
    logits: int
    """Logits of one chunk of the loss: in the compute type, and their fp32 softmax and gradient."""

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(getattr(self, field.name) for field in fields(self))


def step_memory(model: Model, train: Train, *, sequence_length: int) -> Memory:
    """Bytes of a step with micro-batches of `train.micro_batch` sequences of `sequence_length` tokens, on one device."""
    count = parameters(model).total_with_mtp
    size = element_bytes(train)
    tokens = train.micro_batch * sequence_length
    return Memory(
        weights=size * count,
        gradients=FP32 * count,
        master_weights=FP32 * count if size < FP32 else 0,
        moments=2 * FP32 * count,
        activations=tokens * activation_bytes_per_token(model, train),
        logits=min(train.loss_chunk, tokens) * model.vocab_size * (size + 2 * FP32),
    )


def activation_bytes_per_token(model: Model, train: Train) -> int:
    """Bytes that one token of a micro-batch keeps for backward, over all layers and MTP modules."""
    size, width = element_bytes(train), model.hidden_size
    dense, moe = (block_bytes_per_token(model, train, moe=moe) for moe in (False, True))
    num_moe_blocks = model.num_moe_layers + model.num_mtp_modules
    blocks = model.num_dense_layers * dense + num_moe_blocks * moe
    if train.recompute == "full":  # the inputs, and the block that is computed again
        whole = Train(precision=train.precision)
        present = [block_bytes_per_token(model, whole, moe=True)] * (num_moe_blocks > 0)
        present += [block_bytes_per_token(model, whole, moe=False)] * (model.num_dense_layers > 0)
        blocks += max(present) - size * width
    last_norm = (2 * size * width + FP32) * (1 + model.num_mtp_modules)
    # A module keeps the inputs of its two norms and their concatenated outputs, the input of eh_proj.
    mtp_inputs = model.num_mtp_modules * (4 * size * width + 2 * FP32)
    return INDEX + blocks + last_norm + mtp_inputs


def block_bytes_per_token(model: Model, train: Train, *, moe: bool) -> int:
    """Bytes that one token keeps in one layer, dense or mixture of experts."""
    size, width = element_bytes(train), model.hidden_size
    if train.recompute == "full":
        return size * width
    latents = (model.q_lora_rank or 0) + model.kv_lora_rank
    heads_up = model.num_heads * (2 * model.qk_head_dim + model.v_head_dim)
    again = 2 * width + latents + heads_up  # norms' outputs, normed latents, q, k, v
    kept = 2 * width + latents + model.num_heads * model.v_head_dim
    num_norms = 3 + (model.q_lora_rank is not None)
    exact = FP32 * (num_norms + model.num_heads)
    if moe:
        passed = model.num_experts_per_token
        kept += 3 * model.num_shared_experts * model.expert_ffn_size + passed * (2 * width + 3 * model.expert_ffn_size)
        # Scores and the two forms of the gates in fp32, the chosen experts and each row's place among the gathered ones.
        exact += FP32 * (2 * model.num_routed_experts + 2 * passed) + INDEX * 2 * passed
    else:
        kept += 3 * model.dense_ffn_size
    return size * (kept + (again if train.recompute == "none" else 0)) + exact


def element_bytes(train: Train) -> int:
    """Bytes of one weight or activation."""
    return 2 if train.precision == "bf16" else FP32
