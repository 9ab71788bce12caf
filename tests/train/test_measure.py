"""Measuring this machine for the planner: figures that a cluster takes, and that it plans with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quintet.cli.doctor import message_link
from quintet.cli.main import main
from quintet.plan.estimate import estimate
from quintet.plan.setup import of_run
from quintet.plan.software import generation
from quintet.spec import parse
from quintet.spec.cluster import dumps, read
from quintet.train.measure import LENGTHS, _through, measured_cluster

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


def test_a_measured_machine_plans_the_laptop_recipe(tmp_path: Path) -> None:
    cluster = measured_cluster(torch.device("cpu"), name="cpu", memory_bytes=16e9, num_devices=1)
    path = tmp_path / "cluster.toml"
    path.write_text(dumps(cluster))
    run = parse.read(RECIPE)
    found = estimate(of_run(run, software=generation("plain"), batch_sequences=8, precision="bf16"), read(path))
    assert found.fits
    assert 1e-3 < found.seconds < 1e3


def test_messages_between_two_processes_have_a_latency_and_a_bandwidth() -> None:
    link = message_link()
    assert 0 < link.latency < 1
    assert link.effective > 1e5


def test_a_cluster_of_the_catalogue_is_not_overwritten_by_a_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    assert main(["plan", str(RECIPE), "--gpu", str(path)]) == 2
    assert "cannot read a cluster from" in capsys.readouterr().err
