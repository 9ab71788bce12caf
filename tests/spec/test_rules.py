"""The rules between the numbers: each broken one is refused with the values, the rule and the remedy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given

from quintet.errors import SpecError
from quintet.spec.layout import Layout
from quintet.spec.model import Model, Yarn
from quintet.spec.run import Checkpoint, Data, Evaluation, Monitor, Optimizer, Phase, Run, Source, Train
from tests.spec.strategies import models

MODEL = Model(
    vocab_size=256,
    hidden_size=16,
    num_layers=3,
    num_dense_layers=1,
    num_heads=2,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=4,
    dense_ffn_size=32,
    expert_ffn_size=8,
    num_routed_experts=8,
    num_shared_experts=1,
    num_experts_per_token=2,
    num_groups=4,
    num_groups_per_token=2,
)
SOURCE = Source(name="text", paths=("text/",), domain="prose", weight=1.0)
DATA = Data(sources=(SOURCE,), directory="prepared")
PHASE = Phase(name="only", length="10 steps", sequence_length=8, batch=("2",), learning_rate=("1e-3",))
RUN = Run(name="tiny", model=MODEL, data=DATA, phases=(PHASE,))


@pytest.mark.parametrize(
    ("section", "change", "expected"),
    [
        (MODEL, {"hidden_size": 0}, "hidden_size (0) must be larger than 0"),
        (MODEL, {"init_std": -0.1}, "init_std (-0.1) must be larger than 0"),
        (MODEL, {"num_mtp_modules": -1}, "num_mtp_modules (-1) must not be negative"),
        (MODEL, {"q_lora_rank": 0}, "q_lora_rank (0) must be larger than 0; leave it out for uncompressed queries"),
        (MODEL, {"qk_rope_head_dim": 3}, "qk_rope_head_dim (3) must be even: rotary embedding turns pairs"),
        (MODEL, {"num_dense_layers": 4}, "num_dense_layers (4) must be at most num_layers (3)"),
        (MODEL, {"num_groups": 3}, "num_routed_experts (8) must be divisible by num_groups (3); choose num_groups from [1, 2, 4, 8]"),
        (MODEL, {"num_groups_per_token": 5}, "num_groups_per_token (5) must be at most num_groups (4)"),
        (MODEL, {"num_experts_per_token": 5}, "num_experts_per_token (5) must be at most the 4 experts of 2 of 4 groups"),
        (MODEL, {"num_groups": 8}, "leaves 1 expert per group, but a group is scored by its best two; use at most 4 groups"),
        (Yarn(), {"factor": 0.5}, "yarn.factor (0.5) must be at least 1"),
        (Yarn(), {"original_context": 0}, "yarn.original_context (0) must be at least 1 token"),
        (Yarn(), {"beta_slow": 32.0}, "yarn.beta_fast (32.0) must be larger than yarn.beta_slow (32.0)"),
        (Layout(), {"tp": 0}, "tp (0) must be at least 1"),
        (RUN, {"layout": Layout(dp=7, ep=7)}, "must be divisible by layout.ep (7); choose layout.ep from"),
        (SOURCE, {"name": "a b"}, "source name 'a b' may hold only letters, digits, '-' and '_'"),
        (SOURCE, {"paths": ()}, "source 'text' has no paths; name at least one file, folder or glob"),
        (SOURCE, {"weight": 0.0}, "weight (0.0) must be larger than 0"),
        (DATA, {"sources": ()}, "data.sources is empty; add a [[data.sources]] table"),
        (DATA, {"sources": (SOURCE, SOURCE)}, "source names must differ, got ['text', 'text']"),
        (DATA, {"held_out": 1.5}, "held_out (1.5) must lie between 0 and 1"),
        (DATA, {"fim_rate": -0.5}, "fim_rate (-0.5) must lie between 0 and 1"),
        (Optimizer(), {"beta2": 1.5}, "beta2 (1.5) must lie between 0 and 1"),
        (Optimizer(), {"weight_decay": -1.0}, "weight_decay (-1.0) must be finite and not negative"),
        (Optimizer(), {"clip_norm": 0.0}, "clip_norm (0.0) must be larger than 0"),
        (Optimizer(), {"clip_norm": float("nan")}, "clip_norm (nan) must be larger than 0 and finite"),
        (MODEL, {"init_std": float("inf")}, "init_std (inf) must be larger than 0 and finite"),
        (SOURCE, {"weight": float("nan")}, "weight (nan) must be larger than 0 and finite"),
        (PHASE, {"learning_rate": ("1e400",)}, "'1e400' holds a number beyond float64"),
        (PHASE, {"sequence_length": 0}, "sequence_length (0) must be larger than 0"),
        (PHASE, {"length": "1e400 steps"}, "'1e400 steps' lies too far; a place is at most 1e+18"),
        (PHASE, {"length": "1e10T tokens"}, "'1e10T tokens' lies too far"),
        (MODEL, {"num_layers": 10**9}, "num_layers (1000000000) must be at most 10000"),
        (PHASE, {"length": "5%"}, "phase 'only': length '5%' must be at least '1 steps' or '1 tokens'"),
        (PHASE, {"length": "0 steps"}, "phase 'only': length '0 steps' must be at least '1 steps' or '1 tokens'"),
        (PHASE, {"batch": ("linear from 0 to 9",)}, "phase 'only', batch ['linear from 0 to 9'] must lie between 1 and"),
        (PHASE, {"learning_rate": ("-1",)}, "phase 'only', learning_rate goes below 0"),
        (PHASE, {"mtp_weight": ("no",)}, "phase 'only', mtp_weight: 'no' is not a piece of a curve"),
        (Train(), {"micro_batch": 0}, "micro_batch (0) must be larger than 0"),
        (Train(), {"steps": 0}, "steps (0) must be larger than 0"),
        (Train(), {"num_threads": -2}, "num_threads (-2) must be larger than 0"),
        (Train(), {"num_threads": 100_000}, "num_threads (100000) must be at most 4096; leave it out to use all cores"),
        (Evaluation(), {"every": 0}, "every (0) must be larger than 0"),
        (Evaluation(), {"num_sequences": 0}, "num_sequences (0) must be larger than 0"),
        (Checkpoint(), {"keep_every": 0}, "keep_every (0) must be larger than 0"),
        (Checkpoint(), {"keep_last": 0}, "keep_last (0) must be larger than 0"),
        (Monitor(), {"sample_tokens": 0}, "sample_tokens (0) must be larger than 0"),
        (RUN, {"name": "../up"}, "name '../up' may hold only letters, digits, '-', '_' and '.', and not begin with '.'"),
        (RUN, {"name": ".hidden"}, "not begin with '.'"),
        (RUN, {"name": ""}, "name '' may hold only"),
        (RUN, {"phases": ()}, "phases is empty; add a [[phases]] table"),
        (RUN, {"model": replace(MODEL, max_context=4)}, "sequence_length (8) must be at most model.max_context (4); raise max_context"),
        (RUN, {"seed": -1}, "seed (-1) must lie between 0 and 2^63 - 1"),
    ],
)
def test_a_broken_rule_is_told_with_its_values_and_remedy(section: Any, change: dict[str, Any], expected: str) -> None:
    with pytest.raises(SpecError) as error:
        replace(section, **change)
    assert expected in str(error.value)


@given(models())
def test_a_valid_model_has_enough_experts_in_the_groups_that_a_token_reaches(model: Model) -> None:
    assert model.num_dense_layers + model.num_moe_layers == model.num_layers
    assert model.qk_head_dim == model.qk_nope_head_dim + model.qk_rope_head_dim
    assert model.num_routed_experts // model.num_groups * model.num_groups_per_token >= model.num_experts_per_token



