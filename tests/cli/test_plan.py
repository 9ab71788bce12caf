"""`quintet plan`: figures, changes, files, and refusals by rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quintet.cli.main import main
from quintet.spec import parse
from quintet.spec.cluster import read

RECIPES = Path(__file__).parents[2] / "recipes"
QUICK = ("--gpus", "8", "--gpu", "h100", "--layout.dp", "8", "--layout.ep", "8", "--batch", "64")


def told(capsys: pytest.CaptureFixture[str], *arguments: str, recipe: str = "v3-16b.toml") -> tuple[int, str, str]:
    code = main(["plan", str(RECIPES / recipe), *arguments])
    out, err = capsys.readouterr()
    return code, out, " ".join(err.split())


def figures(capsys: pytest.CaptureFixture[str], *arguments: str, recipe: str = "v3-16b.toml") -> dict[str, Any]:
    _, out, _ = told(capsys, *arguments, "--json", recipe=recipe)
    found: dict[str, Any] = json.loads(out)
    return found


def test_a_plan_tells_memory_time_cost_and_what_bounds_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    code, out, err = told(capsys, *QUICK, "--top", "2", "--why", "recipe", "1")
    assert (code, err) == (0, "")
    for part in (
        "v3-16b on 8 x H100",
        "dp=8 ep=8 zero=1",
        "bound by",
        "device-hours",
        "seconds of a step",
        "why recipe and 1 differ",
        "best of",
    ):
        assert part in out


def test_v3_on_2048_devices_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(
        capsys, "--gpus", "2048", "--gpu", "h800", "--precision", "fp8", "--layout.schedule", "dualpipe", "--alone", recipe="v3-671b.toml"
    )
    own = found["recipe"]
    assert own["fits"] and own["schedule"] == "dualpipe"
    assert own["seconds"] == pytest.approx(19.9, rel=0.12)
    assert len(own["memory_by_rank"]) == 16
    assert own["terms"]["time.total"] == own["seconds"]


def test_what_if_changes_the_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    as_is = figures(capsys, *QUICK, "--alone")["recipe"]["seconds"]
    faster = figures(capsys, *QUICK, "--alone", "--what-if", "link=4x", "compute=2")["recipe"]["seconds"]
    assert faster < as_is


def test_a_figure_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = told(capsys, *QUICK, "--alone", "--explain", "memory.activations")
    assert code == 0
    assert out.startswith("memory.activations = ")
    assert "in flight" in out


def test_the_best_layout_is_written_as_a_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path, html = tmp_path / "best.toml", tmp_path / "plan.html"
    code, out, _ = told(capsys, *QUICK, "--top", "1", "--write", str(path), "--html", str(html))
    assert code == 0 and f"quintettrain{path}" in "".join(out.split()), "wherever a line ends"
    assert parse.read(path).layout.num_ranks == 8
    assert html.read_text().startswith("<!doctype html>")


def test_a_cluster_is_written_and_used(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    assert told(capsys, "--gpu", "b200", "--gpus", "8", "--write-cluster", str(path))[0] == 0
    assert read(path).gpu.name == "B200"
    own = figures(capsys, *QUICK, "--gpu", str(path), "--alone")
    assert own["cluster"]["gpu"]["name"] == "B200"


def test_a_run_that_fits_nowhere_is_told_what_is_nearest(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = told(capsys, "--gpus", "4", "--gpu", "a100-40gb", "--batch", "64")
    assert code == 1
    assert "no layout of these devices fits: shared by all of them, weights, gradients and optimizer alone are" in out
    assert "x the devices: " in out


def test_a_claimed_layout_is_held_against_its_claims(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = told(capsys, "--preset", "tp8-pp16-dp64", "--alone", recipe="v3-671b.toml")
    assert "tp 8 x pp 16 x dp 64 = 8,192 devices, not 2,048" in out
    assert "92% MFU cannot hold" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpu", "h900"), "no gpu 'h900' in the catalogue (did you mean 'h800'?)"),
        (("--tokens", "-1"), "--tokens (-1.0) must be larger than 0 and finite"),
        (("--tokens", "nan"), "--tokens (nan) must be larger than 0 and finite"),
        (("--top", "0"), "--top (0) must be at least 1"),
        (("--precision", "nvfp4", "--gpu", "h100"), "--precision nvfp4: H100 has no such products; choose from fp32, bf16, fp8"),
        (("--alone", "--html", "none/x.html"), "--html none/x.html: cannot be written (No such file or directory)"),
        (("--gpus", "0"), "--gpus (0) must be at least 1"),
        (("--gpus", "99999999999"), "num_gpus (99,999,999,999) must be at most 1,048,576"),
        (("--what-if", "lnk=2x"), "--what-if knows no 'lnk' (did you mean 'link'?)"),
        (("--what-if", "link"), "must be a name, '=' and a factor"),
        (("--what-if", "link=2x", "link=3x"), "--what-if names link more than once"),
        (("--layout.schedule", "dualpip"), "dualpipe"),
        (("--software", "deepsek"), "no software 'deepsek' (did you mean 'deepseek'?)"),
        (("--preset", "4x5"), "(did you mean '4x4'?)"),
        (("--batch", "7"), "a step has 7 sequences, but layout.dp (64) x micro_batch (1) takes 64"),
        (("--alone", "--explain", "memory.al"), "no such figure"),
        (("--layout.tp", "3"), "must be divisible by layout.tp (3)"),
        (("--alone", "--why", "recipe", "9"), "'9' is no layout of this plan"),
        (
            ("--layout.pp", "4", "--layout.dp", "16", "--layout.schedule", "dualpipe", "--batch", "64"),
            "cannot run 4 micro-batches over layout.pp (4)",
        ),
    ],
)
def test_what_contradicts_itself_is_refused_with_the_rule(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    code, _, err = told(capsys, *arguments)
    assert code == 2
    assert words in err
