"""Shapes of public models, by their names: what a table of published runs has no columns for, or leaves blank.

All are those of the models' public configurations.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

UNKNOWN = r"qwen3-next|mamba|hybrid|nemotron-h|nemotron-3"
"""Pattern of models with layers that are not modelled."""

DEEPSEEK = dict(kv_lora_rank=512, qk_rope_head_dim=64, qk_head_dim=192, v_head_dim=128)
"""Latent attention of DeepSeek's models."""

BESIDE: tuple[tuple[str, Mapping[str, Any]], ...] = (
    (r"qwen3", {"qk_head_dim": 128, "v_head_dim": 128}),
    (r"gpt-?oss", {"qk_head_dim": 64, "v_head_dim": 64}),
    (r"llama-?4-maverick", {"shared_ffn_size": 8192, "num_dense_layers": 24}),
    (r"llama-?4-scout", {"shared_ffn_size": 8192, "num_dense_layers": 0}),
    (r"qwen2-57b", {"shared_ffn_size": 20480, "ffn_size": 0, "num_dense_layers": 0}),
    (r"deepseek-v3-16b|v2-lite|moonlight", {**DEEPSEEK, "shared_ffn_size": 2816, "num_dense_layers": 1}),
    (r"deepseek-v2", {**DEEPSEEK, "q_lora_rank": 1536, "shared_ffn_size": 3072, "num_dense_layers": 1, "groups_per_token": 3}),
    (
        r"deepseek-v3|deepseek-r1",
        {**DEEPSEEK, "q_lora_rank": 1536, "shared_ffn_size": 2048, "num_dense_layers": 3, "groups_per_token": 4, "num_mtp_modules": 1},
    ),
    (r"kimi-?k2", {**DEEPSEEK, "q_lora_rank": 1536, "shared_ffn_size": 2048, "num_dense_layers": 1}),
)
"""Pattern of a model's name -> fields of its architecture that the table has no columns for."""

_COLUMNS = ("hidden", "layers", "heads", "kv_heads_or_mla", "ffn", "vocab", "experts", "topk", "moe_ffn")
_BLANKS: tuple[tuple[str, tuple[int, ...]], ...] = (
    (r"mpt-125m", (768, 12, 12, 12, 3072, 50368)),
    (r"mpt-350m", (1024, 24, 16, 16, 4096, 50368)),
    (r"mpt-760m", (1536, 24, 12, 12, 6144, 50368)),
    (r"bloom", (14336, 70, 112, 112, 57344, 250880)),
    (r"opt-175b", (12288, 96, 96, 96, 49152, 50272)),
    (r"smollm-?1\.7b", (2048, 24, 32, 32, 8192, 49152)),
    (r"olmo-?[23]-32b", (5120, 64, 40, 8, 27648, 100352)),
    (r"qwen2\.5-7b", (3584, 28, 28, 4, 18944, 152064)),
    (r"qwen2\.5-14b", (5120, 48, 40, 8, 13824, 152064)),
    (r"qwen2\.5-32b", (5120, 64, 40, 8, 27648, 152064)),
    (r"qwen2\.5-72b", (8192, 80, 64, 8, 29568, 152064)),
    (r"qwen3-30b", (2048, 48, 32, 4, 6144, 151936, 128, 8, 768)),
    (r"qwen3-235b", (4096, 94, 64, 4, 12288, 151936, 128, 8, 1536)),
    (r"qwen2-57b", (3584, 28, 28, 4, 18944, 151936, 64, 8, 2560)),
    (r"gpt-?oss-20b", (2880, 24, 64, 8, 2880, 201088, 32, 4, 2880)),
    (r"gpt-?oss-120b", (2880, 36, 64, 8, 2880, 201088, 128, 4, 2880)),
    (r"mistral-?7b", (4096, 32, 32, 8, 14336, 32000)),
    (r"mixtral-8x7b", (4096, 32, 32, 8, 14336, 32000, 8, 2, 14336)),
    (r"mixtral-8x22b(?!-g)", (6144, 56, 48, 8, 16384, 32768, 8, 2, 16384)),
    (r"dbrx", (6144, 40, 48, 8, 10752, 100352, 16, 4, 10752)),
    (r"grok-1", (6144, 64, 48, 8, 32768, 131072, 8, 2, 32768)),
    (r"llama-?4-scout", (5120, 48, 40, 8, 16384, 202048, 16, 1, 8192)),
    (r"llama-?4-maverick", (5120, 48, 40, 8, 16384, 202048, 128, 1, 8192)),
    (r"llama-?2-7b", (4096, 32, 32, 32, 11008, 32000)),
    (r"llama-?2-13b", (5120, 40, 40, 40, 13824, 32000)),
    (r"llama-?2-70b", (8192, 80, 64, 8, 28672, 32000)),
    (r"llama-?3.*405b", (16384, 126, 128, 8, 53248, 128256)),
    (r"llama-?3.*70b", (8192, 80, 64, 8, 28672, 128256)),
    (r"llama-?3.*8b", (4096, 32, 32, 8, 14336, 128256)),
    (r"deepseek-v2-lite|deepseek-v3-16b", (2048, 27, 16, 16, 10944, 102400, 64, 6, 1408)),
    (r"deepseek-v2", (5120, 60, 128, 128, 12288, 102400, 160, 6, 1536)),
    (r"deepseek-v3|deepseek-r1", (7168, 61, 128, 128, 18432, 129280, 256, 8, 2048)),
    (r"kimi-?k2", (7168, 61, 64, 64, 18432, 163840, 384, 8, 2048)),
)
"""Pattern of a model's name -> its columns, the last three only of mixtures of experts."""


def beside(name: str) -> Mapping[str, Any]:
    """What the columns do not hold of this model."""
    return next((fields for pattern, fields in BESIDE if re.search(pattern, name.lower())), {})


def filled(row: Mapping[str, str]) -> Mapping[str, str]:
    """The row with the columns of a public model's shape, where they are blank."""
    name = row["model"].lower()
    if "8x70b" in name:  # made from a dense model of this size
        return row
    known = next((shape for pattern, shape in _BLANKS if re.search(pattern, name)), ())
    columns = {column: str(value) for column, value in zip(_COLUMNS, known, strict=False) if not row.get(column)}
    return {**row, **columns}
