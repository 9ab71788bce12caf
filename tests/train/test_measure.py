"""Measuring this machine for the planner: figures that a cluster takes, and that it plans with."""

from __future__ import annotations

from pathlib import Path

import pytest

from quintet.cli.main import main
from quintet.plan.estimate import estimate
from quintet.plan.setup import of_run
from quintet.plan.software import generation
from quintet.spec import parse
from quintet.spec.cluster import Calls, read
from quintet.train.measure import LENGTHS, _through
from quintet.train.stopwatch import Sample, fit

RECIPE = Path(__file__).parents[2] / "recipes" / "laptop.toml"


def test_a_curve_goes_through_both_rates_or_through_the_longer_one() -> None:
    short, long = LENGTHS
    share, half = _through([0.2, 0.3])
    assert share * short / (short + half) == pytest.approx(0.2)
    assert share * long / (long + half) == pytest.approx(0.3)
    for rates in ([0.3, 0.3], [0.3, 0.2], [0.01, 0.5]):
        share, half = _through(rates)
        assert 0 <= half <= long
        assert share * long / (long + half) == pytest.approx(rates[1])


def test_fitted_calls_are_those_that_made_the_samples_and_never_negative() -> None:
    true = Calls(call=2e-4, per_flop=1e-11, per_byte=3e-10)
    work = [(1, 1e6, 1e5), (2, 1e8, 2e6), (16, 3e7, 5e6), (4, 2e9, 1e4)]
    samples = [
        Sample(seconds=true.seconds(calls=calls, flops=flops, num_bytes=size), calls=calls, flops=flops, num_bytes=size)
        for calls, flops, size in work
    ]
    found = fit(samples)
    for name in ("call", "per_flop", "per_byte"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-6)
    falling = fit([Sample(seconds=2e-3, num_bytes=1e5), Sample(seconds=1e-3, num_bytes=1e6)])
    assert falling.per_byte == 0 and falling.call > 0


def test_this_machine_is_measured_written_read_and_planned_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    assert main(["doctor", "--cluster", str(path), "--ranks", "2"]) == 0
    cluster = read(path)
    assert cluster.eager is not None and cluster.num_gpus == 2
    for name in ("product", "grouped_weight", "core", "moe", "routed", "gather", "send"):
        assert getattr(cluster.eager, name) != Calls()
    run = parse.read(RECIPE)
    found = estimate(of_run(run, software=generation("eager"), batch_sequences=8, precision="bf16"), cluster)
    assert found.fits
    assert 1e-3 < found.seconds < 1e3
    capsys.readouterr()
    assert main(["plan", str(RECIPE), "--gpu", str(path), "--gpus", "2"]) == 0
    assert "software eager" in capsys.readouterr().out


def test_more_ranks_than_cores_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--cluster", str(tmp_path / "cluster.toml"), "--ranks", "100000"]) == 2
    assert "--ranks (100000) must lie between 1 and" in capsys.readouterr().err


def test_a_cluster_of_the_catalogue_is_not_overwritten_by_a_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    assert main(["plan", str(RECIPE), "--gpu", str(path)]) == 2
    assert "cannot read a cluster from" in capsys.readouterr().err
