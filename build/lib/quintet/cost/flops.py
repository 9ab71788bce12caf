"""Parameters and floating-point operations of a model, counted from its spec: one arithmetic for dry runs, the planner and the MFU meter.

A matrix of n weights costs 2n operations per token forward (a multiply and an add) and twice that backward, for the gradients of its
input and of itself. Core attention multiplies each query with S keys (S/2 on average if causal, the published convention; (S+1)/2
is exact) and sums as many values: 2 S H (qk_head_dim + v_head_dim) per token and layer. Norms, rotary embedding, softmax, gates and the
embedding's look-up are not matrix products and count as nothing; recomputation is work of the machine, not of the model, and
does not count either.

For V3 at 4,096 tokens this gives 250.45 GFLOP per token causal and 281.15 otherwise, 249.8 and 280.5 without the router's product: the
published 38.94 % and 43.73 % MFU (arXiv 2505.09343, Table 4) leave out the router and the MTP module. With MTP it is 260.6 and 291.9.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from quintet.spec.model import Model


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Trained weights by component, over all layers of the main model. `expert_bias` is a buffer and is not counted."""

    embedding: int
    """Token embedding."""
    head: int
    """Output head; 0 if it is the embedding."""
    attention: int
    """MLA projections and the norms of the latents."""
    dense_ffn: int
    """Feed-forward of the dense layers."""
    routed_experts: int
    """All routed experts."""
    shared_experts: int
    """Shared experts."""
    router: int
    """Router matrices."""
    norms: int
    """Norms before attention and feed-forward, and the last one."""
    idle_experts: int
    """The part of `routed_experts` that a token does not pass."""
    mtp: int
    """What the MTP modules add; their embedding and head are the main model's."""

    @property
    def total(self) -> int:
        """Weights of the main model, without MTP: V3's 671B."""
        own = ("embedding", "head", "attention", "dense_ffn", "routed_experts", "shared_experts", "router", "norms")
        return sum(getattr(self, name) for name in own)

    @property
    def total_with_mtp(self) -> int:
        """Weights that are trained: the main model's and those that MTP adds."""
        return self.total + self.mtp

    @property
    def active(self) -> int:
        """Weights that multiply a token: with the head, without the embedding, without MTP (V3: 36.63B)."""
        return self.active_with_embedding - (self.embedding if self.head else 0)

    @property
    def active_with_embedding(self) -> int:
        """`active` and the embedding, which is counted once if it is also the head (V3: 37.55B, published as 37B)."""
        return self.total - self.idle_experts


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations per token, by component, over all layers of the main model."""

    mla_projections: int
    """Down- and up-projections of queries, keys and values, and the output projection."""
    core_attention: int
    """Queries times keys and probabilities times values."""
    dense_ffn: int
    """Feed-forward of the dense layers."""
    routed_experts: int
    """The experts that a token is routed to."""
    shared_experts: int
    """Shared experts."""
    router: int
    """Scores of the routed experts; 0 if left out."""
    head: int
    """Logits of the main model."""
    mtp: int
    """MTP modules: their projection, block and logits; 0 if left out."""

    @property
    def total(self) -> int:
        """Sum of the components."""
        return sum(getattr(self, field.name) for field in fields(self))


def parameters(model: Model) -> Parameters:
    """The weights of `model` by component."""
    width, dense, moe = model.hidden_size, model.num_dense_layers, model.num_moe_layers
    attention = attention_weights(model) + model.kv_lora_rank + (model.q_lora_rank or 0)
    routed = model.num_routed_experts * expert_weights(model)
    shared = model.num_shared_experts * expert_weights(model)
    router = model.num_routed_experts * width
    # hidden_norm, embed_norm and the last norm, eh_proj, and a whole mixture-of-experts block with its two norms
    module = 3 * width + 2 * width**2 + attention + routed + shared + router + 2 * width
    return Parameters(
        embedding=model.vocab_size * width,
        head=0 if model.tie_embeddings else model.vocab_size * width,
        attention=model.num_layers * attention,
        dense_ffn=dense * 3 * width * model.dense_ffn_size,
        routed_experts=moe * routed,
        shared_experts=moe * shared,
        router=moe * router,
        norms=(2 * model.num_layers + 1) * width,
        idle_experts=moe * (model.num_routed_experts - model.num_experts_per_token) * expert_weights(model),
        mtp=model.num_mtp_modules * module,
    )


def flops_per_token(
    model: Model,
    *,
    sequence_length: int,
    causal: bool = True,
    mtp: bool = False,
    gate: bool = True,
    backward: bool = True,
) -> Flops:
    """Operations for one token of a sequence of `sequence_length` tokens.

    `causal` counts half of the attention matrix; `mtp` adds the MTP modules, as if each ran on every token; `gate` counts the router's
    product; `backward` makes it a training step, three times the forward pass. DeepSeek's published MFU has mtp=False and gate=False.
    """
    width, dense, moe = model.hidden_size, model.num_dense_layers, model.num_moe_layers
    work = 6 if backward else 2
    keys_doubled = sequence_length if causal else 2 * sequence_length  # twice the keys per query, to stay with whole numbers
    projections = work * attention_weights(model)
    attention = work * keys_doubled * model.num_heads * (model.qk_head_dim + model.v_head_dim) // 2
    routed = work * model.num_experts_per_token * expert_weights(model)
    shared = work * model.num_shared_experts * expert_weights(model)
    router = work * model.num_routed_experts * width if gate else 0
    head = work * model.vocab_size * width
    module = work * 2 * width**2 + projections + attention + routed + shared + router + head
    return Flops(
        mla_projections=model.num_layers * projections,
        core_attention=model.num_layers * attention,
        dense_ffn=dense * work * 3 * width * model.dense_ffn_size,
        routed_experts=moe * routed,
        shared_experts=moe * shared,
        router=moe * router,
        head=head,
        mtp=model.num_mtp_modules * module if mtp else 0,
    )


def attention_weights(model: Model) -> int:
    """Weights of one layer's MLA matrices: wq_a and wq_b (or wq), wkv_a, wkv_b, wo; without the norms of the latents."""
    width, heads = model.hidden_size, model.num_heads
    rank = model.q_lora_rank
    query = width * heads * model.qk_head_dim if rank is None else rank * (width + heads * model.qk_head_dim)
    key_value = model.kv_lora_rank * (width + heads * (model.qk_nope_head_dim + model.v_head_dim)) + width * model.qk_rope_head_dim
    return query + key_value + heads * model.v_head_dim * width


def expert_weights(model: Model) -> int:
    """Weights of one expert: w13 and w2."""
    return 3 * model.hidden_size * model.expert_ffn_size
