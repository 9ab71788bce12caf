"""`quintet checkpoint` lists, describes, compares, proves, prunes, pins and rewrites checkpoints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quintet.checkpoint.load import load, verify
from quintet.checkpoint.place import Remote
from quintet.checkpoint.save import save
from quintet.cli.main import main
from quintet.spec import parse
from quintet.spec.layout import Layout
from quintet.spec.run import Checkpoint
from tests.parity.test_layouts import a_run


def state(step: int) -> dict[str, Any]:
    master = torch.linspace(-1, 1, 9000).sin() * step
    return {
        "model.w": master.bfloat16(),
        "optimizer.master.w": master,
        "model.bias": torch.arange(3.0),
        "held_out_loss": 5.0 - step if step % 2 else None,
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's directory with checkpoints of steps 1, 2, 3 and 4."""
    where = tmp_path / "run"
    where.mkdir()
    settings = Checkpoint(keep_last=1, keep_every=2)
    (where / "recipe.toml").write_text(parse.dumps(replace(a_run(Layout()), checkpoint=settings)))
    for step in (1, 2, 3, 4):
        save(state(step), where / "checkpoints", step=step, extras={"recipe.toml": "x"}, rounded={"model.w": "optimizer.master.w"})
    return where


def told(capsys: pytest.CaptureFixture[str], *words: str | Path, code: int = 0) -> str:
    capsys.readouterr()
    assert main(["checkpoint", *map(str, words)]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def steps(run: Path) -> list[str]:
    return sorted(path.name[-1] for path in (run / "checkpoints").glob("step-*"))


def test_list_tells_why_each_is_kept_and_what_is_damaged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "step-00000001" / "data-00000.bin").unlink()
    lines = told(capsys, "list", run).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["1", "2", "3", "4"]
    assert "DAMAGED: data-00000.bin is missing" in lines[1] and lines[2].rstrip().endswith("round")
    assert "2.0000" in lines[3] and "the next prune removes it" in lines[3] and lines[4].rstrip().endswith("newest, round")
    rows = json.loads(told(capsys, "list", run, "--json"))
    assert [row["kept"] for row in rows] == [None, "round", None, "newest, round"] and rows[2]["loss"] == 2.0


def test_inspect_shows_what_weights_that_round_their_master_cost(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, "inspect", run)
    assert "step-00000004: step 4, manifest " in text and "held_out_loss: None" in text
    shown = json.loads(told(capsys, "inspect", run / "checkpoints" / "step-00000003", "--json"))
    stored = {(kind["name"], kind["dtype"]): kind["stored_bytes"] for kind in shown["kinds"]}
    assert stored["model", "bfloat16"] == 0 and stored["model", "float32"] == 3 * 4 + 40
    assert shown["values"] == {"held_out_loss": 2.0} and shown["step"] == 3


def test_diff_finds_what_differs_and_nothing_where_nothing_does(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older = run / "checkpoints" / "step-00000003"
    lines = told(capsys, "diff", run, older).splitlines()
    assert lines[:2] == ["step: 4 and 3", "held_out_loss: None and 2.0"]
    assert [line.split(":")[0] for line in lines[2:]] == ["model.w", "optimizer.master.w"]
    assert "of 9,000 elements differ, by 0.333 of its norm" in lines[3]
    assert told(capsys, "diff", older, older) == "no difference\n"


def test_verify_looks_at_every_checkpoint_and_names_the_damaged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "verify", run).count(": whole, 3 tensors, ") == 4
    file = run / "checkpoints" / "step-00000002" / "data-00000.bin"
    content = bytearray(file.read_bytes())
    content[1000] ^= 8
    file.write_bytes(content)
    error = told(capsys, "verify", run, code=11)
    assert "step-00000002" in error and "does not have the hash" in error.replace("\n", " ") and "step-00000001" not in error
    assert "whole" in told(capsys, "verify", run / "checkpoints" / "step-00000001")


def test_pinned_checkpoints_survive_a_prune(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told(capsys, "pin", run / "checkpoints" / "step-00000001")
    assert told(capsys, "prune", run, "--dry-run").splitlines() == [f"would remove {run}/checkpoints/step-00000003"]
    assert steps(run) == ["1", "2", "3", "4"]
    told(capsys, "prune", run, "--keep-every", "3")
    assert steps(run) == ["1", "3", "4"]
    told(capsys, "unpin", run / "checkpoints" / "step-00000001")
    told(capsys, "prune", run, "--keep-best", "1")
    assert steps(run) == ["3", "4"]
    assert told(capsys, "prune", run, "--keep-best", "1") == "nothing to remove\n"


@pytest.mark.parametrize("codec", ["raw", "planes"])
def test_a_converted_checkpoint_holds_the_same_bits(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], codec: str) -> None:
    assert told(capsys, "convert", run, tmp_path / "other", "--codec", codec) == f"wrote {tmp_path}/other/step-00000004\n"
    manifest = verify(tmp_path / "other" / "step-00000004")
    assert {piece.codec for piece in manifest.tensors["optimizer.master.w"].pieces} == {codec}
    assert told(capsys, "diff", run, tmp_path / "other" / "step-00000004") == "no difference\n"
    weight = torch.zeros(9000, dtype=torch.bfloat16)
    load({"model.w": weight}, tmp_path / "other" / "step-00000004", strict=False)
    assert torch.equal(weight, state(4)["model.w"])


def test_wrong_words_are_answered(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "diff needs a second path, OTHER" in told(capsys, "diff", run, code=2)
    assert "verify takes one path, not also" in told(capsys, "verify", run, run, code=2)
    assert "is not a run's directory" in told(capsys, "list", run / "checkpoints", code=2)
    assert "neither a run nor a checkpoint" in told(capsys, "inspect", run / "nothing", code=11).replace("\n", " ")


def test_every_action_takes_the_url_of_a_store_too(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"memory://{run.parent.name}/first"
    recipe = (run / "recipe.toml").read_text()
    for step in (1, 2, 3):
        save(state(step), Remote(url), step=step, extras={"recipe.toml": recipe}, rounded={"model.w": "optimizer.master.w"})
    lines = told(capsys, "list", url).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["1", "2", "3"] and lines[2].rstrip().endswith("round")
    assert json.loads(told(capsys, "inspect", url, "--json"))["step"] == 3
    assert told(capsys, "verify", url).count("whole") == 3
    assert told(capsys, "diff", f"{url}/step-00000003", run / "checkpoints" / "step-00000003") == "no difference\n"
    told(capsys, "pin", f"{url}/step-00000001")
    assert told(capsys, "prune", url, "--keep-every", "5") == f"removed {url}/step-00000002\n"
    told(capsys, "unpin", f"{url}/step-00000001")
    assert told(capsys, "convert", url, f"{url}-raw") == f"wrote {url}-raw/step-00000003\n"
    assert told(capsys, "diff", url, f"{url}-raw") == "no difference\n"
    (data,) = [name for name in Remote(f"{url}-raw/step-00000003").entries() if name.startswith("data")]
    Remote(f"{url}-raw/step-00000003/{data}").remove()
    assert "is missing" in told(capsys, "verify", f"{url}-raw", code=11)
    assert "no checkpoint under memory://" in told(capsys, "inspect", f"{url}-nothing", code=11)
    assert "that fsspec knows" in told(capsys, "list", "nosuch://bucket/x", code=2)


def test_a_run_whose_checkpoints_lie_elsewhere_is_found_there(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = run.parent / "elsewhere"
    recipe = parse.read(run / "recipe.toml")
    moved = replace(recipe, checkpoint=replace(recipe.checkpoint, directory=str(elsewhere)))
    (run / "recipe.toml").write_text(parse.dumps(moved))
    elsewhere.mkdir()
    (run / "checkpoints").rename(elsewhere / moved.name)
    assert [line.split()[0] for line in told(capsys, "list", run).splitlines()[1:]] == ["1", "2", "3", "4"]
    assert "step 4" in told(capsys, "inspect", run)
