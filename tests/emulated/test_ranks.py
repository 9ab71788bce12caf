"""Training on the ranks of a layout, each with an emulated device, through an emulated NCCL, from meeting to checkpoint: what one device
computes on the CPU, with every message on the device, in an order that NCCL takes, and with few waits."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from quintet.errors import DONE, INTERRUPTED
from quintet.monitor.metrics import Message, read_events
from quintet.monitor.sinks import Fanout, JsonLines
from quintet.parallel import collectives
from quintet.parallel.collectives import Group
from quintet.parallel.rendezvous import joined
from quintet.spec.layout import Layout
from quintet.spec.run import Data, Run
from quintet.train import device as machine
from quintet.train import trainer
from tests.accelerator import DeviceMix, accelerated, nccl
from tests.ranks import on_ranks
from tests.train.runs import At, make_quick, records, send, tiny_run, train, where

STEPS = 2


@dataclass(frozen=True)
class Seen:
    """What a rank returned, and what it asked of its device and of NCCL."""

    code: int
    syncs: dict[str, int]
    on_host: dict[str, int]
    messages: dict[str, int]


def short_run(data: Data, directory: Path, layout: Layout, *, sequences: int = 4, steps: int = STEPS, **settings: Any) -> Run:
    """A few steps."""
    run = tiny_run(data, directory)
    (phase,) = run.phases
    return replace(
        run,
        layout=layout,
        model=replace(run.model, num_layers=3) if layout.pp == 1 else replace(run.model, num_layers=4),
        phases=(replace(phase, length=f"{steps} steps", batch=(str(sequences),)),),
        train=replace(run.train, **{"micro_batch": 2, "compile": False, **settings}),
    )


def on_devices(run: Run, *, resumed: Layout | None = None, steps: int | None = None) -> list[Seen]:
    """Train, up to a signal behind so many `steps`, or resume on another layout, as the command does on each rank."""

    stop = [] if steps is None else [At(steps, lambda: send(signal.SIGTERM))]

    def work(rank: int) -> Seen:
        layout = resumed or run.layout
        with accelerated() as here, nccl(here), pytest.MonkeyPatch.context() as patch:
            make_quick(patch)
            device = machine.prepare(run.train)
            assert device.type == "cuda" and torch.cuda.current_device() == rank
            with (
                joined(layout, about={}, device=device, seconds=60) as ranks,
                Fanout([JsonLines(where(run) / "metrics.jsonl"), *stop] if ranks.is_lead else []) as sinks,
            ):
                here.forget()
                resume = resumed is not None
                code = trainer.resume(where(run), sinks=sinks, ranks=ranks, layout=layout) if resume else None
                code = trainer.train(run, sinks=sinks, ranks=ranks) if code is None else code
            return Seen(code, dict(here.syncs), dict(here.host_messages), dict(here.num_messages))

    count = (resumed or run.layout).num_ranks
    return on_ranks(count, work, joined=False, seconds=200)


CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"dp": 2, "zero": 0}, {}),
    ({"dp": 2, "ep": 2, "zero": 3}, {"recompute": "full"}),
    ({"tp": 2, "ep": 2, "expert_tp": 2, "dp": 2, "zero": 1}, {}),
    ({"cp": 2, "zero": 2}, {"recompute": "selective"}),
    ({"pp": 2, "dp": 2, "ep": 2, "schedule": "dualpipev"}, {"micro_batch": 1, "sequences": 8, "adaptive": True}),
]


@pytest.mark.parametrize(("degrees", "settings"), CASES, ids=lambda each: " ".join(f"{k}={v}" for k, v in each.items()))
def test_a_layout_on_devices_computes_what_one_cpu_does(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, degrees: dict[str, Any], settings: dict[str, Any]
) -> None:
    make_quick(monkeypatch)
    layout = Layout(**degrees)
    run = short_run(data, tmp_path / "devices", layout, device="cuda", **settings)
    alone = short_run(data, tmp_path / "cpu", Layout(), device="cpu", sequences=settings.get("sequences", 4))
    alone = replace(alone, model=run.model)
    assert train(alone) == DONE
    seen = on_devices(run)
    assert [each.code for each in seen] == [DONE] * layout.num_ranks
    ours, theirs = records(run), records(alone)
    assert [record.step for record in ours] == [*range(1, STEPS + 1)]
    for our, their in zip(ours, theirs, strict=True):
        assert our.loss == pytest.approx(their.loss, rel=2e-5) and our.grad_norm == pytest.approx(their.grad_norm, rel=1e-3)
    told = [event.text for event in read_events(where(run) / "metrics.jsonl") if isinstance(event, Message)]
    assert any("no effect on CUDA" in text for text in told) == ("adaptive" in settings)
    for each in seen:
        assert not each.on_host, "messages of training lie on the device"
        assert each.messages["all_reduce"] > 0
        waits = {place: count for place, count in each.syncs.items() if place.startswith(("parallel/", "train/step", "model/", "ops/"))}
        dispatches = waits.pop("parallel/expert.py:prepare _to_copy", 0)
        assert waits == {"train/step.py:accumulate _to_copy": STEPS, "train/step.py:update _to_copy": STEPS}
        assert bool(dispatches) == (layout.ep > 1 or layout.expert_tp > 1)


def test_a_run_on_devices_resumes_on_another_layout_of_devices(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)
    run = short_run(data, tmp_path / "devices", Layout(dp=2, ep=2, zero=3), device="cuda", steps=3)
    alone = short_run(data, tmp_path / "cpu", Layout(), device="cpu", steps=3)
    assert train(alone) == DONE
    assert {each.code for each in on_devices(run, steps=1)} == {INTERRUPTED}
    assert {each.code for each in on_devices(run, resumed=Layout(tp=2))} == {DONE}
    assert [record.loss for record in records(run)] == pytest.approx([record.loss for record in records(alone)], rel=2e-5)


def group_of(rank: int) -> Group:
    """The two ranks of a test."""
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"tcp://127.0.0.1:{os.environ['MASTER_PORT']}", rank=rank, world_size=2)
    dist.barrier()  # one that is refused at once leaves before the other has come
    torch.cuda.set_device(rank)
    return Group("dp", (0, 1), rank, dist.group.WORLD)


def refused(mistake: Callable[[Group], object]) -> list[str]:
    """What each of two ranks is told."""

    def work(rank: int) -> str:
        with accelerated() as here, nccl(here, seconds=3):
            group = group_of(rank)
            with pytest.raises((DeviceMix, RuntimeError)) as told:
                mistake(group)
            return str(told.value)

    return on_ranks(2, work, joined=False, seconds=60)


def changed_under_way(group: Group) -> None:
    sent = torch.ones(4, device="cuda")
    pending = collectives.start_all_gather(sent, torch.empty(8, device="cuda"), group)
    sent.add_(1)
    pending.wait()


def in_different_orders(group: Group) -> None:
    """Gloo takes this: each rank sends before it receives, in messages of their own."""
    peer = 1 - group.rank
    for action in (dist.isend, dist.irecv):
        (work,) = dist.batch_isend_irecv([dist.P2POp(action, torch.ones(1 << 20, device="cuda"), peer, group.process_group)])
    work.wait()


def of_the_first_device(group: Group) -> None:
    torch.cuda.set_device(1 - group.rank)
    collectives.all_reduce(torch.ones(2, device="cuda"), group)


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        (lambda group: dist.batch_isend_irecv([dist.P2POp(dist.isend, torch.ones(2), 1 - group.rank, group.process_group)]), "on cpu"),
        (lambda group: collectives.all_to_all(torch.ones(2, device="cuda").to(torch.int16), group, send=[1, 1], receive=[1, 1]), "int16"),
        (changed_under_way, "changed before it was waited for"),
        (of_the_first_device, "set_device comes before"),
    ],
    ids=["host", "type", "changed", "device"],
)
def test_what_nccl_would_refuse_or_spoil_is_found(mistake: Callable[[Group], object], told: str) -> None:
    assert all(told in each for each in refused(mistake))


def test_ranks_that_ask_in_different_orders_hang_as_with_nccl() -> None:
    assert all("different orders" in told for told in refused(in_different_orders))
