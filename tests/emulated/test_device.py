"""The whole path of one device on the stand-in for CUDA: model, step, run, checkpoint, resume, evaluation, generation, in what it computes
and in how often the host waits."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quintet.cli.generate import main as generate_command
from quintet.errors import DONE, INTERRUPTED
from quintet.evaluate.perplexity import evaluate
from quintet.model.generate import generate
from quintet.spec.run import Data, Run
from quintet.train import device as machine
from quintet.train.trained import open_trained
from tests.accelerator import Accelerator, accelerated
from tests.checkpoint.models import like_small
from tests.model.build import build, gradients, loss_of, some_tokens
from tests.train.runs import At, assert_same, make_quick, records, resume, send, tiny_run, train, where

ALIGNED = like_small(hidden_size=32, expert_ffn_size=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator]:
    """One device."""
    make_quick(monkeypatch)
    with accelerated() as one:
        yield one


def run_on(data: Data, directory: Path, device: str, *, steps: int = 4, **settings: Any) -> Run:
    """A few steps."""
    run = tiny_run(data, directory)
    (phase,) = run.phases
    phase = replace(phase, length=f"{steps} steps")
    return replace(run, phases=(phase,), train=replace(run.train, **{"device": device, "compile": False, **settings}))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("changes", "documents"),
    [({}, True), ({"capacity_factor": 1.1}, False), ({"q_lora_rank": None, "num_shared_experts": 0}, False)],
    ids=["documents", "capacity", "plain"],
)
def test_a_model_computes_what_the_cpu_does_and_the_host_waits_for_nothing(
    here: Accelerator, recompute: Any, changes: dict[str, Any], documents: bool
) -> None:
    model, tokens = like_small(**changes), some_tokens(like_small(), 2, 17)
    ids = torch.arange(16).expand(2, -1) // 5 if documents else None
    ours, theirs = build(model).to("cuda"), build(model)
    ours.set_recompute(recompute)
    expected = loss_of(theirs, tokens[:, :-1], tokens[:, 1:], document_ids=ids)
    inputs, labels, targets = tokens[:, :-1].to("cuda"), tokens[:, 1:].to("cuda"), [30] * (model.num_mtp_modules + 1)
    on_device = None if ids is None else ids.to("cuda")
    here.forget()
    loss = loss_of(ours, inputs, labels, document_ids=on_device, num_targets=targets)
    found = gradients(ours, loss.total)
    assert not here.syncs and not here.uploads, "one micro-batch is queued while the device computes"
    expected = loss_of(theirs, tokens[:, :-1], tokens[:, 1:], document_ids=ids, num_targets=targets)
    assert loss.total.item() == pytest.approx(expected.total.item(), rel=1e-5)
    for name, gradient in gradients(theirs, expected.total).items():
        assert found[name].is_cuda
        assert (found[name].cpu() - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


def test_grouped_products_in_bf16_keep_the_strides_that_cudas_kernel_takes(here: Accelerator) -> None:
    net, tokens = build(ALIGNED, dtype=torch.bfloat16).to("cuda"), some_tokens(ALIGNED, 4, 49).to("cuda")
    here.forget()
    loss = loss_of(net, tokens[:, :-1], tokens[:, 1:], num_targets=[192, 188])
    assert all(gradient.isfinite().all() for gradient in gradients(net, loss.total).values())
    assert not [place for place in here.syncs if place.startswith(("ops/", "model/"))], "no product fell back to the loop"


def test_a_run_stops_and_resumes_to_the_same_bits_with_two_waits_a_step(here: Accelerator, data: Data, tmp_path: Path) -> None:
    whole, stopped, cpu = (run_on(data, tmp_path / name, device) for name, device in (("a", "cuda"), ("b", "cuda"), ("c", "cpu")))
    torch.manual_seed(whole.seed)
    seeded = torch.cuda.get_rng_state()
    assert train(whole) == DONE
    assert torch.equal(torch.cuda.get_rng_state(), seeded), "training draws nothing on a device"
    waits = {place: count for place, count in here.syncs.items() if not place.startswith(("checkpoint/", "train/held_out"))}
    assert waits == {
        "train/step.py:accumulate _to_copy": 4,
        "train/step.py:update _to_copy": 4,
        "train/device.py:synchronize synchronize": 8,
    }
    assert train(stopped, At(2, lambda: send(signal.SIGTERM))) == INTERRUPTED
    assert resume(stopped) == DONE
    assert_same(whole, stopped)
    assert train(cpu) == DONE
    assert [record.loss for record in records(whole)] == pytest.approx([record.loss for record in records(cpu)], rel=1e-5)


def test_a_checkpoint_moves_between_cpu_and_device(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)
    begun, whole = (run_on(data, tmp_path / name, "auto") for name in ("begun", "whole"))
    assert train(whole) == train(begun, At(2, lambda: send(signal.SIGTERM))) - INTERRUPTED == DONE
    with accelerated():
        assert machine.prepare(begun.train).type == "cuda", "auto takes the device where there is one"
        assert resume(begun, At(3, lambda: send(signal.SIGTERM))) == INTERRUPTED
    assert resume(begun) == DONE
    assert [record.loss for record in records(begun)] == pytest.approx([record.loss for record in records(whole)], rel=1e-5)


def test_saves_beside_training_copy_the_device_into_pinned_memory(here: Accelerator, data: Data, tmp_path: Path) -> None:
    run = run_on(data, tmp_path, "cuda", precision="bf16")
    run = replace(run, checkpoint=replace(run.checkpoint, every=1, background=True))
    assert train(run) == DONE
    assert here.pinned > 0 and here.syncs["checkpoint/background.py:__init__ copy_"] >= here.pinned


def test_a_trained_model_is_evaluated_and_generates_on_the_device(
    here: Accelerator, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_on(data, tmp_path, "cuda")
    assert train(run) == DONE
    here.forget()
    found = evaluate(where(run))
    assert 0 < found.losses["code"] < 7
    assert here.syncs == {"train/held_out.py:held_out_loss _to_copy": 2}, "once for each source"
    trained = open_trained(where(run))
    prompt = torch.tensor([5, 6, 7], device="cuda")
    here.forget()
    drawn = [*generate(trained.model, prompt, num_tokens=5, generator=torch.Generator("cuda").manual_seed(0))]
    assert len(drawn) == 5 and here.syncs.total() == 1 + 2 * 5, "for the prompt, and twice for each token"
    assert generate_command([str(where(run)), "--prompt", "def", "--tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("def")
