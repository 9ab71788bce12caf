"""Planned memory of Quintet's own models is what `cost` counts of them, which is held against what torch really keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quintet.cost.memory import step_memory
from quintet.plan.estimate import estimate
from quintet.plan.memory import CPU_FRAMEWORK_BYTES, FRAMEWORK_BYTES, rank_memory
from quintet.plan.setup import Setup, of_run
from quintet.plan.software import generation
from quintet.plan.step_time import step_time
from quintet.spec import parse
from quintet.spec.cluster import named
from quintet.spec.layout import Layout
from quintet.spec.run import Recompute, Run

RECIPES = Path(__file__).parents[2] / "recipes"
MICRO_BATCHES = 8


def run_of(name: str, layout: Layout, recompute: Recompute = "none") -> Run:
    run = parse.read(RECIPES / f"{name}.toml")
    return replace(run, layout=layout, train=replace(run.train, recompute=recompute, precision="bf16"))


def setup_of(run: Run) -> Setup:
    batch = MICRO_BATCHES * run.layout.dp * run.train.micro_batch
    return of_run(run, software=generation("deepseek"), batch_sequences=batch, precision="bf16")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("laptop", Layout()),
        ("laptop", Layout(dp=4, tp=2, ep=4, zero=1)),
        ("laptop", Layout(cp=2, zero=1)),
        ("laptop", Layout(pp=2, schedule="1f1b")),
        ("v3-16b", Layout(pp=4, dp=2, ep=2, zero=1, schedule="gpipe")),
        ("v3-16b", Layout(pp=4, schedule="zb1p")),
        ("v3-671b", Layout(pp=16, dp=2, ep=2, zero=1, schedule="1f1b")),
    ],
    ids=str,
)
def test_activations_in_flight_and_states_are_those_of_cost(name: str, layout: Layout, recompute: Recompute, device: str) -> None:
    run = run_of(name, layout, recompute)
    setup = setup_of(run)
    planned = rank_memory(setup, step_time(setup, named("h100", num_gpus=layout.num_ranks)).parts, device=device)  # type: ignore[arg-type]
    for place in {0, layout.pp - 1}:
        counted = step_memory(
            run.model,
            run.train,
            sequence_length=run.phases[0].sequence_length,
            device=device,  # type: ignore[arg-type]
            layout=layout,
            place=place,
            moments=run.optimizer.moments,
            num_microbatches=MICRO_BATCHES,
        )
        for part in ("weights", "gradients", "master_weights", "moments", "activations", "recomputation", "logits"):
            assert getattr(planned[place], part) == pytest.approx(getattr(counted, part), rel=0.01), (place, part)


def test_a_cpu_has_no_framework_of_a_gpu_and_keeps_its_probabilities() -> None:
    run = run_of("laptop", Layout())
    setup = setup_of(run)
    parts = estimate(setup, named("h100", num_gpus=1)).timed.parts
    (there,), (here,) = (rank_memory(setup, parts, device=device) for device in ("cuda", "cpu"))  # type: ignore[arg-type]
    assert (there.framework, here.framework) == (FRAMEWORK_BYTES, CPU_FRAMEWORK_BYTES)
    assert here.activations > there.activations


def test_in_fp8_and_of_other_models_the_planner_counts_for_itself() -> None:
    setup = setup_of(run_of("v3-16b", Layout()))
    assert setup.policy is not None
    assert replace(setup, precision="fp8").policy is None
    assert replace(setup, model=None).policy is None
