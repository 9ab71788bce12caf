"""Ten steps equal five, an end of any kind, a resume and five: records, weights, moments, data order and random numbers, bit for bit."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from quintet.checkpoint.load import list_checkpoints
from quintet.errors import DONE, INTERRUPTED
from quintet.monitor.metrics import Record, Resumed, Saved, read_events
from quintet.spec.model import Yarn
from quintet.spec.run import Checkpoint, Data, Evaluation, Phase, Run
from tests.train.runs import PHASE, At, assert_same, checkpoint, make_quick, records, resume, send, tiny_run, train, where

pytestmark = pytest.mark.usefixtures("quick")


def in_fp32(run: Run) -> Run:
    return run


def in_bf16(run: Run) -> Run:
    return replace(run, train=replace(run.train, precision="bf16"))


def with_an_uneven_last_micro_batch(run: Run) -> Run:
    return replace(run, train=replace(run.train, micro_batch=3), phases=(replace(PHASE, batch=("5",)),))


def with_a_growing_batch(run: Run) -> Run:
    return replace(run, phases=(replace(PHASE, batch=("linear from 1 to 6 until 80%", "6")),))


def with_document_mask(run: Run) -> Run:
    return replace(run, data=replace(run.data, document_mask=True))


def with_mtp_modules_that_join_in_the_sixth_step(run: Run) -> Run:
    return replace(run, phases=(replace(PHASE, mtp_weight=("0 until 6 steps", "0.3")),))


def with_whole_blocks_recomputed(run: Run) -> Run:
    return replace(run, train=replace(run.train, recompute="full"))


def evaluated_every_second_step(run: Run) -> Run:
    return replace(run, evaluation=Evaluation(every=2, num_sequences=2))


def longer_sequences_after(steps: int) -> Callable[[Run], Run]:
    """Two phases, the second of twice the sequence length."""

    def change(run: Run) -> Run:
        second = replace(PHASE, name="longer", length=f"{10 - steps} steps", sequence_length=64, learning_rate=("1e-3",))
        return replace(run, phases=(replace(PHASE, length=f"{steps} steps"), second))

    change.__name__ = f"longer_sequences_after_{steps}_steps"
    return change


def in_phases_of_tokens(run: Run) -> Run:
    first = replace(PHASE, length="600 tokens", batch=("4",))
    return replace(run, phases=(first, Phase(name="rest", length="500 tokens", sequence_length=16, batch=("6",), learning_rate=("1e-3",))))


def extended_after_four_steps(run: Run) -> Run:
    first = replace(PHASE, length="4 steps", sequence_length=16, yarn=False)
    second = replace(PHASE, name="longer", length="6 steps", learning_rate=("1e-3",))
    return replace(run, model=replace(run.model, yarn=Yarn(factor=4.0, original_context=16)), phases=(first, second))


CHANGES = [
    in_fp32,
    in_bf16,
    with_an_uneven_last_micro_batch,
    with_a_growing_batch,
    with_document_mask,
    with_mtp_modules_that_join_in_the_sixth_step,
    with_whole_blocks_recomputed,
    evaluated_every_second_step,
    longer_sequences_after(3),
    longer_sequences_after(5),
    in_phases_of_tokens,
    extended_after_four_steps,
]


def elsewhere(run: Run, name: str) -> Run:
    """The same run in another directory."""
    return replace(run, directory=str(Path(run.directory) / name))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_ten_steps_equal_five_a_sigterm_a_resume_and_five(run: Run, change: Callable[[Run], Run]) -> None:
    whole, cut = elsewhere(change(run), "whole"), elsewhere(change(run), "cut")
    assert train(whole) == DONE
    assert train(cut, At(5, lambda: send(signal.SIGTERM))) == INTERRUPTED
    assert [found.step for found in list_checkpoints(where(cut) / "checkpoints")] == [5]
    assert [record.step for record in records(cut)] == [1, 2, 3, 4, 5]
    assert resume(cut) == DONE
    assert_same(whole, cut)


def test_a_run_may_be_stopped_and_resumed_at_every_step(run: Run) -> None:
    whole, cut = elsewhere(in_bf16(run), "whole"), elsewhere(in_bf16(run), "cut")
    train(whole)
    assert train(cut, At(1, lambda: send(signal.SIGINT))) == INTERRUPTED
    for step in range(2, 10):
        assert resume(cut, At(step, lambda: send(signal.SIGINT))) == INTERRUPTED
    assert resume(cut) == DONE
    assert_same(whole, cut)


def test_random_numbers_go_on_where_they_stopped(run: Run) -> None:
    """Nothing in training draws from the global generator yet, so the test does, once a step."""
    whole, cut = elsewhere(run, "whole"), elsewhere(run, "cut")
    drawn: dict[str, list[float]] = {"whole": [], "cut": []}

    def draws(name: str, steps: range) -> list[At]:
        return [At(step, lambda: drawn[name].append(float(torch.rand(())))) for step in steps]

    train(whole, *draws("whole", range(1, 11)))
    train(cut, *draws("cut", range(1, 6)), At(5, lambda: send(signal.SIGTERM)))
    torch.manual_seed(1)
    resume(cut, *draws("cut", range(6, 11)))
    assert drawn["whole"] == drawn["cut"]
    assert len(set(drawn["whole"])) == 10
    assert_same(whole, cut)


def test_different_seeds_and_different_ends_are_told_apart(run: Run) -> None:
    """The comparison above can fail."""
    one, two, three = elsewhere(run, "one"), replace(elsewhere(run, "two"), seed=1), replace(elsewhere(run, "three"), phases=(PHASE,))
    assert [train(one), train(two)] == [DONE, DONE]
    with pytest.raises(AssertionError):
        assert_same(one, two)
    train(three, At(9, lambda: send(signal.SIGTERM)))
    with pytest.raises(AssertionError):
        assert_same(one, three)


class Calls:
    """Stands in for one function of `os`, counts its calls, and may end the process, as kill -9 does, at the n-th."""

    def __init__(self, patch: pytest.MonkeyPatch, name: str, *, kill_at: int | None = None) -> None:
        self.number, self.kill_at, self.real = 0, kill_at, getattr(os, name)
        patch.setattr(os, name, self)

    def __call__(self, *arguments: object) -> object:
        self.number += 1
        if self.number == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.real(*arguments)


MOMENTS = ("write", "fsync", "rename", "mkdir", "close")
"""System calls of the metrics file and of saving: a kill at any of them leaves something half done."""


@dataclass(frozen=True)
class Counted:
    """A run that was not disturbed, and how often each system call came after its first checkpoint."""

    run: Run
    calls: dict[str, int]


def saved_every_second_step(run: Run) -> Run:
    return replace(run, checkpoint=Checkpoint(every=2, keep_last=2))


@pytest.fixture(scope="module")
def counted(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Counted:
    run = saved_every_second_step(tiny_run(data, tmp_path_factory.mktemp("whole")))
    calls: dict[str, Calls] = {}
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        train(run, At(3, lambda: calls.update({name: Calls(patch, name) for name in MOMENTS})))
    return Counted(run, {name: counter.number for name, counter in calls.items()})


def killed(act: Callable[[], object]) -> bool:
    """Whether a forked process that does `act` is killed."""
    child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


@pytest.mark.parametrize("name", MOMENTS)
def test_kill_9_at_a_random_moment_and_a_resume_equal_a_whole_run(run: Run, counted: Counted, name: str, seed: int) -> None:
    at = random.Random(f"{seed}{name}").randint(1, counted.calls[name])
    run = saved_every_second_step(run)
    assert killed(lambda: train(run, At(3, lambda: Calls(pytest.MonkeyPatch(), name, kill_at=at))))
    assert resume(run) == DONE
    assert_same(counted.run, run)
    assert sorted(path.name for path in (where(run) / "checkpoints").iterdir()) == ["step-00000008", "step-00000010"]


def test_a_run_that_is_killed_before_its_first_checkpoint_begins_anew(run: Run) -> None:
    assert killed(lambda: train(run, At(3, lambda: send(signal.SIGKILL))))
    assert resume(run) == DONE
    assert [record.step for record in records(run)] == [*range(1, 11)]


def test_resuming_a_finished_run_changes_nothing(run: Run) -> None:
    train(run)
    before = (where(run) / "metrics.jsonl").read_bytes(), checkpoint(run)
    assert resume(run) == DONE
    after = checkpoint(run)
    assert (where(run) / "metrics.jsonl").read_bytes().startswith(before[0])
    assert len(records(run)) == 10
    assert before[1][1] == after[1]


@pytest.mark.usefixtures("quick")
def test_a_resume_tells_how_long_each_phase_took(run: Run) -> None:
    assert train(run, At(5, lambda: send(signal.SIGTERM))) == INTERRUPTED
    assert resume(run) == DONE
    (told,) = [event for event in read_events(where(run) / "metrics.jsonl") if isinstance(event, Resumed)]
    assert told.step == 5 and told.path.endswith("step-00000005")
    assert list(told.seconds) == ["imports", "data", "find", "build", "load", "step"]
    assert set(told.load_seconds) >= {"read", "verify", "place"} and "load" in told.text
    assert all(taken >= 0 for taken in (*told.seconds.values(), *told.load_seconds.values()))


def test_the_metrics_of_a_resumed_run_tell_one_history(run: Run) -> None:
    """Steps that were done after the newest checkpoint, and then again, stand there once."""
    run = replace(run, checkpoint=Checkpoint(every=4, background=False))
    assert killed(lambda: train(run, At(7, lambda: send(signal.SIGKILL))))
    assert [record.step for record in records(run)] == [1, 2, 3, 4, 5, 6, 7]
    resume(run)
    events = read_events(where(run) / "metrics.jsonl")
    assert [event.step for event in events if isinstance(event, Record)] == [*range(1, 11)]
    assert [event.step for event in events if isinstance(event, Saved)] == [4, 8, 10]
