"""What the ranks of any layout save, the ranks of any other find, bit for bit: random models and pairs of layouts of up to 16 ranks."""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quintet.checkpoint import hub_names
from quintet.checkpoint.load import load, verify
from quintet.checkpoint.pieces import Pieces
from quintet.checkpoint.save import save
from quintet.spec.layout import Layout
from quintet.spec.run import Run
from tests.checkpoint.states import same_bits
from tests.parity.test_layouts import a_run
from tests.spec.strategies import layouts, models


@pytest.fixture(scope="module")
def benchmark() -> Any:
    """benchmarks/checkpoint.py, which knows what a rank holds without building it."""
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    import checkpoint

    yield checkpoint
    sys.path.remove(folder)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Run, Layout, Layout]:
    model = draw(models(largest=8))
    small = layouts(model, [16]).filter(lambda layout: layout.num_ranks <= 16)
    run = a_run(Layout())
    object.__setattr__(run, "model", model)  # a run whose data do not matter
    return run, draw(small), draw(small)


def held_by(benchmark: ModuleType, run: Run, layout: Layout, ranks: list[int]) -> list[dict[str, Any]]:
    """Each rank's boxes of each tensor."""
    object.__setattr__(run, "layout", layout)
    peers = benchmark.peers_of(layout)
    return [benchmark.boxes_of(run, rank, peers) for rank in ranks]


def cut(whole: torch.Tensor, boxes: list[Any]) -> Pieces:
    """Copies of the boxes of a tensor."""
    parts = [(at, whole[tuple(slice(a, a + n) for a, n in zip(at, sizes, strict=True))].clone()) for at, sizes in boxes]
    return Pieces(whole.shape, parts, dtype=whole.dtype)


@settings(max_examples=20)
@given(pairs(), st.randoms(use_true_random=False))
def test_any_layout_finds_what_any_other_saved(benchmark: ModuleType, pair: tuple[Run, Layout, Layout], chance: Any) -> None:
    run, one, two = pair
    generator = torch.Generator().manual_seed(chance.randrange(2**31))
    shapes = {name: shape for name, shape in hub_names.shapes(run.model).items() if not name.endswith("expert_bias") and math.prod(shape)}
    wholes = {f"optimizer.master.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    rounded = {name.replace("optimizer.master", "model"): name for name in wholes}
    saved: dict[str, list[Any]] = {}
    for mine in held_by(benchmark, run, one, [*range(one.num_ranks)]):
        for name, boxes in mine.items():
            saved.setdefault(name, []).extend(boxes)
    state: dict[str, Any] = {name: cut(whole, saved[name.removeprefix("optimizer.master.")]) for name, whole in wholes.items()}
    state |= {name: cut(wholes[source].bfloat16(), saved[name.removeprefix("model.")]) for name, source in rounded.items()}
    with tempfile.TemporaryDirectory() as root:
        directory = save(state, Path(root), step=1, rounded=rounded)
        tensors = verify(directory).tensors
        assert all(tensors[name].pieces == () for name in rounded)
        for mine in held_by(benchmark, run, two, chance.sample(range(two.num_ranks), min(two.num_ranks, 3))):
            held = {name: boxes for name, boxes in mine.items() if name in shapes}
            target = {f"optimizer.master.{name}": cut(torch.zeros(shapes[name]), boxes) for name, boxes in held.items()}
            target |= {f"model.{name}": cut(torch.zeros(shapes[name]).bfloat16(), boxes) for name, boxes in held.items()}
            load(target, directory, strict=False)
            for name, found in target.items():
                whole = wholes[rounded.get(name, name)].to(found.dtype)
                expected = cut(whole, [(at, part.shape) for at, part in found.boxes.items()]).boxes
                assert all(same_bits(part, expected[at]) for at, part in found.boxes.items())
