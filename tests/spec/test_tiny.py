"""The small run of the same structure is legal wherever the large one is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from quintet.spec import parse
from quintet.spec.layout import Layout, broken_rules
from quintet.spec.run import Run
from quintet.spec.tiny import tiny
from tests.spec.strategies import runs

RECIPES = Path(__file__).parents[2] / "recipes"


@settings(max_examples=15)
@given(runs())
def test_every_legal_run_has_a_small_one_with_its_layout(run: Run) -> None:
    small = tiny(run)
    assert small.layout == replace(run.layout, cut=None)
    assert broken_rules(small.layout, small.model, [phase.sequence_length for phase in small.phases]) == []
    assert (small.model.q_lora_rank is None, small.model.tie_embeddings) == (run.model.q_lora_rank is None, run.model.tie_embeddings)


@given(st.sampled_from(["laptop", "v3-16b", "v3-671b"]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 8]))
def test_the_recipes_keep_their_structure(name: str, tp: int, cp: int, ep: int) -> None:
    run = parse.read(RECIPES / f"{name}.toml")
    small = tiny(replace(run, layout=Layout(dp=8, tp=tp, cp=cp, ep=ep)))
    assert small.model.num_moe_layers >= 2 and small.model.num_dense_layers == min(run.model.num_dense_layers, 1)
    assert small.model.num_experts_per_token > 1 and small.model.num_routed_experts % ep == 0
    assert (small.model.num_groups > 1) == (run.model.num_groups > 1)
