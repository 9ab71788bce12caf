"""config.json of Hugging Face's DeepSeek-V3, and the model that it describes."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from quintet.errors import CheckpointError, SpecError
from quintet.spec.model import Model, Yarn

NAME = "config.json"


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """The fields of config.json under Hugging Face's names, with the values that an absent field has there."""

    architectures: tuple[str, ...] | None = ("DeepseekV3ForCausalLM",)
    model_type: str = "deepseek_v3"
    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_nextn_predict_layers: int = 1
    num_attention_heads: int = 128
    num_key_value_heads: int | None = None
    n_shared_experts: int | None = 1
    n_routed_experts: int = 256
    routed_scaling_factor: float = 2.5
    kv_lora_rank: int = 512
    q_lora_rank: int | None = 1536
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    qk_nope_head_dim: int = 128
    n_group: int = 8
    topk_group: int = 4
    num_experts_per_tok: int = 8
    first_k_dense_replace: int = 3
    norm_topk_prob: bool = True
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    moe_layer_freq: int = 1
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    """YaRN as transformers 4 reads it."""
    rope_parameters: dict[str, Any] | None = None
    """Rotary embedding as transformers 5 reads it."""
    rope_interleave: bool | None = True
    attention_bias: bool = False
    attention_dropout: float = 0.0
    torch_dtype: str | None = None
    quantization_config: dict[str, Any] | None = None


def from_model(model: Model, *, dtype: str, bos_token_id: int | None, eos_token_id: int | None) -> HubConfig:
    """The config.json of a model whose weights are stored as `dtype`. Raises CheckpointError for what it cannot say."""
    if model.capacity_factor is not None:
        raise CheckpointError(
            f"model.capacity_factor ({model.capacity_factor}) has no place in Hugging Face's {NAME}: its DeepSeek-V3 drops no tokens; "
            "only models trained without a capacity can be exported"
        )
    yarn = None if model.yarn is None else _rope_scaling(model.yarn)
    return HubConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.dense_ffn_size,
        moe_intermediate_size=model.expert_ffn_size,
        num_hidden_layers=model.num_layers,
        num_nextn_predict_layers=model.num_mtp_modules,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_heads,
        n_shared_experts=model.num_shared_experts,
        n_routed_experts=model.num_routed_experts,
        routed_scaling_factor=model.routed_scaling_factor,
        kv_lora_rank=model.kv_lora_rank,
        q_lora_rank=model.q_lora_rank,
        qk_rope_head_dim=model.qk_rope_head_dim,
        v_head_dim=model.v_head_dim,
        qk_nope_head_dim=model.qk_nope_head_dim,
        n_group=model.num_groups,
        topk_group=model.num_groups_per_token,
        num_experts_per_tok=model.num_experts_per_token,
        first_k_dense_replace=model.num_dense_layers,
        norm_topk_prob=model.normalize_gates,
        max_position_embeddings=model.max_context,
        initializer_range=model.init_std,
        rms_norm_eps=model.rms_norm_eps,
        tie_word_embeddings=model.tie_embeddings,
        rope_theta=model.rope_theta,
        rope_scaling=yarn and {**yarn, "type": "yarn"},
        rope_parameters={"rope_type": "default", **(yarn or {}), "rope_theta": model.rope_theta},
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
        torch_dtype=dtype,
    )


def dumps(config: HubConfig) -> str:
    """The text of config.json."""
    tree = {key: value for key, value in dataclasses.asdict(config).items() if key != "quantization_config" or value is not None}
    return json.dumps(tree, indent=2) + "\n"


def read(directory: Path) -> HubConfig:
    """The config.json of a directory. Raises CheckpointError if it is absent, broken, or not of a DeepSeek-V3 model."""
    path = directory / NAME
    try:
        tree = json.loads(path.read_bytes())
        if isinstance(tree, dict) and "num_mtp_layers" in tree:  # transformers' own word for it
            tree.setdefault("num_nextn_predict_layers", tree["num_mtp_layers"])
        if isinstance(tree, dict) and "dtype" in tree:
            tree.setdefault("torch_dtype", tree["dtype"])
        config = msgspec.convert(tree, HubConfig, strict=True)
    except FileNotFoundError:
        raise CheckpointError(f"no {NAME} in {directory}; name a directory in Hugging Face's format") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    _refuse_unsupported(config, path)
    return config


def to_model(config: HubConfig, *, origin: str) -> Model:
    """The model that a config.json describes; `origin` names it in errors. Raises CheckpointError for impossible numbers."""
    try:
        return Model(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_dense_layers=min(config.first_k_dense_replace, config.num_hidden_layers),
            num_heads=config.num_attention_heads,
            q_lora_rank=config.q_lora_rank,
            kv_lora_rank=config.kv_lora_rank,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.v_head_dim,
            dense_ffn_size=config.intermediate_size,
            expert_ffn_size=config.moe_intermediate_size,
            num_routed_experts=config.n_routed_experts,
            num_shared_experts=config.n_shared_experts or 0,
            num_experts_per_token=config.num_experts_per_tok,
            num_groups=config.n_group,
            num_groups_per_token=config.topk_group,
            routed_scaling_factor=config.routed_scaling_factor,
            normalize_gates=config.norm_topk_prob,
            num_mtp_modules=config.num_nextn_predict_layers,
            tie_embeddings=config.tie_word_embeddings,
            max_context=config.max_position_embeddings,
            rope_theta=float(_rope(config).get("rope_theta", config.rope_theta)),
            yarn=_yarn(config),
            rms_norm_eps=config.rms_norm_eps,
            init_std=config.initializer_range,
        )
    except (SpecError, TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{origin}: {error}") from None


def _refuse_unsupported(config: HubConfig, path: Path) -> None:
    for name, value, supported in (
        ("model_type", config.model_type, ("deepseek_v3",)),
        ("hidden_act", config.hidden_act, ("silu",)),
        ("scoring_func", config.scoring_func, ("sigmoid",)),
        ("topk_method", config.topk_method, ("noaux_tc",)),
        ("moe_layer_freq", config.moe_layer_freq, (1,)),
        ("num_key_value_heads", config.num_key_value_heads, (config.num_attention_heads, None)),
        ("rope_interleave", config.rope_interleave, (True,)),
        ("attention_bias", config.attention_bias, (False,)),
        ("the rotary embedding's type", _rope_type(config), ("default", "yarn")),
        ("quantization_config.quant_method", (config.quantization_config or {}).get("quant_method", "fp8"), ("fp8",)),
    ):
        if value not in supported:
            raise CheckpointError(f"{path}: {name} is {value!r}, but only {' or '.join(map(repr, supported))} can be imported")


def _rope(config: HubConfig) -> dict[str, Any]:
    return config.rope_scaling or config.rope_parameters or {}


def _rope_type(config: HubConfig) -> str:
    rope = _rope(config)
    return str(rope.get("rope_type", rope.get("type", "default")))


def _magnitude(factor: float, weight: float) -> float:
    """Eq. 22 of arXiv 2309.00071 with V3's weight: 0.1 w ln(s) + 1."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def _attention_factor(factor: float, mscale: float, all_dim: float) -> float:
    """What transformers multiplies sine and cosine with, where no attention_factor is given."""
    return _magnitude(factor, mscale) / _magnitude(factor, all_dim) if mscale and all_dim else _magnitude(factor, 1.0)


def _rope_scaling(yarn: Yarn) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_context,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }


def _yarn(config: HubConfig) -> Yarn | None:
    rope = _rope(config)
    if _rope_type(config) == "default":
        return None
    factor, mscale, all_dim = float(rope["factor"]), float(rope.get("mscale") or 0), float(rope.get("mscale_all_dim") or 0)
    expected = _attention_factor(factor, mscale, all_dim)
    if not math.isclose(rope.get("attention_factor") or expected, expected, rel_tol=1e-6):
        raise ValueError(f"attention_factor ({rope['attention_factor']}) must be {expected}, as the mscales say; leave it out")
    if rope.get("truncate") is False:
        raise ValueError("truncate (false) must be true: V3 rounds the ends of YaRN's ramp to whole pairs")
    return Yarn(
        factor=factor,
        original_context=int(rope.get("original_max_position_embeddings") or config.max_position_embeddings),
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        mscale=mscale,
        mscale_all_dim=all_dim,
    )
