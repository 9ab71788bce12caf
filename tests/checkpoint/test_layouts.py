"""A checkpoint of any layout loads into any other, bit for bit, and training goes on as if it had never moved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quintet.checkpoint.load import load, read_manifest
from quintet.checkpoint.save import save
from quintet.data.loader import Batch
from quintet.parallel.mesh import make_mesh
from quintet.spec.curriculum import Settings
from quintet.spec.layout import Layout
from quintet.spec.run import Run
from quintet.train import state
from quintet.train.build import build
from quintet.train.state import Position
from quintet.train.step import run_step
from tests.parity.test_layouts import a_run, batches, settings_of
from tests.ranks import on_ranks

CPU = torch.device("cpu")


def settings_at(step: int, run: Run) -> Settings:
    """MTP modules join in the third step, so that their updates count differently."""
    return settings_of(run) if step >= 3 else replace(settings_of(run), mtp_weight=0.0)


def rows_of(batch: Batch, run: Run, rank: int) -> Batch:
    return batch.rows(slice(run.layout.coordinates(rank).dp, None, run.layout.dp))


def stretch(run: Run, root: Path, *, begin: int, end: int, copy: Path | None = None) -> None:
    """On the ranks of the run's layout: from the checkpoint of step `begin` (0: from nothing) to that of `end`, both under `root`.
    `copy` is where to save what was loaded."""

    def work(rank: int) -> None:
        built = build(run, make_mesh(run.layout), CPU, on_message=lambda text: None)
        if begin:
            position, data = state.restore(root / f"step-{begin:08}", built)
            assert (position.step, data) == (begin, {"place": begin})
            if copy is not None:
                gathered = state.gather(built, data, position)
                save(gathered, copy, step=begin, rounded=state.rounded(gathered), codec="raw")
        for step, batch in enumerate(batches(run, count=end)[begin:], begin + 1):
            run_step(built, rows_of(batch, run, rank), settings=settings_at(step, run), train=run.train, document_mask=False, step=step)
        gathered = state.gather(built, {"place": end}, Position(step=end))
        save(gathered, root, step=end, rounded=state.rounded(gathered))

    on_ranks(run.layout.num_ranks, work)


def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every tensor and plain value of a checkpoint."""
    tensors = {name: torch.empty(t.shape, dtype=getattr(torch, t.dtype)) for name, t in read_manifest(path).tensors.items()}
    return tensors, load(tensors, path)


def assert_equal(one: Path, two: Path) -> None:
    """Two checkpoints hold the same bits."""
    (tensors, values), (others, other_values) = contents(one), contents(two)
    assert values == other_values
    assert tensors.keys() == others.keys()
    assert [name for name, tensor in tensors.items() if not torch.equal(tensor.view(torch.uint8), others[name].view(torch.uint8))] == []


def assert_close(one: Path, two: Path, *, of: str, tolerance: float) -> None:
    """Two checkpoints hold the same values, up to rounding in tensors whose names begin with `of`: the norm of the difference over the
    norm."""
    (tensors, values), (others, other_values) = contents(one), contents(two)
    assert values == other_values and tensors.keys() == others.keys()
    named = {name: (t.double(), others[name].double()) for name, t in tensors.items() if name.startswith(of)}
    errors = {name: float((t - other).norm() / t.norm().clamp(min=1e-9)) for name, (t, other) in named.items()}
    assert errors and {name: error for name, error in errors.items() if error > tolerance} == {}


CHAINS: list[tuple[tuple[Layout, ...], dict[str, Any]]] = [
    (
        (
            Layout(dp=2, zero=1),
            Layout(),
            Layout(tp=2),
            Layout(cp=2, ep=2),
            Layout(dp=4, ep=4, zero=3),
            Layout(dp=2, tp=2, zero=2),
            Layout(dp=4, ep=2, zero=3, zero_ranks=2),
        ),
        {},
    ),
    (
        (Layout(dp=3, zero=3), Layout(tp=2, expert_tp=2), Layout(dp=2, tp=2, ep=2, expert_tp=2, zero=1), Layout(dp=2, cp=2, ep=4, zero=2)),
        {"tie_embeddings": True, "num_mtp_modules": 2, "moments": "bf16"},
    ),
    ((Layout(dp=2, zero=3), Layout(dp=2), Layout(tp=2, cp=2, zero=1), Layout(dp=2, ep=2, zero=3)), {"precision": "bf16"}),
    (
        (
            Layout(pp=2, schedule="1f1b"),
            Layout(dp=2, zero=3),
            Layout(pp=2, dp=2, ep=2, zero=1, schedule="dualpipe"),
            Layout(pp=3, schedule="zb1p"),
            Layout(),
            Layout(pp=2, tp=2, zero=1, schedule="interleaved"),
        ),
        {"num_layers": 4, "sequences": 9, "micro_batch": 1, "tie_embeddings": True},
    ),
]


@pytest.mark.parametrize(("layouts", "changes"), CHAINS, ids=["fp32", "tied", "bf16", "pipelines"])
def test_a_run_moves_from_layout_to_layout(layouts: tuple[Layout, ...], changes: dict[str, Any], tmp_path: Path) -> None:
    alone, moved = tmp_path / "alone", tmp_path / "moved"
    for step, layout in enumerate(layouts):
        copy = tmp_path / f"copy-{step}"
        stretch(a_run(layout, **changes), moved, begin=step, end=step + 1, copy=copy)
        if step:
            assert_equal(moved / f"step-{step:08}", copy / f"step-{step:08}")
        saved = read_manifest(moved / f"step-{step + 1:08}").tensors
        stored = {name for name, tensor in saved.items() if name.startswith("model.") and tensor.pieces}
        if changes.get("precision") == "bf16":  # all weights are their masters' rounding, and only the routers' biases are stored
            assert stored == {name for name in saved if name.endswith("expert_bias")}
    stretch(a_run(Layout(), **changes), alone, begin=0, end=len(layouts))
    last = f"step-{len(layouts):08}"
    if changes.get("precision") == "bf16":  # rounding chooses other experts now and then, which moments and biases show
        assert_close(alone / last, moved / last, of="optimizer.master.", tolerance=5e-2)
    else:
        assert_close(alone / last, moved / last, of="", tolerance=2e-3)
