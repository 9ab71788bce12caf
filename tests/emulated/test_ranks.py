"""Training on the ranks of a layout, each with an emulated device, through an emulated NCCL, from meeting to checkpoint: what one device
computes on the CPU, with every message on the device, in an order that NCCL takes, and with few waits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from quintet.errors import DONE, RankError
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
from tests.train.runs import make_quick, records, tiny_run, train, where

STEPS = 2


@dataclass(frozen=True)
class Seen:
    """What a rank returned, and what it asked of its device and of NCCL."""

    code: int
    syncs: dict[str, int]
    on_host: dict[str, int]
    messages: dict[str, int]


def short_run(data: Data, directory: Path, layout: Layout, *, sequences: int = 4, **settings: Any) -> Run:
    """A few steps."""
    run = tiny_run(data, directory)
    (phase,) = run.phases
    return replace(
        run,
        layout=layout,
        model=replace(run.model, num_layers=3) if layout.pp == 1 else replace(run.model, num_layers=4),
        phases=(replace(phase, length=f"{STEPS} steps", batch=(str(sequences),)),),
        train=replace(run.train, **{"micro_batch": 2, "compile": False, **settings}),
    )


def on_devices(run: Run, *, resumed: Layout | None = None) -> list[Seen]:
    """Train, or resume on another layout, as the command does on each rank."""

    def work(rank: int) -> Seen:
        layout = resumed or run.layout
        with accelerated() as here, nccl(here), pytest.MonkeyPatch.context() as patch:
            make_quick(patch)
            device = machine.prepare(run.train)
            assert device.type == "cuda" and torch.cuda.current_device() == rank
            with (
                joined(layout, about={}, device=device, seconds=60) as ranks,
                Fanout([JsonLines(where(run) / "metrics.jsonl")] if ranks.is_lead else []) as sinks,
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
    ({"pp": 2, "dp": 2, "ep": 2, "schedule": "dualpipev"}, {"micro_batch": 1, "sequences": 8}),
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
    for each in seen:
        assert not each.on_host, "messages of training lie on the device"
        assert each.messages["all_reduce"] > 0
        waits = {place: count for place, count in each.syncs.items() if place.startswith(("parallel/", "train/step", "model/", "ops/"))}
        dispatches = waits.pop("parallel/expert.py:prepare _to_copy", 0)
        assert waits == {"train/step.py:accumulate _to_copy": STEPS, "train/step.py:update _to_copy": STEPS}
        assert bool(dispatches) == (layout.ep > 1 or layout.expert_tp > 1)
