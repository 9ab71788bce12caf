"""`quintet info` and `quintet doctor`: figures that agree with their sources."""

from __future__ import annotations

import json
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from quintet.checkpoint import hub_config
from quintet.cli.describe import run_figures
from quintet.cli.main import main
from quintet.cost.flops import parameters
from quintet.monitor import machine
from quintet.monitor.sinks import JsonLines
from quintet.monitor.status import StatusFile
from quintet.spec import parse
from quintet.spec.layout import Layout
from quintet.spec.run import Run
from quintet.train.directory import held
from tests.monitor.events import evaluated, record


@pytest.fixture
def run(root: Path) -> Run:
    return parse.read(root / "recipes" / "laptop.toml")


def figures(capsys: pytest.CaptureFixture[str], path: Path) -> dict[str, dict[str, int]]:
    assert main(["info", str(path), "--json"]) == 0
    out, _ = capsys.readouterr()
    return json.loads(out)  # type: ignore[no-any-return]


def test_a_recipe_is_counted(capsys: pytest.CaptureFixture[str], root: Path, run: Run) -> None:
    told = figures(capsys, root / "recipes" / "laptop.toml")
    assert told["kind"] == "recipe"
    assert told["parameters"]["total"] == parameters(run.model).total
    assert told["memory_bytes"]["total"] == sum(told["memory_bytes"]["by_part"].values())  # type: ignore[attr-defined]


def test_memory_is_that_of_the_fullest_rank_of_the_layout(run: Run) -> None:
    alone, shared = run_figures(run), run_figures(replace(run, layout=Layout(dp=4, ep=4, zero=1)))
    assert (alone["layout"], shared["layout"]) == ("one device", "dp=4 ep=4 zero=1")
    for part in ("moments", "master_weights"):
        assert shared["memory_bytes"]["by_part"][part] == pytest.approx(alone["memory_bytes"]["by_part"][part] / 4, rel=1e-3)
    assert shared["memory_bytes"]["by_part"]["weights"] < alone["memory_bytes"]["by_part"]["weights"]


def test_a_hugging_face_directory_is_counted_from_its_config(capsys: pytest.CaptureFixture[str], tmp_path: Path, run: Run) -> None:
    config = hub_config.from_model(run.model, dtype="bfloat16", bos_token_id=0, eos_token_id=1)
    (tmp_path / hub_config.NAME).write_text(hub_config.dumps(config))
    assert figures(capsys, tmp_path)["parameters"]["total"] == parameters(run.model).total


def test_mtp_modules_that_the_files_lack_are_not_counted_and_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, run: Run
) -> None:
    config = hub_config.from_model(run.model, dtype="bfloat16", bos_token_id=0, eos_token_id=1)
    (tmp_path / hub_config.NAME).write_text(hub_config.dumps(config))
    header = json.dumps({"model.layers.3.mlp.gate.weight": {}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    told = figures(capsys, tmp_path)
    assert run.model.num_mtp_modules == 1
    assert told["parameters"]["total_with_mtp"] == told["parameters"]["total"] == parameters(run.model).total
    assert main(["info", str(tmp_path)]) == 0
    assert "warning: MTP modules: config.json names 1 (num_nextn_predict_layers), but the files hold 0" in capsys.readouterr().err


def test_a_run_tells_where_it_stands(capsys: pytest.CaptureFixture[str], tmp_path: Path, root: Path) -> None:
    shutil.copy(root / "recipes" / "laptop.toml", tmp_path / "recipe.toml")
    (tmp_path / "checkpoints" / "step-00000002").mkdir(parents=True)
    (tmp_path / "checkpoints" / "half-made").mkdir()
    metrics, status = JsonLines(tmp_path / "metrics.jsonl"), StatusFile(tmp_path)
    for event in (record(1), record(2), evaluated(2)):
        metrics.write(event)
        status.write(event)
    status.finish(75, "stopped by a signal")
    progress = figures(capsys, tmp_path)["progress"]
    assert progress["checkpoints"] == [2]
    assert progress["last_record"]["step"] == 2  # type: ignore[index]
    assert main(["info", str(tmp_path)]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "interrupted: stopped by a signal" in words
    assert "step 2/10, loss 3.8000" in words
    assert "stdlib 4.2500, docs 5.5000, after step 2" in words


def test_a_run_that_was_killed_is_told_from_one_that_goes_on(capsys: pytest.CaptureFixture[str], tmp_path: Path, root: Path) -> None:
    shutil.copy(root / "recipes" / "laptop.toml", tmp_path / "recipe.toml")
    StatusFile(tmp_path).write(record(1))
    with held(tmp_path):
        assert figures(capsys, tmp_path)["progress"]["status"]["message"] == "training"  # type: ignore[index]
    status = figures(capsys, tmp_path)["progress"]["status"]
    assert "it was ended before it could say how" in status["message"]  # type: ignore[index]
    assert status["remedy"] == f"quintet resume {tmp_path}"  # type: ignore[index]


def test_a_run_without_metrics_yet_is_described(capsys: pytest.CaptureFixture[str], tmp_path: Path, root: Path) -> None:
    shutil.copy(root / "recipes" / "laptop.toml", tmp_path / "recipe.toml")
    assert main(["info", str(tmp_path)]) == 0
    assert "checkpoints none" in " ".join(capsys.readouterr().out.split())


def test_any_other_directory_is_a_usage_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["info", str(tmp_path)]) == 2
    assert "holds neither a recipe.toml" in capsys.readouterr().err


def test_the_schedule_of_v3_is_that_of_a_walk_through_every_step(root: Path) -> None:
    run = parse.read(root / "recipes" / "v3-671b.toml")
    figures = run_figures(run)
    phase, *extensions = figures["phases"]
    steps, tokens = 0, 0
    while tokens < 469e9:  # every step of the ramp, as the recipe describes it: 3072 to 15360 sequences over 469B tokens
        tokens += round(3072 + (15360 - 3072) * tokens / 469e9) * 4096
        steps += 1
    steps += round((14.8e12 - tokens) / (15360 * 4096))
    assert phase["steps"] == pytest.approx(steps, rel=1e-4)
    assert phase["tokens"] == pytest.approx(14.8e12, rel=1e-4)
    assert (phase["first_batch"], phase["last_batch"]) == (3072, 15360)
    assert [each["tokens"] for each in extensions] == [1000 * 1920 * 32768, 1000 * 480 * 131072] == [62_914_560_000] * 2
    assert figures["memory_bytes"]["phase"] == "pretrain" and figures["memory_bytes"]["total"] == phase["memory_bytes"]


def test_steps_are_shared_among_the_phases_in_proportion(run: Run) -> None:
    tree = parse.tree(run)
    phase = tree["phases"][0] | {"batch": ["16"]}
    tree["phases"] = [phase | {"name": "a", "length": "300 steps"}, phase | {"name": "b", "length": "100 steps"}]
    tree["train"]["steps"] = 40
    phases = run_figures(parse.build(tree, origin="test"))["phases"]
    assert [(phase["name"], phase["steps"], phase["tokens"]) for phase in phases] == [("a", 30, 30 * 16 * 256), ("b", 10, 10 * 16 * 256)]


def test_doctor_finds_this_interpreter_and_tells_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "OPTIONAL", {"quintet-no-such-package": "dev"})
    code = main(["doctor", "--json"])
    found = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert code == int(any(finding["missing"] for finding in found.values()))
    assert found["torch"]["value"] != "not installed"
    absent = found["quintet-no-such-package"]
    assert (absent["value"], absent["missing"]) == ("not installed", False)
    assert absent["remedy"] == "pip install -c constraints.txt 'quintet[dev]'"


def test_doctor_fails_where_a_core_package_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CORE", ["quintet-no-such-package"])
    assert main(["doctor"]) == 1
    assert "pip install -c constraints.txt quintet-no-such-package" in " ".join(capsys.readouterr().out.split())


def test_every_extra_that_doctor_names_is_one(root: Path) -> None:
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(machine.OPTIONAL.values()) == set(extras)
    assert all(any(line.startswith(package) for line in extras[extra]) for package, extra in machine.OPTIONAL.items())
