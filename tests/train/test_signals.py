"""Real signals: SIGTERM and SIGINT end in a complete checkpoint and 75, more of them do no harm, and kill -9 costs little."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from quintet.checkpoint.load import latest, list_checkpoints
from quintet.cli.main import main
from quintet.errors import DONE, INTERRUPTED
from quintet.monitor.interrupt import remembered
from quintet.monitor.metrics import Evaluated, read_events
from quintet.monitor.status import Status, read_status
from quintet.spec.run import Checkpoint, Run
from quintet.train import trainer
from quintet.train.step import StepResult
from tests.train.runs import At, assert_same, records, resume, send, train, where, write_recipe

COMMAND = "import sys; from quintet.cli.main import main; sys.exit(main())"


def status_of(run: Run) -> Status:
    status = read_status(where(run))
    assert status is not None
    return status


def signalled(number: signal.Signals, *arguments: str | Path, at_step: int) -> tuple[int, str]:
    """Run the command in a process of its own, send it a signal once it tells of a step, and give its exit code and its last words."""
    with subprocess.Popen([sys.executable, "-c", COMMAND, *map(str, arguments)], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(f"step {at_step}/"):
                process.send_signal(number)
                break
        told = process.stderr.read()
    return process.returncode, told


def assert_stopped(run: Run, code: int, told: str, *, after: int) -> None:
    """The process ended with 75, said how to go on, and its newest checkpoint is of its last step."""
    assert code == INTERRUPTED
    assert f"stopped; continue with: quintet resume {where(run)}" in told and "Traceback" not in told
    status = status_of(run)
    assert (status.verdict, status.exit_code, status.remedy) == ("interrupted", 75, f"quintet resume {where(run)}")
    saved = list_checkpoints(where(run) / "checkpoints")
    assert [found.problem for found in saved] == [None] * len(saved)
    assert after <= saved[-1].step == status.step == records(run)[-1].step < 40


def test_processes_stopped_by_sigterm_kill_9_and_sigint_reach_the_same_end_as_one_that_was_left_alone(run: Run, tmp_path: Path) -> None:
    long = replace(run, train=replace(run.train, steps=40), checkpoint=Checkpoint(every=5, keep_last=2))
    whole, cut = replace(long, directory=str(tmp_path / "whole")), replace(long, directory=str(tmp_path / "cut"))
    assert train(whole) == DONE
    code, told = signalled(signal.SIGTERM, "train", write_recipe(cut, tmp_path / "r.toml"), at_step=3)
    assert_stopped(cut, code, told, after=3)
    code, _ = signalled(signal.SIGKILL, "resume", where(cut), at_step=17)
    assert code == -signal.SIGKILL
    assert status_of(cut).verdict == "running", "nobody was left to write another"
    code, told = signalled(signal.SIGINT, "resume", where(cut), at_step=23)
    assert "resumed from" in (where(cut) / "metrics.jsonl").read_text()
    assert_stopped(cut, code, told, after=23)
    assert main(["resume", str(where(cut))]) == DONE
    assert (status_of(cut).verdict, status_of(cut).exit_code) == ("done", 0)
    assert_same(whole, cut)


@pytest.mark.usefixtures("quick")
def test_a_second_signal_during_the_save_does_no_harm(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real, sent = os.fsync, []

    def fsync(fd: int) -> None:
        if not sent:
            sent.append(send(signal.SIGTERM))
        real(fd)

    def stop() -> None:
        send(signal.SIGTERM)
        monkeypatch.setattr(os, "fsync", fsync)

    assert train(run, At(5, stop)) == INTERRUPTED
    assert len(sent) == 1
    assert latest(where(run) / "checkpoints", verify_content=True).name == "step-00000005"


@pytest.mark.usefixtures("quick")
def test_somebody_who_insists_gets_out_at_once_and_the_checkpoint_before_stays(run: Run) -> None:
    run = replace(run, checkpoint=Checkpoint(every=4, background=False))
    child = os.fork()
    if child == 0:
        patch, real = pytest.MonkeyPatch(), os.fsync

        def fsync(fd: int) -> None:
            for _ in range(3):
                send(signal.SIGTERM)
            real(fd)

        try:
            train(run, At(6, lambda: patch.setattr(os, "fsync", fsync)))
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGTERM
    assert latest(where(run) / "checkpoints", verify_content=True).name == "step-00000004"
    assert resume(run) == DONE


@pytest.mark.usefixtures("quick")
def test_a_signal_at_the_last_step_is_too_late_to_stop_anything(run: Run) -> None:
    assert train(run, At(10, lambda: send(signal.SIGTERM))) == DONE
    evaluated = [event.step for event in read_events(where(run) / "metrics.jsonl") if isinstance(event, Evaluated)]
    assert evaluated == [10]


@pytest.mark.usefixtures("quick")
def test_the_signal_handlers_of_the_caller_come_back(run: Run) -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    train(replace(run, train=replace(run.train, steps=1)))
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.usefixtures("quick")
def test_a_run_whose_terminal_is_closed_saves_and_one_under_nohup_goes_on(run: Run) -> None:
    def hang_up() -> None:
        for _ in range(4):
            send(signal.SIGHUP)

    assert train(run, At(3, hang_up)) == INTERRUPTED
    assert [each.step for each in list_checkpoints(where(run) / "checkpoints")] == [3]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert resume(run, At(5, hang_up)) == DONE
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("quick")
def test_an_interrupt_that_an_import_swallowed_ends_the_run_before_its_first_step(run: Run) -> None:
    with remembered():
        with contextlib.suppress(KeyboardInterrupt):
            send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            train(run)
    assert not (where(run) / "metrics.jsonl").exists()


@pytest.mark.parametrize("closed", ["pipe", "at once"])
def test_nobody_who_reads_along_is_no_reason_to_end_a_run(closed: str, run: Run, tmp_path: Path) -> None:
    recipe, (reader, writer) = write_recipe(run, tmp_path / "recipe.toml"), os.pipe()
    os.close(reader)  # as `quintet train ... 2>&1 | head` does
    close = (lambda: os.close(2)) if closed == "at once" else None
    command = [sys.executable, "-c", COMMAND, "train", str(recipe)]
    done = subprocess.run(command, stdout=writer, stderr=writer, preexec_fn=close, check=False)
    os.close(writer)
    assert done.returncode == DONE
    assert len(records(run)) == 10


@pytest.mark.usefixtures("quick")
def test_ctrl_c_in_the_first_step_of_a_process_ends_it_at_once_and_a_resume_does_the_step(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **named: object) -> StepResult:
        send(signal.SIGINT)
        raise AssertionError("the step went on")

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "run_step", interrupted)
        train(run)
    assert train_to(run, 3) == INTERRUPTED
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "run_step", interrupted)
        resume(run)
    assert resume(run) == DONE and len(records(run)) == 10


def train_to(run: Run, step: int) -> int:
    """Resume until a signal at a step."""
    return resume(run, At(step, lambda: send(signal.SIGTERM)))
