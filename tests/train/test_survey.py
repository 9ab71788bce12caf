"""A rank built without memory: the parts, groups and bytes that training on that rank has, at any size of the layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist

from quintet.cost.memory import step_memory
from quintet.cost.shard import held
from quintet.parallel.mesh import make_mesh
from quintet.spec import parse
from quintet.spec.layout import Layout
from quintet.spec.placement import local_box
from quintet.train.build import build
from quintet.train.survey import HeldBytes, Holding, held_bytes, survey
from tests.parity.test_layouts import a_run
from tests.ranks import on_ranks

V3 = parse.read(Path(__file__).parents[2] / "recipes" / "v3-671b.toml")


def trained(layout: Layout, **changes: Any) -> list[tuple[dict[str, Any], HeldBytes]]:
    """The boxes and bytes of every rank that `build` made for training."""
    run = a_run(layout, **changes)

    def work(rank: int) -> tuple[dict[str, Any], HeldBytes]:
        built = build(run, make_mesh(layout), torch.device("cpu"), on_message=lambda text: None)
        boxes = {piece.name: piece.box for bucket in built.parameters.buckets for piece in bucket.pieces}
        return dict(sorted(boxes.items())), held_bytes(built.parameters, built.optimizer)

    return on_ranks(layout.num_ranks, work)


@pytest.mark.parametrize(
    ("layout", "changes"),
    [(Layout(dp=2, tp=2, ep=2, zero=3), {}), (Layout(cp=2, ep=2, zero=2), {"precision": "bf16", "moments": "bf16"}), (Layout(dp=2), {})],
    ids=str,
)
def test_every_rank_is_surveyed_as_it_is_built_for_training(layout: Layout, changes: dict[str, Any]) -> None:
    surveyed = [survey(a_run(layout, **changes), rank) for rank in range(layout.num_ranks)]
    assert [(holding.boxes, holding.bytes) for holding in surveyed] == trained(layout, **changes)
    assert all(holding.groups["dp"].ranks == layout.group_of(rank, "dp") for rank, holding in enumerate(surveyed))
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("layout", "rank"),
    [
        (Layout(dp=8, ep=8, zero=1), 7),
        (Layout(pp=4, dp=4, ep=4), 13),
        (Layout(pp=16, dp=128, ep=64, zero=1), 1027),
        (Layout(pp=16, dp=512, ep=64), 8191),
        (Layout(pp=8, dp=64, cp=2, tp=8, ep=32, expert_tp=8, zero=1, schedule="dualpipe"), 1025),
        (Layout(dp=64, cp=2, tp=8, ep=32, expert_tp=8, zero=3), 1021),
    ],
    ids=str,
)
def test_the_largest_model_is_built_at_the_largest_size_as_cost_says(layout: Layout, rank: int) -> None:
    found = survey(replace(V3, layout=layout), rank)
    at = layout.coordinates(rank)
    assert found.groups["world"].size == layout.num_ranks
    assert [found.groups[axis].size for axis in ("tp", "cp", "ep", "pp")] == [layout.tp, layout.cp, layout.ep, layout.pp]
    assert found.boxes == {name: local_box(name, box.shape, layout, rank) for name, box in found.boxes.items()}
    assert sum(torch.Size(box.sizes).numel() for box in found.boxes.values()) == held(V3.model, layout, place=at.pp).total.total()
    foretold = step_memory(V3.model, V3.train, sequence_length=4096, layout=layout, place=at.pp)
    told = HeldBytes(
        weights=foretold.weights, gradients=foretold.gradients, master=foretold.master_weights, moments=foretold.moments
    )
    for part in ("weights", "gradients", "master", "moments"):
        assert getattr(found.bytes, part) == pytest.approx(getattr(told, part), rel=1e-3), part  # padding of buckets


def test_stages_share_the_layers_out_and_only_the_embedding_lies_on_two() -> None:
    run = replace(V3, layout=Layout(pp=4, dp=4, ep=4, schedule="zb1p"))
    names = [set(survey(run, stage * 4).boxes) for stage in range(4)]
    everything = set.union(*names)
    assert everything == set(survey(replace(V3, layout=Layout()), 0).boxes)
    assert [name for name in everything if sum(name in some for some in names) > 1] == ["embed.weight"]
    assert {"head.weight", "norm.weight", "mtp.0.eh_proj.weight"} < names[3]


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_the_optimizers_state_is_divided_by_the_replicas(zero: Literal[1, 2, 3]) -> None:
    def state(layout: Layout) -> Holding:
        return survey(replace(V3, layout=layout), 0)

    alone = state(Layout()).bytes
    for dp in (2, 8):
        shared = state(Layout(dp=dp, zero=zero)).bytes
        assert shared.moments + shared.master == pytest.approx((alone.moments + alone.master) / dp, rel=1e-5)
