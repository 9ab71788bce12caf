"""Parameters and FLOPs against the published figures and against a list of every weight's shape."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quintet.cost.flops import flops_per_token, parameters
from quintet.spec.model import Model
from tests.spec.strategies import models

V3 = Model(
    vocab_size=129280,
    hidden_size=7168,
    num_layers=61,
    num_dense_layers=3,
    num_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    dense_ffn_size=18432,
    expert_ffn_size=2048,
    num_routed_experts=256,
    num_shared_experts=1,
    num_experts_per_token=8,
    num_groups=8,
    num_groups_per_token=4,
)
V2 = replace(
    V3,
    vocab_size=102400,
    hidden_size=5120,
    num_layers=60,
    num_dense_layers=1,
    dense_ffn_size=12288,
    expert_ffn_size=1536,
    num_routed_experts=160,
    num_shared_experts=2,
    num_experts_per_token=6,
    num_groups_per_token=3,
)
V2_LITE = replace(
    V2,
    hidden_size=2048,
    num_layers=27,
    num_heads=16,
    q_lora_rank=None,
    dense_ffn_size=10944,
    expert_ffn_size=1408,
    num_routed_experts=64,
    num_groups=1,
    num_groups_per_token=1,
)


def attention_shapes(m: Model, at: str) -> dict[str, tuple[int, ...]]:
    heads, width = m.num_heads, m.hidden_size
    rank, up = m.q_lora_rank, heads * m.qk_head_dim
    query: dict[str, tuple[int, ...]] = {"wq": (up, width)}
    if rank is not None:
        query = {"wq_a": (rank, width), "wq_b": (up, rank), "q_norm": (rank,)}
    shapes = query | {
        "wkv_a": (m.kv_lora_rank + m.qk_rope_head_dim, width),
        "kv_norm": (m.kv_lora_rank,),
        "wkv_b": (heads * (m.qk_nope_head_dim + m.v_head_dim), m.kv_lora_rank),
        "wo": (width, heads * m.v_head_dim),
    }
    return {f"{at}.{name}": shape for name, shape in shapes.items()}


def ffn_shapes(m: Model, at: str, *, moe: bool) -> dict[str, tuple[int, ...]]:
    width, experts = m.hidden_size, m.num_routed_experts
    if not moe:
        return {f"{at}.dense.w13": (2, m.dense_ffn_size, width), f"{at}.dense.w2": (width, m.dense_ffn_size)}
    shared = m.num_shared_experts * m.expert_ffn_size
    return {
        f"{at}.router": (experts, width),
        f"{at}.routed.w13": (experts, 2, m.expert_ffn_size, width),
        f"{at}.routed.w2": (experts, width, m.expert_ffn_size),
        f"{at}.shared.w13": (2, shared, width),
        f"{at}.shared.w2": (width, shared),
    }


def block_shapes(m: Model, at: str, *, moe: bool) -> dict[str, tuple[int, ...]]:
    norms = {f"{at}.attention_norm": (m.hidden_size,), f"{at}.ffn_norm": (m.hidden_size,)}
    return norms | attention_shapes(m, at) | ffn_shapes(m, at, moe=moe)


def main_shapes(m: Model) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"embed": (m.vocab_size, m.hidden_size), "norm": (m.hidden_size,)}
    if not m.tie_embeddings:
        shapes["head"] = (m.vocab_size, m.hidden_size)
    for i in range(m.num_layers):
        shapes |= block_shapes(m, f"layers.{i}", moe=i >= m.num_dense_layers)
    return shapes


def mtp_shapes(m: Model) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(m.num_mtp_modules):
        at = f"mtp.{i}"
        shapes |= {f"{at}.{name}": (m.hidden_size,) for name in ("hidden_norm", "embed_norm", "norm")}
        shapes[f"{at}.eh_proj"] = (m.hidden_size, 2 * m.hidden_size)
        shapes |= block_shapes(m, at, moe=True)
    return shapes


def count(shapes: dict[str, tuple[int, ...]], *parts: str) -> int:
    """Elements of the shapes whose name has one of `parts`, or of all."""
    return sum(math.prod(shape) for name, shape in shapes.items() if not parts or any(part in name for part in parts))


@given(models())
def test_parameters_equal_the_sum_over_every_weight(model: Model) -> None:
    shapes, counted = main_shapes(model), parameters(model)
    assert counted.total == count(shapes)
    assert counted.mtp == count(mtp_shapes(model))
    assert counted.total_with_mtp == count(shapes | mtp_shapes(model))
    assert counted.embedding == count(shapes, "embed")
    assert counted.head == count(shapes, "head")
    assert counted.attention == count(shapes, ".wq", ".wkv", ".wo", ".q_norm", ".kv_norm")
    assert counted.dense_ffn == count(shapes, ".dense.")
    assert counted.routed_experts == count(shapes, ".routed.")
    assert counted.shared_experts == count(shapes, ".shared.")
    assert counted.router == count(shapes, ".router")


@given(models())
def test_active_parameters_are_those_of_a_model_that_has_only_the_experts_a_token_passes(model: Model) -> None:
    counted, share = parameters(model), model.num_experts_per_token / model.num_routed_experts
    shapes = main_shapes(model)
    passed = count(shapes) - count(shapes, ".routed.") + round(count(shapes, ".routed.") * share)
    assert counted.active_with_embedding == passed
    assert counted.active == passed - (0 if model.tie_embeddings else count(shapes, "embed"))


@given(models(), st.integers(min_value=1, max_value=512))
def test_a_forward_pass_costs_two_operations_per_active_matrix_weight_and_token(model: Model, sequence_length: int) -> None:
    flops = flops_per_token(model, sequence_length=sequence_length, backward=False)
    vectors = count({name: shape for name, shape in main_shapes(model).items() if len(shape) == 1})
    assert flops.total - flops.core_attention == 2 * (parameters(model).active - vectors)


@given(models(), st.integers(min_value=1, max_value=512), st.booleans())
def test_a_training_step_costs_three_forward_passes_and_causal_attention_half(model: Model, sequence_length: int, mtp: bool) -> None:
    forward = flops_per_token(model, sequence_length=sequence_length, mtp=mtp, backward=False)
    step = flops_per_token(model, sequence_length=sequence_length, mtp=mtp)
    full = flops_per_token(model, sequence_length=sequence_length, mtp=mtp, causal=False)
    assert step.total == 3 * forward.total
    assert full.core_attention == 2 * step.core_attention
    assert full.mla_projections == step.mla_projections


def test_v3_has_671b_parameters_of_which_37b_are_active() -> None:
    # arXiv 2412.19437, 4.2, and the checkpoint: 671B total, 37B active; 685B with MTP and its copies of embedding and head.
    counted = parameters(V3)
    assert round(counted.total / 1e9, 2) == 671.03
    assert round(counted.active / 1e9, 2) == 36.63
    assert round(counted.active_with_embedding / 1e9, 2) == 37.55
    assert round(counted.mtp / 1e9, 2) == 11.61
    assert round((counted.total_with_mtp + counted.embedding + counted.head) / 1e9, 1) == 684.5
    assert round(counted.embedding / 1e9, 3) == round(counted.head / 1e9, 3) == 0.927
    assert round(counted.attention / 61 / 1e6, 2) == 187.11
    assert round(counted.dense_ffn / 3 / 1e6, 1) == 396.4
    assert round(counted.routed_experts / 58 / 256 / 1e6, 2) == 44.04


@pytest.mark.parametrize(
    ("causal", "mtp", "gate", "gflop"),
    [
        (True, False, True, 250.45),
        (True, False, False, 249.8),  # 385 TFLOPS, 38.94 % MFU: arXiv 2505.09343, Table 4
        (False, False, True, 281.15),
        (False, False, False, 280.5),  # 432 TFLOPS, 43.73 %
        (True, True, True, 260.6),  # NVIDIA's rows with MTP imply 259.9 to 260.7
        (False, True, True, 291.85),
    ],
)
def test_v3_takes_the_published_flops_per_token(causal: bool, mtp: bool, gate: bool, gflop: float) -> None:
    flops = flops_per_token(V3, sequence_length=4096, causal=causal, mtp=mtp, gate=gate)
    assert flops.total / 1e9 == pytest.approx(gflop, abs=0.05)


def test_v3_macs_per_layer_are_the_ones_worked_out_by_hand() -> None:
    flops = flops_per_token(V3, sequence_length=4096, backward=False)
    assert flops.mla_projections / 61 / 2 == 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    assert flops.core_attention / 61 / 2 == 2048 * 128 * (192 + 128)
    assert flops.routed_experts / 58 / 2 == 8 * 3 * 7168 * 2048
    assert flops.shared_experts / 58 / 2 == 3 * 7168 * 2048
    assert flops.router / 58 / 2 == 256 * 7168
    assert flops.dense_ffn / 3 / 2 == 3 * 7168 * 18432
    assert flops.head / 2 == 129280 * 7168


@pytest.mark.parametrize("throughput, causal, published", [(1541.7, True, 38.94), (1541.7, False, 43.73)])
def test_v3s_published_mfu_follows_from_its_throughput(throughput: float, causal: bool, published: float) -> None:
    # 272.80B tokens per day on 2,048 devices of 989 TFLOPS: arXiv 2505.09343, Table 4.
    flops = flops_per_token(V3, sequence_length=4096, causal=causal, gate=False).total
    assert 100 * flops * throughput / 989e12 == pytest.approx(published, abs=0.02)


def test_v2_has_236b_parameters_and_155_gflop_per_token() -> None:
    # arXiv 2405.04434: 236B total, 21B active; arXiv 2505.09343, Table 2: 155 GFLOP per token.
    counted = parameters(V2)
    assert round(counted.total / 1e9) == 236
    assert round(counted.active / 1e9) == round(counted.active_with_embedding / 1e9) == 21
    assert flops_per_token(V2, sequence_length=4096, gate=False).total / 1e9 == pytest.approx(155, abs=0.5)


def test_v2_lite_has_15_7b_parameters_of_which_2_4b_are_active() -> None:
    # arXiv 2405.04434, appendix B.
    counted = parameters(V2_LITE)
    assert round(counted.total / 1e9, 1) == 15.7
    assert counted.active / 1e9 == pytest.approx(2.4, abs=0.06)


def test_a_tied_head_is_counted_once_but_computes_all_the_same() -> None:
    tied = replace(V3, tie_embeddings=True)
    assert parameters(V3).total - parameters(tied).total == 129280 * 7168
    assert parameters(tied).active == parameters(V3).active
    assert flops_per_token(tied, sequence_length=4096) == flops_per_token(V3, sequence_length=4096)
