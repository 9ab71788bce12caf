"""Which tensors a model has, under our names and under those that V3 was published with on Hugging Face.

Every tensor of ours is made of hub tensors: `ffn.w13[0]` is `mlp.gate_proj`, `experts.w13[e, 1]` is `mlp.experts.e.up_proj`, most are one
hub tensor as it is. MTP module k is layer `num_layers + k`, with `enorm`, `hnorm`, `eh_proj` (which multiplies the embedding's norm
first, then the hidden state's, on both sides), `shared_head.norm`, and copies of the embedding and the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quintet.spec.model import Model

Shape = tuple[int, ...]

_BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wq_a.weight": "self_attn.q_a_proj.weight",
    "attention.q_norm.weight": "self_attn.q_a_layernorm.weight",
    "attention.wq_b.weight": "self_attn.q_b_proj.weight",
    "attention.wkv_a.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attention.wkv_b.weight": "self_attn.kv_b_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn.router.weight": "mlp.gate.weight",
    "ffn.router.expert_bias": "mlp.gate.e_score_correction_bias",
}
_FFN = {"ffn": "mlp", "ffn.shared": "mlp.shared_experts"}
_MTP = {
    "embed_norm.weight": "enorm.weight",
    "hidden_norm.weight": "hnorm.weight",
    "eh_proj.weight": "eh_proj.weight",
    "norm.weight": "shared_head.norm.weight",
}
_TOP = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A hub tensor, and the part of a tensor of ours that it is."""

    name: str
    """The hub's name."""
    shape: Shape
    """The hub's shape."""
    index: tuple[int, ...] = ()
    """Place in our tensor: `ours[index]` holds the same elements in the same order."""


def shapes(model: Model) -> dict[str, Shape]:
    """The name and shape of every tensor of a model: all weights and each router's `expert_bias`, in the order of the layers."""
    tensors: dict[str, Shape] = {"embed.weight": (model.vocab_size, model.hidden_size)}
    for i in range(model.num_layers):
        tensors |= _prefixed(f"layers.{i}", _block_shapes(model, dense=i < model.num_dense_layers))
    tensors["norm.weight"] = (model.hidden_size,)
    if not model.tie_embeddings:
        tensors["head.weight"] = (model.vocab_size, model.hidden_size)
    for k in range(model.num_mtp_modules):
        norm: Shape = (model.hidden_size,)
        own: dict[str, Shape] = {"hidden_norm.weight": norm, "embed_norm.weight": norm}
        own["eh_proj.weight"] = (model.hidden_size, 2 * model.hidden_size)
        own |= _prefixed("block", _block_shapes(model, dense=False))
        tensors |= _prefixed(f"mtp.{k}", own | {"norm.weight": norm})
    return tensors


def parts(name: str, shape: Shape, model: Model) -> list[Part]:
    """The hub tensors that make up our tensor `name` of `shape`, as V3 was published: one per expert and projection."""
    if name in _TOP:
        return [Part(name=_TOP[name], shape=shape)]
    kind, number, rest = name.split(".", 2)
    layer = f"model.layers.{int(number) + (model.num_layers if kind == 'mtp' else 0)}"
    if kind == "mtp" and rest in _MTP:
        return [Part(name=f"{layer}.{_MTP[rest]}", shape=shape)]
    rest = rest.removeprefix("block.")
    if rest in _BLOCK:
        return [Part(name=f"{layer}.{_BLOCK[rest]}", shape=shape)]
    block, _, leaf = rest.rpartition(".")
    if block == "ffn.experts":
        return [part for e in range(shape[0]) for part in _ffn_parts(f"{layer}.mlp.experts.{e}", leaf, shape[1:], (e,))]
    return _ffn_parts(f"{layer}.{_FFN[block]}", leaf, shape, ())


def fused_part(name: str, shape: Shape, model: Model) -> Part | None:
    """The one hub tensor that transformers 5 keeps in memory for all experts of a layer, or None for a tensor that is not of experts."""
    layer, experts, _ = parts(name, shape, model)[0].name.partition(".mlp.experts.")
    if not experts:
        return None
    if len(shape) == 4:
        return Part(name=f"{layer}.mlp.experts.gate_up_proj", shape=(shape[0], 2 * shape[2], shape[3]))
    return Part(name=f"{layer}.mlp.experts.down_proj", shape=shape)


def copies(model: Model) -> dict[str, str]:
    """Hub tensors that repeat one of ours, with its name."""
    head = "embed.weight" if model.tie_embeddings else "head.weight"
    repeated = {"lm_head.weight": head} if model.tie_embeddings else {}
    for layer in range(model.num_layers, model.num_layers + model.num_mtp_modules):
        repeated |= {f"model.layers.{layer}.embed_tokens.weight": "embed.weight", f"model.layers.{layer}.shared_head.head.weight": head}
    return repeated


def empty(model: Model) -> dict[str, Shape]:
    """Hub tensors without elements: transformers has shared experts even where there are none."""
    if model.num_shared_experts:
        return {}
    layers = [*range(model.num_dense_layers, model.num_layers), *range(model.num_layers, model.num_layers + model.num_mtp_modules)]
    into, out = (0, model.hidden_size), (model.hidden_size, 0)
    return {
        f"model.layers.{layer}.mlp.shared_experts.{name}.weight": shape
        for layer in layers
        for name, shape in (("gate_proj", into), ("up_proj", into), ("down_proj", out))
    }


def _prefixed(prefix: str, tensors: Mapping[str, Shape]) -> dict[str, Shape]:
    return {f"{prefix}.{name}": shape for name, shape in tensors.items()}


def _block_shapes(model: Model, *, dense: bool) -> dict[str, Shape]:
    hidden, experts, width = model.hidden_size, model.num_routed_experts, model.expert_ffn_size
    queries = model.num_heads * model.qk_head_dim
    attention: dict[str, Shape] = {"wq.weight": (queries, hidden)}
    if model.q_lora_rank is not None:
        attention = {
            "wq_a.weight": (model.q_lora_rank, hidden),
            "q_norm.weight": (model.q_lora_rank,),
            "wq_b.weight": (queries, model.q_lora_rank),
        }
    attention |= {
        "wkv_a.weight": (model.kv_lora_rank + model.qk_rope_head_dim, hidden),
        "kv_norm.weight": (model.kv_lora_rank,),
        "wkv_b.weight": (model.num_heads * (model.qk_nope_head_dim + model.v_head_dim), model.kv_lora_rank),
        "wo.weight": (hidden, model.num_heads * model.v_head_dim),
    }
    ffn: dict[str, Shape] = {"w13": (2, model.dense_ffn_size, hidden), "w2": (hidden, model.dense_ffn_size)}
    if not dense:
        ffn = {"router.weight": (experts, hidden), "router.expert_bias": (experts,)}
        ffn |= {"experts.w13": (experts, 2, width, hidden), "experts.w2": (experts, hidden, width)}
        if model.num_shared_experts:
            shared = model.num_shared_experts * width
            ffn |= {"shared.w13": (2, shared, hidden), "shared.w2": (hidden, shared)}
    norm: dict[str, Shape] = {"attention_norm.weight": (hidden,)}
    return norm | _prefixed("attention", attention) | {"ffn_norm.weight": (hidden,)} | _prefixed("ffn", ffn)


def _ffn_parts(prefix: str, leaf: str, shape: Shape, index: Shape) -> list[Part]:
    if leaf == "w2":
        return [Part(name=f"{prefix}.down_proj.weight", shape=shape, index=index)]
    names = ("gate_proj", "up_proj")
    return [Part(name=f"{prefix}.{name}.weight", shape=shape[1:], index=(*index, i)) for i, name in enumerate(names)]
