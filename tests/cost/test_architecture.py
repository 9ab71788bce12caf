"""A transformer as its products: the same operations as `cost.flops`, and those that published rows imply."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quintet.cost.architecture import Architecture, of_model
from quintet.cost.flops import flops_per_token, parameters
from quintet.spec.model import Model
from tests.spec.strategies import models

LLAMA = {
    "8B": Architecture(
        hidden_size=4096, num_layers=32, vocab_size=128256, num_heads=32, num_kv_heads=8, qk_head_dim=128, v_head_dim=128, ffn_size=14336
    ),
    "70B": Architecture(
        hidden_size=8192, num_layers=80, vocab_size=128256, num_heads=64, num_kv_heads=8, qk_head_dim=128, v_head_dim=128, ffn_size=28672
    ),
    "405B": Architecture(
        hidden_size=16384, num_layers=126, vocab_size=128256, num_heads=128, num_kv_heads=8, qk_head_dim=128, v_head_dim=128, ffn_size=53248
    ),
}
QWEN3 = Architecture(
    hidden_size=2048,
    num_layers=48,
    vocab_size=151936,
    num_heads=32,
    num_kv_heads=4,
    qk_head_dim=128,
    v_head_dim=128,
    num_experts=128,
    experts_per_token=8,
    expert_ffn_size=768,
)


@settings(max_examples=60, deadline=None)
@given(model=models(), length=st.integers(1, 4096), causal=st.booleans(), mtp=st.booleans(), gate=st.booleans())
def test_a_model_has_the_operations_that_the_meter_counts(model: Model, length: int, causal: bool, mtp: bool, gate: bool) -> None:
    ours = of_model(model).flops_per_token(sequence_length=length, causal=causal, mtp=mtp, gate=gate)
    assert ours == pytest.approx(flops_per_token(model, sequence_length=length, causal=causal, mtp=mtp, gate=gate).total, rel=1e-9, abs=8)


@settings(max_examples=60, deadline=None)
@given(model=models())
def test_a_model_has_its_weights_but_for_the_norms_of_latents_and_of_ends(model: Model) -> None:
    norms = model.num_layers * (model.kv_lora_rank + (model.q_lora_rank or 0)) + model.hidden_size
    modules = model.num_mtp_modules * (3 * model.hidden_size + model.kv_lora_rank + (model.q_lora_rank or 0))
    assert of_model(model).parameters == parameters(model).total_with_mtp - norms - modules


@pytest.mark.parametrize(("name", "gflop"), [("8B", 51.5), ("70B", 448.8), ("405B", 2525.0)])
def test_operations_of_llama_3_are_those_its_published_rates_imply(name: str, gflop: float) -> None:
    assert LLAMA[name].flops_per_token(sequence_length=8192) / 1e9 == pytest.approx(gflop, rel=2e-3)


def test_operations_of_qwen3_are_those_its_published_rates_imply() -> None:
    assert 22.6 < QWEN3.flops_per_token(sequence_length=4096) / 1e9 < 23.1
    assert QWEN3.parameters == pytest.approx(30.5e9, rel=0.01)
