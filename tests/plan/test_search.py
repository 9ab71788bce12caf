"""The search: only legal layouts that fit, best first; and what is nearest where none does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quintet.errors import UsageError
from quintet.plan import presets
from quintet.plan.estimate import estimate
from quintet.plan.search import GOALS, Space, allowed, layouts, least_bytes, nearest_possible, scaling, search
from quintet.plan.setup import Setup, of_run
from quintet.plan.software import generation
from quintet.spec import parse
from quintet.spec.cluster import named
from quintet.spec.layout import Layout, broken_rules

RUN = parse.read(Path(__file__).parents[2] / "recipes" / "v3-16b.toml")
LARGE = parse.read(Path(__file__).parents[2] / "recipes" / "v3-671b.toml")
SMALL = Space(micro_batch=(1, 2), schedules=(("1f1b", 1), ("zbv", 2)), cp=(1,), zero=(1, 3))


def base(run: object = RUN, batch: int = 512, precision: str = "bf16") -> Setup:
    run = replace(run, layout=Layout())  # type: ignore[type-var]
    return of_run(run, software=generation("deepseek"), batch_sequences=batch, precision=precision)  # type: ignore[arg-type]


@pytest.mark.parametrize("goal", GOALS)
def test_what_is_found_is_legal_fits_and_is_sorted(goal: str) -> None:
    cluster = named("h100", num_gpus=16)
    found = search(base(), cluster, model=RUN.model, space=SMALL, top=8, goal=goal)  # type: ignore[arg-type]
    assert found.best and found.num_layouts > 10
    for one in found.best:
        assert broken_rules(one.setup.layout, RUN.model, (4096,)) == []
        assert one.setup.layout.num_ranks == 16
        assert one.fits
    values = [GOALS[goal](one) for one in found.best]
    assert values == sorted(values)


@pytest.mark.parametrize("goal", ["time", "memory"])
def test_pruning_loses_nothing_against_trying_everything(goal: str) -> None:
    cluster, setup = named("h100", num_gpus=8), base(batch=64)
    space = Space(tp=(1, 2), cp=(1,), zero=(1,), micro_batch=(1, 2), schedules=(("1f1b", 1), ("zb1p", 1)))
    every = [
        estimate(replace(setup, layout=replace(layout, schedule=schedule), recompute=policy, micro_batch=size), cluster)
        for layout in layouts(RUN.model, cluster, setup, space)
        for schedule, _ in (space.schedules if layout.pp > 1 else (("1f1b", 1),))
        for policy in space.recompute
        for size in space.micro_batch
        if allowed(replace(setup, layout=replace(layout, schedule=schedule), micro_batch=size))
    ]
    key = GOALS[goal]
    best: dict[tuple[int, ...], float] = {}
    for one in every:
        layout = one.setup.layout
        name = (layout.tp, layout.pp, layout.ep, layout.expert_tp)
        if one.fits:
            best[name] = min(best.get(name, key(one)), key(one))
    found = search(setup, cluster, model=RUN.model, space=space, top=4, goal=goal)  # type: ignore[arg-type]
    ways = sorted({name[:3]: value for name, value in sorted(best.items(), key=lambda item: -item[1])}.values())
    assert [key(one) for one in found.best] == pytest.approx(ways[:4])


def test_v3s_own_layout_is_near_the_best_that_is_found() -> None:
    cluster = named("h800", num_gpus=2048)
    run = replace(LARGE, layout=replace(LARGE.layout, schedule="dualpipe"))
    setup = of_run(run, software=generation("deepseek"), batch_sequences=15360, precision="fp8")
    space = Space(tp=(1, 2), cp=(1,), zero=(1,), micro_batch=(1,), schedules=(("1f1b", 1), ("dualpipe", 1)))
    found = search(setup, cluster, model=LARGE.model, space=space, top=1)
    assert estimate(setup, cluster).seconds <= 1.03 * found.best[0].seconds


def test_where_nothing_fits_more_devices_or_less_memory_are_named() -> None:
    cluster = named("h800", num_gpus=128)
    space = Space(tp=(8,), cp=(1,), zero=(1,), micro_batch=(1,), schedules=(("1f1b", 1),))
    setup = base(LARGE, batch=1024)
    found = search(setup, cluster, model=LARGE.model, space=space)
    assert found.best == []
    assert found.num_estimated == 0, "it is known without an estimate"
    assert found.least_bytes > cluster.gpu.memory_bytes
    small = search(setup, replace(cluster, num_gpus=256), model=LARGE.model, space=space)
    assert small.best or (small.tightest is not None and not small.tightest.fits)
    near = nearest_possible(setup, cluster, model=LARGE.model, space=space)
    assert near[-1][0].endswith("x the devices")
    assert all(one.fits for _, one in near)


def test_least_bytes_are_never_more_than_an_estimate_counts() -> None:
    for layout in (Layout(dp=8), Layout(dp=8, zero=3), Layout(dp=8, ep=8, zero=1), Layout(dp=2, tp=2, pp=2, ep=2, zero=1, schedule="1f1b")):
        setup = replace(base(batch=64), layout=layout)
        fullest = estimate(setup, named("h100", num_gpus=8)).fullest
        states = fullest.weights + fullest.gradients + fullest.master_weights + fullest.moments
        assert 0.5 * states < least_bytes(setup, layout) <= 1.001 * states, layout


def test_a_layout_that_is_too_large_is_mended_by_recomputation() -> None:
    cluster = named("a100-40gb", num_gpus=8)
    wanted = replace(base(batch=64), layout=Layout(dp=8, ep=8, zero=1), recompute="none", micro_batch=4)
    assert not estimate(wanted, cluster).fits
    what, one = nearest_possible(wanted, cluster, model=RUN.model, space=SMALL)[0]
    assert one.fits and ("recompute" in what or "micro-batch" in what or what == "another layout")


def test_weak_scaling_keeps_the_share_of_a_device_and_strong_scaling_the_batch() -> None:
    cluster, setup = named("h100", num_gpus=8), base(batch=64)
    space = replace(SMALL, tp=(1,), zero=(1,))
    weak = scaling(setup, RUN.model, cluster, sizes=(8, 16), weak=True, space=space)
    strong = scaling(setup, RUN.model, cluster, sizes=(8, 16), weak=False, space=space)
    assert [one.setup.batch_sequences for one in weak] == [64, 128]
    assert [one.setup.batch_sequences for one in strong] == [64, 64]
    assert strong[1].seconds < strong[0].seconds


@pytest.mark.parametrize(("name", "run"), [("16x64x8", LARGE), ("tp8-pp16-dp64", LARGE), ("4x4", RUN)])
def test_claimed_layouts_are_legal_and_their_mfu_cannot_hold(name: str, run: object) -> None:
    chosen = presets.preset(name)
    assert broken_rules(chosen.layout, run.model, (4096,)) == []  # type: ignore[attr-defined]
    setup = replace(base(run, batch=15360), layout=chosen.layout)
    told = presets.claims(estimate(setup, named("h800", num_gpus=chosen.layout.num_ranks)))
    assert told[0].startswith("92% MFU cannot hold: the best single product reaches 80.3%")
    assert any("communication" in line for line in told)


def test_the_arithmetic_of_claims_is_told() -> None:
    assert presets.arithmetic(presets.preset("16x64x8")) == ["pp 16 x ep 64 x dp 8 = 8,192 devices: as claimed"]
    assert "= 8,192 devices, not 2,048" in presets.arithmetic(presets.preset("tp8-pp16-dp64"))[0]
    with pytest.raises(UsageError, match="did you mean '4x4'"):
        presets.preset("4x5")
