"""Planned states of every rank against the model as training would build it on that rank, on the meta device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quintet.cost.balance import pipeline_stages
from quintet.plan.estimate import estimate
from quintet.plan.setup import of_run
from quintet.plan.software import generation
from quintet.plan.step_time import step_time
from quintet.spec import parse
from quintet.spec.cluster import named
from quintet.spec.layout import Layout
from quintet.train.survey import survey

RECIPES = Path(__file__).parents[2] / "recipes"
CASES = [
    ("v3-16b", Layout(dp=8, ep=8, zero=1), {}),
    ("v3-16b", Layout(dp=8, zero=3), {}),
    ("v3-16b", Layout(dp=4, tp=2, ep=2, zero=2), {}),
    ("v3-16b", Layout(dp=2, tp=2, cp=2, ep=4, expert_tp=2, zero=1), {}),
    ("v3-16b", Layout(pp=4, dp=2, ep=2, zero=1, schedule="1f1b"), {}),
    ("v3-16b", Layout(pp=4, dp=2, ep=2, zero=1, schedule="1f1b"), {"tie_embeddings": True, "num_mtp_modules": 0}),
    ("v3-16b", Layout(pp=4, dp=2, ep=2, zero=1, schedule="interleaved", chunks=2), {}),
    ("v3-16b", Layout(pp=2, dp=4, tp=2, ep=4, zero=1, schedule="zbv"), {"tie_embeddings": True}),
    ("v3-16b", Layout(pp=4, dp=2, ep=2, zero=1, schedule="dualpipe"), {}),
    ("v3-16b", Layout(pp=4, dp=2, ep=2, schedule="dualpipev"), {"num_mtp_modules": 2}),
    ("v3-16b", Layout(pp=2, dp=2, tp=4, ep=2, zero=1, schedule="1f1b"), {}),
    ("v3-671b", Layout(pp=16, dp=128, ep=64, zero=1, schedule="dualpipe"), {}),
]


@pytest.mark.parametrize(("name", "layout", "changes"), CASES, ids=str)
def test_states_are_within_one_percent_of_the_built_model(name: str, layout: Layout, changes: dict[str, object]) -> None:
    run = parse.read(RECIPES / f"{name}.toml")
    run = replace(run, model=replace(run.model, **changes), layout=layout)  # type: ignore[arg-type]
    setup = of_run(run, software=generation("deepseek"), batch_sequences=4096, precision="bf16")
    found = estimate(setup, named("h100", num_gpus=layout.num_ranks))
    for place in {0, layout.pp // 2, layout.pp - 1}:
        built, planned = survey(run, place * layout.num_ranks // layout.pp).bytes, found.memory[place]
        assert planned.weights == pytest.approx(built.weights, rel=0.01)
        assert planned.gradients == pytest.approx(built.gradients, rel=0.01)
        assert planned.master_weights == pytest.approx(built.master, rel=0.01)
        assert planned.moments == pytest.approx(built.moments, rel=0.01)


@pytest.mark.parametrize("name", ["laptop", "v3-16b", "v3-671b"])
def test_stages_hold_the_layers_that_the_runtime_gives_them(name: str) -> None:
    run = parse.read(RECIPES / f"{name}.toml")
    for layout in (Layout(pp=2, schedule="1f1b"), Layout(pp=4, schedule="dualpipe"), Layout(pp=2, schedule="zbv")):
        if layout.num_stages > run.model.num_layers:
            continue
        setup = of_run(replace(run, layout=layout), software=generation("deepseek"), batch_sequences=16, precision="bf16")
        planned = step_time(setup, named("h100", num_gpus=layout.num_ranks)).parts
        assert [part.num_dense + part.num_moe for part in planned] == [len(stage.layers) for stage in pipeline_stages(run.model, layout)]
