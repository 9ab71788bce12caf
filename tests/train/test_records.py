"""What a run leaves behind: records that follow the curriculum, checkpoints, evaluations, and a report with samples."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from quintet.checkpoint.load import list_checkpoints, read_extra
from quintet.cli.main import main
from quintet.errors import UsageError
from quintet.monitor.metrics import Evaluated, Message, Saved, read_events
from quintet.monitor.status import read_status
from quintet.spec import parse
from quintet.spec.curriculum import PhaseCurves
from quintet.spec.run import Checkpoint, Data, Evaluation, Monitor, Phase, Run
from tests.train.runs import PHASE, expert_bias, records, tiny_run, train, where, write_recipe

CURVES = Phase(
    name="curves",
    length="10 steps",
    sequence_length=16,
    batch=("2 until 3 steps", "linear to 6 until 6 steps", "6"),
    learning_rate=("linear to 1e-2 until 20%", "hold until 50%", "cosine to 1e-3"),
    mtp_weight=("0.3 until 60%", "0.1"),
    bias_speed=("0.01 until 80%", "0"),
)


@pytest.mark.usefixtures("quick")
def test_every_step_is_trained_with_what_the_curves_say(run: Run) -> None:
    run = replace(run, phases=(CURVES,), checkpoint=Checkpoint(every=1, keep_last=20))
    train(run)
    found, curves, tokens = records(run), PhaseCurves(CURVES), 0
    for i, record in enumerate(found):
        settings = curves.settings(i, tokens)
        tokens += settings.batch_sequences * 16
        assert (record.step, record.num_steps, record.phase, record.tokens) == (i + 1, 10, "curves", tokens)
        assert (record.batch_sequences, record.learning_rate) == (settings.batch_sequences, settings.learning_rate)
        balance = run.train.balance_weight * record.balance_loss
        assert record.mtp_loss is not None
        assert record.loss == pytest.approx(record.main_loss + settings.mtp_weight * record.mtp_loss + balance, rel=1e-6)
    assert [record.batch_sequences for record in found] == [2, 2, 2, 2, 3, 5, 6, 6, 6, 6]
    assert [round(record.learning_rate, 4) for record in found] == [0.005, 0.01, 0.01, 0.01, 0.01, 0.0091, 0.0069, 0.0041, 0.0019, 0.001]


@pytest.mark.usefixtures("quick")
def test_the_routers_biases_move_at_their_speed_and_stop_when_it_is_zero(run: Run) -> None:
    run = replace(run, phases=(CURVES,), checkpoint=Checkpoint(every=1, keep_last=20))
    train(run)
    biases = [expert_bias(found.path) for found in list_checkpoints(where(run) / "checkpoints")]
    moved = [(after - before).abs() for before, after in pairwise([torch.zeros_like(biases[0]), *biases])]
    assert [round(float(step.max()), 6) for step in moved] == [0.01] * 7 + [0.0] * 3
    assert all(bool(((step - 0.01).abs() < 1e-6).logical_or(step == 0).all()) for step in moved)


@pytest.mark.usefixtures("quick")
def test_an_mtp_loss_is_told_only_where_the_modules_ran(run: Run) -> None:
    run = replace(run, phases=(replace(PHASE, length="4 steps", mtp_weight=("0 until 3 steps", "0.3")),))
    train(run)
    assert [record.mtp_loss is None for record in records(run)] == [True, True, False, False]
    assert [sum(record.expert_load[-1]) > 0 for record in records(run)] == [False, False, True, True]


@pytest.mark.usefixtures("quick")
def test_steps_of_the_whole_run_replace_the_phases_lengths_in_proportion(run: Run) -> None:
    phases = (PHASE, replace(PHASE, name="second", length="30 steps", sequence_length=16))
    run = replace(run, phases=phases, train=replace(run.train, steps=4))
    train(run)
    assert [(record.phase, record.num_steps) for record in records(run)] == [("only", 4)] + [("second", 4)] * 3
    # The learning rate of the shortened second phase still runs to its end.
    assert records(run)[-1].learning_rate == pytest.approx(1e-3)


@pytest.mark.usefixtures("quick")
def test_evaluations_checkpoints_and_records_come_when_the_recipe_says(run: Run) -> None:
    run = replace(
        run,
        evaluation=Evaluation(every=4, num_sequences=2),
        checkpoint=Checkpoint(every=3, keep_last=1, keep_every=6),
        monitor=replace(run.monitor, every=5),
    )
    train(run)
    events = read_events(where(run) / "metrics.jsonl")
    assert [record.step for record in records(run)] == [5, 10]
    assert [event.step for event in events if isinstance(event, Evaluated)] == [4, 8, 10]
    assert [event.step for event in events if isinstance(event, Saved)] == [3, 6, 9, 10]
    assert [found.step for found in list_checkpoints(where(run) / "checkpoints")] == [6, 10]
    evaluated = next(event for event in events if isinstance(event, Evaluated))
    assert evaluated.domains == {"code": "code", "prose": "prose"}
    assert all(0 < loss < 2 * math.log(run.model.vocab_size) for loss in evaluated.losses.values())


@pytest.mark.usefixtures("quick")
def test_the_resolved_run_stands_in_its_directory_and_in_every_checkpoint(run: Run, tmp_path: Path) -> None:
    options = ["--train.steps", "2", "--name", "renamed", "--optimizer.beta2", "0.9"]
    assert main(["train", str(write_recipe(run, tmp_path / "recipe.toml")), *options]) == 0
    resolved = replace(run, name="renamed", train=replace(run.train, steps=2), optimizer=replace(run.optimizer, beta2=0.9))
    assert parse.read(where(resolved) / "recipe.toml") == resolved
    newest = list_checkpoints(where(resolved) / "checkpoints")[-1].path
    assert parse.loads(read_extra(newest, "recipe.toml"), origin="checkpoint") == resolved
    assert read_extra(newest, "tokenizer.json") == (Path(run.data.directory) / "tokenizer.json").read_text()


@pytest.fixture(scope="module")
def finished(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that was trained by the command with everything on."""
    folder = tmp_path_factory.mktemp("finished")
    monitor = Monitor(live=False, tensorboard=True, prompts=("def ", "<b> & class "), sample_tokens=6)
    run = replace(tiny_run(data, folder / "runs"), monitor=monitor)
    assert main(["train", str(write_recipe(run, folder / "recipe.toml"))]) == 0
    return run


def test_a_run_leaves_metrics_tensorboard_a_report_and_its_verdict(finished: Run) -> None:
    names = {path.name for path in where(finished).iterdir() if not path.name.startswith(".")}
    assert names == {"checkpoints", "metrics.jsonl", "recipe.toml", "report.html", "status.json", "tensorboard", "tokenizer.json"}
    status = read_status(where(finished))
    assert status is not None
    assert (status.verdict, status.exit_code, status.step, status.num_steps, status.remedy) == ("done", 0, 10, 10, None)
    assert any("tfevents" in path.name and path.stat().st_size for path in (where(finished) / "tensorboard").iterdir())
    told = [event.text for event in read_events(where(finished) / "metrics.jsonl") if isinstance(event, Message)]
    assert told == [f"report: {where(finished) / 'report.html'}"]


def test_the_records_have_speed_and_load(finished: Run) -> None:
    events = [event for event in read_events(where(finished) / "metrics.jsonl")]
    for record in (event for event in events if type(event).__name__ == "Record"):
        assert record.tokens_per_second == pytest.approx(4 * 32 / record.seconds)
        assert 0 < record.mfu < 1
        assert [round(sum(layer), 3) for layer in record.expert_load] == [1.0, 1.0]
        assert record.peak_memory_bytes > 0


def test_the_report_has_plots_and_a_sample_of_each_prompt(finished: Run) -> None:
    page = (where(finished) / "report.html").read_text()
    assert page.count("<svg") >= 3
    assert "&lt;b&gt; &amp; class" in page and "def " in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace("http://creativecommons.org", "")


@pytest.mark.usefixtures("quick")
def test_samples_are_cut_to_the_models_context(run: Run) -> None:
    monitor = replace(run.monitor, prompts=("", "def " * 200, "x"), sample_tokens=1000)
    assert train(replace(run, monitor=monitor, train=replace(run.train, steps=1))) == 0


def test_a_layout_that_cannot_run_here_is_refused_before_anything_is_made(run: Run) -> None:
    with pytest.raises(UsageError, match=r"takes 2 ranks .* but 1 process was started; start as many as it takes, for example: torchrun"):
        train(replace(run, layout=replace(run.layout, dp=2)))
    assert not os.path.exists(run.directory)
