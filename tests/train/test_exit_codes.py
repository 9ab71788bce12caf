"""Every way in which training, resuming and using a run ends: the exit code, the same verdict in status.json, and nothing lost."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quintet.checkpoint.load import latest, list_checkpoints, verify
from quintet.cli.main import main
from quintet.data.prepare import prepare
from quintet.data.tokenizer import Tokenizer, train_bpe
from quintet.monitor.metrics import Message, Record, Saved, read_events
from quintet.monitor.status import read_status
from quintet.spec import parse
from quintet.spec.run import Checkpoint, Data, Run
from tests.train.runs import PHASE, assert_same, corpus, records, tiny_run, train, where, write_recipe

pytestmark = pytest.mark.usefixtures("quick")


class Tell:
    """Runs the command line; gives its exit code and what it said on stderr, as one line."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: str | Path) -> tuple[int, str]:
        code = main([str(argument) for argument in arguments])
        return code, " ".join(self.capsys.readouterr().err.replace("│", " ").split())


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Tell:
    return Tell(capsys)


def verdict(run: Run) -> tuple[str, int | None]:
    status = read_status(where(run))
    assert status is not None
    return status.verdict, status.exit_code


def content(folder: Path) -> dict[str, bytes]:
    """Every file under `folder`, its lock excepted."""
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"
    }


def checkpoints(run: Run) -> Path:
    return where(run) / "checkpoints"


def truncate(checkpoint: Path) -> None:
    """Cut a checkpoint's tensors in half."""
    os.truncate(checkpoint / "data-00000.bin", (checkpoint / "data-00000.bin").stat().st_size // 2)


def flip_a_bit(checkpoint: Path) -> None:
    data = bytearray((checkpoint / "data-00000.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (checkpoint / "data-00000.bin").write_bytes(data)


# 0 and 2


def test_a_run_that_is_done_says_so(tell: Tell, run: Run, tmp_path: Path) -> None:
    assert tell("train", write_recipe(run, tmp_path / "r.toml"))[0] == 0
    assert verdict(run) == ("done", 0)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("micro_batch = 2", "micro_bacth = 2", "unknown key 'train.micro_bacth' (did you mean 'micro_batch'?)"),
        ("micro_batch = 2", 'micro_batch = "2"', "train.micro_batch: Expected `int`, got `str`"),
        ("micro_batch = 2", "micro_batch = 0", "micro_batch (0) must be larger than 0"),
        ("num_groups = 4", "num_groups = 3", "num_routed_experts (8) must be divisible by num_groups (3)"),
        ("max_context = 64", "max_context = 16", "sequence_length (32) must be at most model.max_context (16)"),
        ("[model]", "[model", "is not valid TOML"),
    ],
)
def test_a_recipe_that_does_not_fit_is_2_and_makes_nothing(tell: Tell, run: Run, tmp_path: Path, old: str, new: str, message: str) -> None:
    text = parse.dumps(run)
    assert text.count(old) == 1
    (tmp_path / "r.toml").write_text(text.replace(old, new))
    code, err = tell("train", tmp_path / "r.toml")
    assert code == 2
    assert message in err
    assert not Path(run.directory).exists()


def test_an_existing_run_is_2_and_stays_as_it_is(tell: Tell, run: Run, tmp_path: Path) -> None:
    train(run)
    before = content(where(run))
    code, err = tell("train", write_recipe(run, tmp_path / "r.toml"))
    assert code == 2
    assert f"{where(run)} exists already and is not overwritten; continue it with: quintet resume {where(run)}" in err
    assert content(where(run)) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_where_there_is_none_is_2_and_makes_nothing(tell: Tell, run: Run, tmp_path: Path) -> None:
    code, err = tell("train", write_recipe(run, tmp_path / "r.toml"), "--train.device", "cuda")
    assert code == 2
    assert "torch sees no CUDA device; use --train.device cpu" in err
    assert not where(run).exists()


def test_a_directory_that_cannot_be_made_is_2(tell: Tell, run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, err = tell("train", write_recipe(run, tmp_path / "r.toml"), "--directory", tmp_path / "file")
    assert code == 2
    assert "choose another --directory" in err


@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError])
def test_a_run_whose_making_is_broken_off_leaves_nothing_in_the_way_of_the_next(
    tell: Tell, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    save = Tokenizer.save

    def broken_off(self: Tokenizer, path: Path) -> None:
        if path.is_relative_to(run.directory):
            raise kind(28, "No space left on device")
        save(self, path)

    recipe = write_recipe(run, tmp_path / "r.toml")
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "save", broken_off)
        assert tell("train", recipe)[0] == (130 if kind is KeyboardInterrupt else 2)
    assert list(Path(run.directory).iterdir()) == []
    assert tell("train", recipe)[0] == 0


def test_a_second_trainer_on_a_run_is_2_and_leaves_the_first_ones_status(tell: Tell, run: Run) -> None:
    seen: list[tuple[int, str]] = []

    class Second:
        def write(self, event: object) -> None:
            if isinstance(event, Record) and event.step == 3:
                before = content(where(run))
                seen.append(tell("resume", where(run)))
                assert content(where(run)) == before

        def close(self) -> None:
            pass

    train(run, Second())  # type: ignore[arg-type]
    assert seen[0][0] == 2
    assert f"another process is training in {where(run)}; wait for it, or stop it first" in seen[0][1]
    assert len(records(run)) == 10


# 10


@pytest.mark.parametrize("there", [False, True], ids=["missing", "empty"])
def test_a_missing_or_empty_folder_is_10_and_names_it(tell: Tell, run: Run, tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "texts").mkdir()
    options = ("--data.sources.0.paths", tmp_path / "texts", "--data.directory", tmp_path / "prepared")
    code, err = tell("train", write_recipe(run, tmp_path / "r.toml"), *options)
    assert code == 10
    assert str(tmp_path / "texts") in err
    assert not where(run).exists()


def own_data(run: Run, folder: Path) -> Run:
    """The run with a corpus that the test may change."""
    return replace(run, data=corpus(folder), train=replace(run.train, steps=2))


def test_a_tokenizer_that_did_not_make_the_shards_is_10(tell: Tell, run: Run, tmp_path: Path) -> None:
    run = own_data(run, tmp_path)
    assert tell("train", write_recipe(run, tmp_path / "r.toml"))[0] == 0
    before = content(checkpoints(run))
    train_bpe(["other words for another tokenizer " * 50], 300).save(Path(run.data.directory) / "tokenizer.json")
    code, err = tell("resume", where(run))
    assert code == 10
    assert "tokenizer" in err
    assert verdict(run) == ("failed", 10)
    assert content(checkpoints(run)) == before


def test_prepared_data_that_changed_under_a_run_is_10_and_giving_it_back_lets_it_go_on(tell: Tell, run: Run, tmp_path: Path) -> None:
    run = own_data(run, tmp_path)
    recipe = write_recipe(run, tmp_path / "r.toml")
    assert tell("train", recipe)[0] == 0
    shutil.copytree(run.data.directory, tmp_path / "kept")
    (tmp_path / "code" / "new.py").write_text("something new\n" * 20)
    code, err = tell("prepare", recipe)
    assert code == 10
    assert f"{run.data.directory} holds code, prose made from other text" in err and f"quintet prepare {recipe} --replace" in err
    assert tell("resume", where(run))[0] == 0
    assert tell("prepare", recipe, "--replace")[0] == 0
    code, err = tell("resume", where(run))
    assert code == 10
    assert "give back the prepared data of the run, or start a new run" in err or "was prepared with another tokenizer" in err
    assert verdict(run) == ("failed", 10)
    assert len(records(run)) == 2
    shutil.rmtree(run.data.directory)
    (tmp_path / "kept").rename(run.data.directory)
    assert tell("resume", where(run))[0] == 0
    assert verdict(run) == ("done", 0)


def test_a_new_run_on_changed_text_prepares_beside_and_both_runs_go_on(tell: Tell, run: Run, tmp_path: Path) -> None:
    run = own_data(run, tmp_path)
    recipe = write_recipe(run, tmp_path / "r.toml")
    assert tell("train", recipe)[0] == 0
    before = content(Path(run.data.directory))
    (tmp_path / "code" / "new.py").write_text("something new\n" * 20)
    code, err = tell("train", recipe, "--name", "second")
    assert code == 0
    second = parse.read(Path(run.directory) / "second" / "recipe.toml")
    assert second.data.directory.startswith(f"{run.data.directory}-")
    assert f"this run's data is in {second.data.directory}" in err
    assert content(Path(run.data.directory)) == before
    assert [tell("resume", where(each))[0] for each in (run, second)] == [0, 0]
    assert tell("evaluate", where(second))[0] == 0


def test_prepared_data_that_is_gone_is_10_and_names_the_command(tell: Tell, run: Run, tmp_path: Path) -> None:
    run = own_data(run, tmp_path)
    assert tell("train", write_recipe(run, tmp_path / "r.toml"))[0] == 0
    shutil.rmtree(run.data.directory)
    for command in ("resume", "evaluate"):
        code, err = tell(command, where(run))
        assert code == 10
        assert f"holds no prepared data; run: quintet prepare {where(run) / 'recipe.toml'}" in err


def prepared_by_another_tokenizer(run: Run) -> None:
    """Make the run's prepared data anew, complete in itself, but with another tokenizer, as a recipe that shares the folder may."""
    shutil.rmtree(run.data.directory)
    prepare(run.data, vocab_size=300, seed=0)


@pytest.mark.parametrize("command", ["resume", "evaluate"])
def test_a_model_never_reads_the_ids_of_another_tokenizer(tell: Tell, run: Run, tmp_path: Path, command: str) -> None:
    run = own_data(run, tmp_path)
    assert tell("train", write_recipe(run, tmp_path / "r.toml"))[0] == 0
    prepared_by_another_tokenizer(run)
    code, err = tell(command, where(run))
    assert code == 10
    assert f"{run.data.directory} was prepared with another tokenizer" in err
    assert f"then run: quintet prepare {where(run) / 'recipe.toml'}" in err


# 11


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda path: (path / "manifest.json").unlink()], ids=["cut", "bit", "manifest"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_the_run_ends_the_same(
    tell: Tell, run: Run, data: Data, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    whole = replace(tiny_run(data, tmp_path / "whole"), checkpoint=Checkpoint(every=5))
    run = replace(run, checkpoint=Checkpoint(every=5))
    train(whole)
    train(run)
    damage(checkpoints(run) / "step-00000010")
    code, err = tell("resume", where(run))
    assert code == 0
    assert "passed over a damaged checkpoint" in err and "step-00000010" in err
    assert f"resumed from {checkpoints(run) / 'step-00000005'}" in err
    assert_same(whole, run)
    verify(checkpoints(run) / "step-00000010")
    told = [event.text for event in read_events(where(run) / "metrics.jsonl") if isinstance(event, Message)]
    assert any("passed over a damaged checkpoint" in text for text in told)


def test_where_all_checkpoints_are_damaged_it_is_11_and_all_are_named(tell: Tell, run: Run) -> None:
    run = replace(run, checkpoint=Checkpoint(every=5))
    train(run)
    for found in list_checkpoints(checkpoints(run)):
        truncate(found.path)
    before = content(where(run))
    for command in ("resume", "evaluate"):
        code, err = tell(command, where(run))
        assert code == 11
        assert "is whole" in err and "step-00000005" in err and "step-00000010" in err
    assert verdict(run) == ("failed", 11)
    after = content(where(run))
    del after["status.json"]
    assert after == before


def test_a_changed_model_is_11_and_names_what_differs(tell: Tell, run: Run) -> None:
    train(run)
    before = content(where(run))
    write_recipe(replace(run, model=replace(run.model, expert_ffn_size=12)), where(run) / "recipe.toml")
    code, err = tell("resume", where(run))
    assert code == 11
    assert "is not a checkpoint of this model" in err
    assert "model.layers.1.ffn.experts.w13 (float32[8, 2, 8, 16] there, float32[8, 2, 12, 16] here)" in err
    assert verdict(run) == ("failed", 11)
    write_recipe(run, where(run) / "recipe.toml")
    assert {name: data for name, data in content(where(run)).items() if name != "status.json"} == before
    assert tell("resume", where(run))[0] == 0


def test_another_precision_is_11(tell: Tell, run: Run) -> None:
    train(run)
    write_recipe(replace(run, train=replace(run.train, precision="bf16")), where(run) / "recipe.toml")
    code, err = tell("resume", where(run))
    assert code == 11
    assert "bfloat16" in err


@pytest.mark.parametrize("command", ["generate", "evaluate", "export", "resume"])
def test_what_is_no_run_is_11(tell: Tell, tmp_path: Path, command: str) -> None:
    more = {"generate": ["--prompt", "x"], "export": [tmp_path / "hf"]}.get(command, [])
    code, err = tell(command, tmp_path / "nothing", *more)
    assert code == 11
    assert str(tmp_path / "nothing") in err


class FullDisk:
    """From now on, files whose path holds `part` cannot be written."""

    def __init__(self, patch: pytest.MonkeyPatch, part: str) -> None:
        real = os.write

        def write(fd: int, data: Any) -> int:
            if part in os.readlink(f"/proc/self/fd/{fd}"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(fd, data)

        patch.setattr(os, "write", write)


def test_a_disk_that_is_full_while_saving_is_11_and_the_checkpoint_before_goes_on(
    tell: Tell, run: Run, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Checkpoint(every=4, background=False)
    whole = replace(tiny_run(data, tmp_path / "whole"), checkpoint=settings)
    run = replace(run, checkpoint=settings)
    train(whole)
    with monkeypatch.context() as patch:
        FullDisk(patch, "step-00000008")
        code, err = tell("train", write_recipe(run, tmp_path / "r.toml"))
    assert code == 11
    assert "the disk is full; free some space, or keep fewer checkpoints (checkpoint.keep_last)" in err
    assert verdict(run) == ("failed", 11)
    assert [path.name for path in checkpoints(run).iterdir()] == ["step-00000004"]
    assert tell("resume", where(run))[0] == 0
    assert_same(whole, run)


def test_a_save_beside_training_that_fails_is_told_at_once_and_the_run_goes_on_while_that_is_tolerated(
    tell: Tell, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(run, checkpoint=Checkpoint(every=2, tolerated_failures=1))
    with monkeypatch.context() as patch:
        FullDisk(patch, "step-00000004")
        code, err = tell("train", write_recipe(run, tmp_path / "r.toml"))
    assert code == 0
    assert "THE CHECKPOINT OF STEP 4 WAS NOT SAVED" in err and "the disk is full" in err
    assert [event.step for event in read_events(where(run) / "metrics.jsonl") if isinstance(event, Saved)] == [2, 6, 8, 10]
    assert [path.name for path in sorted(checkpoints(run).iterdir())] == ["step-00000008", "step-00000010"]


@pytest.mark.parametrize(("tolerated", "last_step"), [(0, 6), (1, 8)])
def test_saves_beside_training_that_fail_too_often_end_the_run_with_11(
    tell: Tell, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tolerated: int, last_step: int
) -> None:
    run = replace(run, checkpoint=Checkpoint(every=2, tolerated_failures=tolerated))
    with monkeypatch.context() as patch:
        for step in (4, 6, 8):
            FullDisk(patch, f"step-{step:08d}")
        code, err = tell("train", write_recipe(run, tmp_path / "r.toml"))
    assert code == 11
    assert f"{tolerated + 1} saves failed one after the other, last that of step {last_step - 2}" in err and "the disk is full" in err
    assert records(run)[-1].step == last_step
    assert [path.name for path in checkpoints(run).iterdir()] == ["step-00000002"]
    assert tell("resume", where(run))[0] == 0


def test_a_disk_that_is_full_of_everything_ends_with_11_too(tell: Tell, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = replace(run, checkpoint=Checkpoint(every=4))
    train(replace(run, train=replace(run.train, steps=4)))
    write_recipe(run, where(run) / "recipe.toml")
    with monkeypatch.context() as patch:
        FullDisk(patch, str(tmp_path))
        code, err = tell("resume", where(run))
    assert code == 11
    assert "cannot write" in err and "the run goes on" in err
    assert latest(checkpoints(run), verify_content=True).name == "step-00000004"
    assert tell("resume", where(run))[0] == 0


# 12


def test_numbers_that_are_not_finite_are_12_and_the_checkpoint_before_is_whole(tell: Tell, run: Run, tmp_path: Path) -> None:
    phase = replace(PHASE, learning_rate=("1e-3 until 5 steps", "1e38"))  # a curve is read where the step ends: the fifth is too far
    run = replace(run, phases=(phase,), checkpoint=Checkpoint(every=2))
    code, err = tell("train", write_recipe(run, tmp_path / "r.toml"))
    assert code == 12
    assert "error: step 6: loss" in err
    assert "both must be finite. Nothing was updated: lower the learning rate" in err
    assert verdict(run) == ("failed", 12)
    assert latest(checkpoints(run), verify_content=True).name == "step-00000004"
    # The remedy works: with a lower rate the run goes on from there.
    write_recipe(replace(run, phases=(PHASE,)), where(run) / "recipe.toml")
    assert tell("resume", where(run))[0] == 0
    assert verdict(run) == ("done", 0)
    assert [record.step for record in records(run)] == [*range(1, 11)]


def test_a_resume_with_the_same_numbers_meets_the_same_end(tell: Tell, run: Run, tmp_path: Path) -> None:
    phase = replace(PHASE, learning_rate=("1e-3 until 3 steps", "1e38"))
    run = replace(run, phases=(phase,), checkpoint=Checkpoint(every=1))
    assert tell("train", write_recipe(run, tmp_path / "r.toml"))[0] == 12
    before = content(checkpoints(run))
    code, err = tell("resume", where(run))
    assert code == 12
    assert "error: step 4: loss" in err
    assert content(checkpoints(run)) == before
