"""A transformer as its matrix products: what the planner computes time and memory from, for Quintet's models and for published ones.

Quintet trains what `spec.Model` describes, with latent attention. The planner must also be held against published runs of other
transformers, so it sees any of them as a list of products per block, by how tensor parallelism splits them. `of_model` turns a `Model` into
one; its operations are those of `cost.flops` (tested).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

from quintet.spec.model import Model

Split = Literal["columns", "rows", "tokens"]
"""How tp divides a product: its outputs, its inputs, or neither, where each rank does its share of the tokens."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """A matrix of a block: every token that passes it costs 2 x inputs x outputs operations forward and twice that backward."""

    name: str
    inputs: int
    outputs: int
    split: Split
    low: bool = True
    """Whether it runs in fp8 or nvfp4 where the precision says so; router, head and MTP's projection stay in bf16 (V3, 3.3.1)."""

    @property
    def weights(self) -> int:
        """Elements."""
        return self.inputs * self.outputs


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder-only transformer. Without `kv_lora_rank` attention is multi-head or grouped-query; without `num_experts` it is dense."""

    hidden_size: int
    num_layers: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    qk_head_dim: int
    v_head_dim: int
    ffn_size: int = 0
    """Inner width of the dense feed-forward."""
    gated: bool = True
    """Whether feed-forwards have a gate (SwiGLU: three matrices), or two matrices only."""
    num_dense_layers: int = 0
    """Layers whose feed-forward is dense; all of them without experts."""
    num_experts: int = 0
    experts_per_token: int = 0
    expert_ffn_size: int = 0
    shared_ffn_size: int = 0
    """Inner width of what every token passes beside its experts."""
    groups_per_token: int | None = None
    """Node groups that a token's experts may come from; None: any."""
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int = 0
    """Width of the shared rotary part of latent attention."""
    num_mtp_modules: int = 0
    tie_embeddings: bool = False

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts."""
        return self.num_layers - self.num_dense_layers if self.num_experts else 0

    @cached_property
    def attention(self) -> tuple[Product, ...]:
        """The projections of attention."""
        width, heads = self.hidden_size, self.num_heads
        output = Product(name="wo", inputs=heads * self.v_head_dim, outputs=width, split="rows")
        if self.kv_lora_rank is None:
            outputs = heads * self.qk_head_dim + self.num_kv_heads * (self.qk_head_dim + self.v_head_dim)
            return (Product(name="wqkv", inputs=width, outputs=outputs, split="columns"), output)
        down, up = self.kv_lora_rank, heads * (self.qk_head_dim - self.qk_rope_head_dim + self.v_head_dim)
        found = [
            Product(name="wkv_a", inputs=width, outputs=down + self.qk_rope_head_dim, split="tokens"),
            Product(name="wkv_b", inputs=down, outputs=up, split="columns"),
        ]
        queries = heads * self.qk_head_dim
        if self.q_lora_rank is None:
            found.append(Product(name="wq", inputs=width, outputs=queries, split="columns"))
        else:
            found.append(Product(name="wq_a", inputs=width, outputs=self.q_lora_rank, split="tokens"))
            found.append(Product(name="wq_b", inputs=self.q_lora_rank, outputs=queries, split="columns"))
        return (*found, output)

    def feed_forward(self, inner: int, name: str) -> tuple[Product, ...]:
        """The matrices of a feed-forward."""
        width = self.hidden_size
        first = Product(name=f"{name}.w13", inputs=width, outputs=inner * (2 if self.gated else 1), split="columns")
        return (first, Product(name=f"{name}.w2", inputs=inner, outputs=width, split="rows")) if inner else ()

    @cached_property
    def dense(self) -> tuple[Product, ...]:
        """Of a dense layer's feed-forward."""
        return self.feed_forward(self.ffn_size, "ffn")

    @cached_property
    def shared(self) -> tuple[Product, ...]:
        """Of the shared experts."""
        return self.feed_forward(self.shared_ffn_size, "shared")

    @cached_property
    def expert(self) -> tuple[Product, ...]:
        """Of one routed expert."""
        return self.feed_forward(self.expert_ffn_size, "expert")

    @cached_property
    def router(self) -> tuple[Product, ...]:
        """The scores of the experts."""
        return (Product(name="router", inputs=self.hidden_size, outputs=self.num_experts, split="tokens", low=False),)

    @cached_property
    def head(self) -> tuple[Product, ...]:
        """Logits."""
        return (Product(name="head", inputs=self.hidden_size, outputs=self.vocab_size, split="columns", low=False),)

    @cached_property
    def projection(self) -> tuple[Product, ...]:
        """What an MTP module joins hidden state and embedding with."""
        return (Product(name="eh_proj", inputs=2 * self.hidden_size, outputs=self.hidden_size, split="tokens", low=False),)

    def block_weights(self, *, moe: bool) -> tuple[int, int]:
        """Weights of a layer that every rank of ep holds, and of its routed experts."""
        common = sum(p.weights for p in self.attention) + 2 * self.hidden_size
        if not moe:
            return common + sum(p.weights for p in self.dense), 0
        return common + sum(p.weights for p in self.router + self.shared), self.num_experts * sum(p.weights for p in self.expert)

    @property
    def parameters(self) -> int:
        """All weights, MTP modules included; norms of latents left out."""
        blocks = (self.num_layers - self.num_moe_layers) * sum(self.block_weights(moe=False))
        blocks += self.num_moe_layers * sum(self.block_weights(moe=True))
        modules = self.num_mtp_modules * (sum(self.block_weights(moe=bool(self.num_experts))) + self.projection[0].weights)
        return blocks + modules + self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)

    def attention_flops(self, *, keys: float) -> float:
        """Operations of core attention per query forward, over that many keys."""
        return 2 * keys * self.num_heads * (self.qk_head_dim + self.v_head_dim)

    def layer_costs(self) -> tuple[list[float], float]:
        """Operations of a token in each layer, and behind the last one, as `cost.balance.layer_costs` counts them of a model."""
        attention = 2 * sum(p.weights for p in self.attention) + self.attention_flops(keys=2048)
        dense = attention + 2 * sum(p.weights for p in self.dense)
        experts = 2 * self.experts_per_token * sum(p.weights for p in self.expert)
        moe = attention + experts + 2 * sum(p.weights for p in (*self.router, *self.shared))
        head = 2 * self.head[0].weights
        module = (moe if self.num_experts else dense) + head + 2 * self.projection[0].weights
        layers = [dense] * (self.num_layers - self.num_moe_layers) + [moe] * self.num_moe_layers
        return [3 * layer for layer in layers], 3 * (head + self.num_mtp_modules * module)

    def flops_per_token(self, *, sequence_length: int, causal: bool = True, mtp: bool = True, gate: bool = True) -> float:
        """Operations per token of a training step, in the conventions of `cost.flops.flops_per_token`."""
        keys = sequence_length / 2 if causal else sequence_length
        attention = 2 * sum(p.weights for p in self.attention) + self.attention_flops(keys=keys)
        experts = 2 * self.experts_per_token * sum(p.weights for p in self.expert)
        moe = attention + experts + 2 * sum(p.weights for p in self.shared + (self.router if gate else ()))
        dense = attention + 2 * sum(p.weights for p in self.dense)
        head = 2 * self.head[0].weights
        module = (moe if self.num_experts else dense) + head + 2 * self.projection[0].weights
        layers = self.num_moe_layers * moe + (self.num_layers - self.num_moe_layers) * dense
        return 3 * (layers + head + (self.num_mtp_modules * module if mtp else 0))

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def __hash__(self) -> int:  # kept, because searches look these up many times
        return self._hash


def of_model(model: Model) -> Architecture:
    """Quintet's own model."""
    return Architecture(
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        vocab_size=model.vocab_size,
        num_heads=model.num_heads,
        num_kv_heads=model.num_heads,
        qk_head_dim=model.qk_head_dim,
        v_head_dim=model.v_head_dim,
        ffn_size=model.dense_ffn_size,
        num_dense_layers=model.num_dense_layers,
        num_experts=model.num_routed_experts,
        experts_per_token=model.num_experts_per_token,
        expert_ffn_size=model.expert_ffn_size,
        shared_ffn_size=model.num_shared_experts * model.expert_ffn_size,
        groups_per_token=model.num_groups_per_token if model.num_groups > 1 else None,
        q_lora_rank=model.q_lora_rank,
        kv_lora_rank=model.kv_lora_rank,
        qk_rope_head_dim=model.qk_rope_head_dim,
        num_mtp_modules=model.num_mtp_modules,
        tie_embeddings=model.tie_embeddings,
    )
