"""What stops or hurts a run is told by `train --dry-run` and `info` before anything is computed, as `train` tells it later."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quintet.cli.main import main
from quintet.monitor import machine
from quintet.monitor.units import num_bytes
from quintet.spec.layout import Layout
from quintet.spec.run import Run
from quintet.train.foresee import doubts, refusals
from tests.train.runs import where, write_recipe, write_texts


@pytest.fixture(autouse=True)
def _a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores and 8 GiB."""
    monkeypatch.setattr(machine, "num_cores", lambda: 2)
    monkeypatch.setattr(machine, "total_memory", lambda: 8 << 30)


def test_nothing_is_told_where_nothing_is_wrong(run: Run) -> None:
    assert refusals(run) == doubts(run) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_where_there_is_none_is_foreseen(run: Run) -> None:
    (told,) = refusals(replace(run, train=replace(run.train, device="cuda")))
    assert "torch sees no CUDA device" in told


def test_a_run_that_exists_or_cannot_be_made_is_foreseen(run: Run, tmp_path: Path) -> None:
    where(run).mkdir(parents=True)
    (told,) = refusals(run)
    assert f"{where(run)} exists already and is not overwritten; continue it with: quintet resume {where(run)}" in told
    (tmp_path / "file").write_text("")
    (told,) = refusals(replace(run, directory=str(tmp_path / "file" / "runs")))
    assert f"{tmp_path / 'file'} is no folder that may be written; choose another --directory" in told


def test_every_fault_of_the_data_that_names_tell_is_foreseen(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("{}")
    sources = [
        replace(source, paths=(str(tmp_path / name),)) for source, name in zip(run.data.sources, ("missing", "empty"), strict=True)
    ]
    data = replace(
        run.data, sources=tuple(sources), tokenizer=str(tmp_path / "no" / "tokenizer.json"), directory=str(tmp_path / "file" / "prepared")
    )
    missing, empty, tokenizer, directory = refusals(replace(run, data=data))
    assert f"'{tmp_path / 'missing'}': file or folder does not exist" in missing
    assert f"'{tmp_path / 'empty'}' holds no text or data file" in empty
    assert f"cannot read the tokenizer {tmp_path / 'no' / 'tokenizer.json'}" in tokenizer
    assert f"{tmp_path / 'file'} is no folder that may be written; set data.directory elsewhere" in directory


def test_a_vocabulary_without_room_is_foreseen(run: Run) -> None:
    (told,) = refusals(replace(run, model=replace(run.model, vocab_size=100)))
    assert "model.vocab_size (100) must be at least 260" in told


def test_memory_beyond_the_machines_is_told_with_both_figures_and_a_layout_is_left_alone(run: Run) -> None:
    large = replace(run, model=replace(run.model, num_routed_experts=2**20))
    (told,) = doubts(large)
    assert f"but this machine has {num_bytes(8 << 30)} of memory" in told
    assert "a step needs about " in told and "train.micro_batch" in told
    assert doubts(replace(large, layout=Layout(dp=2))) == []


def test_more_threads_than_cores_are_told(run: Run) -> None:
    (told,) = doubts(replace(run, train=replace(run.train, num_threads=3)))
    assert "train.num_threads (3) is more than the 2 cores" in told


def test_the_memory_of_this_machine_is_known_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    psutil = pytest.importorskip("psutil")
    limit = machine.memory_limit() or float("inf")
    assert machine.total_memory() == min(psutil.virtual_memory().total, limit)


def test_dry_run_and_info_tell_it_and_end_with_0(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(replace(run, train=replace(run.train, num_threads=3)), tmp_path / "r.toml")
    where(run).mkdir(parents=True)
    for arguments in (["train", str(recipe), "--dry-run"], ["info", str(recipe)]):
        assert main(arguments) == 0
        told = capsys.readouterr().err.splitlines()
        assert [line.partition(":")[0] for line in told] == ["warning", "warning"]
        assert told[0].startswith(f"warning: train would refuse this here: {where(run)} exists already")
        assert told[1].startswith("warning: train.num_threads (3)")
    assert main(["info", str(recipe), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["warnings"]) == 2


@pytest.mark.usefixtures("quick")
def test_train_tells_its_doubts_before_it_begins(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    run = replace(run, train=replace(run.train, steps=1, num_threads=3))
    assert main(["train", str(write_recipe(run, tmp_path / "r.toml"))]) == 0
    assert capsys.readouterr().err.startswith("warning: train.num_threads (3)")


def test_a_folder_of_text_without_shards_yet_is_no_obstacle(run: Run, tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts", count=3, seed=0)
    sources = tuple(replace(source, paths=(str(folder),)) for source in run.data.sources)
    assert refusals(replace(run, data=replace(run.data, sources=sources, directory=str(tmp_path / "new" / "prepared")))) == []
    assert not (tmp_path / "new").exists()


def test_adaptive_without_stages_or_without_checkpoints_amid_the_run_is_told(run: Run) -> None:
    adaptive = replace(run, train=replace(run.train, adaptive=True))
    (told,) = doubts(adaptive)
    assert told == "train.adaptive has no effect: it evens out the stages of a pipeline, and layout.pp is 1"
    staged = replace(adaptive, layout=Layout(pp=2, schedule="1f1b"))
    (told,) = doubts(staged)
    assert "it acts at checkpoints amid the run, and checkpoint.every is absent" in told
    assert doubts(replace(staged, checkpoint=replace(run.checkpoint, every=5))) == []
