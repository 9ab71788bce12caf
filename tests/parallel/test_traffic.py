"""The bytes of a step along each axis are those that the cost model foretells, to the byte; so are ZeRO's buckets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quintet.cost.expert_comm import mean_rows
from quintet.cost.traffic import Rows, step_traffic
from quintet.cost.zero_comm import bucket_sizes, num_replicas
from quintet.model.transformer import Transformer
from quintet.parallel.collectives import Group
from quintet.parallel.mesh import Mesh, make_mesh
from quintet.parallel.zero import ShardedParameters
from quintet.spec.layout import GROUPS, Layout
from quintet.spec.model import Model
from quintet.spec.placement import holders
from quintet.spec.run import Run
from quintet.train.build import build
from quintet.train.step import accumulate, update
from tests.parallel.rows import rows_between, rows_noted
from tests.parity.test_layouts import CPU, LENGTH, a_run, batches, settings_of
from tests.ranks import on_ranks
from tests.spec.strategies import layouts, models


@dataclass(frozen=True)
class Seen:
    """Of one rank and step: bytes by axis, and the rows that it had for each rank of ep."""

    sent: Mapping[str, int]
    rows: Sequence[int]


def a_step(run: Run, *, mtp: bool) -> Seen:
    """The first step of a run; every later one sends as much, but for chance. Without MTP the second one: at stage 3 the first gathers the
    last norms of modules that do not run, once and for all."""
    mesh = make_mesh(run.layout)
    built, now = build(run, mesh, CPU, on_message=lambda text: None), replace(settings_of(run), mtp_weight=0.3 if mtp else 0.0)
    rows = slice(mesh.at.dp, None, mesh.layout.dp)
    for step, batch in enumerate(batches(run, count=1 if mtp else 2), 1):
        before = {axis: group.traffic.num_bytes for axis, group in mesh.groups.items()}
        own = batch.rows(rows)
        with rows_noted() as noted:
            sums, load = accumulate(built, own, settings=now, train=run.train, document_mask=run.data.document_mask)
        update(built, sums, load, settings=now, step=step)
    times = 2 if run.train.recompute == "full" else 1  # recomputation notes the same rows again
    rows = [sum(to) // times for to in zip(*noted, strict=True)]
    return Seen({axis: group.traffic.num_bytes - before[axis] for axis, group in mesh.groups.items()}, rows)


def foretold(run: Run, rank: int, *, mtp: bool, rows: Rows | None) -> dict[str, float]:
    """What the cost model says of that step."""
    return step_traffic(
        run.model,
        run.train,
        run.layout,
        sequence_length=LENGTH,
        batch_sequences=settings_of(run).batch_sequences,
        mtp=mtp,
        rank=rank,
        rows=rows,
    )


def rows_of(layout: Layout, rank: int, seen: list[Seen]) -> Rows:
    """The rows that a rank exchanged."""
    noted = [each.rows for each in seen]
    return rows_between(layout, rank, noted) if noted[0] else Rows(out=0, into=0)


MTP, NO_MTP = True, False
RUNS: dict[int, list[tuple[Layout, bool, dict[str, Any]]]] = {
    2: [
        (Layout(dp=2), MTP, {"precision": "bf16", "micro_batch": 1}),
        (Layout(dp=2, zero=1), MTP, {"precision": "bf16", "num_dense_layers": 3, "num_mtp_modules": 0}),
        (Layout(dp=2, zero=2), MTP, {"micro_batch": 1}),
        (Layout(dp=2, zero=3), MTP, {"recompute": "full"}),
        (Layout(dp=2, zero=3), NO_MTP, {"precision": "bf16"}),
        (Layout(tp=2), MTP, {"recompute": "selective", "tie_embeddings": True}),
        (Layout(tp=2, expert_tp=2), MTP, {"recompute": "full", "q_lora_rank": None, "num_shared_experts": 0}),
        (Layout(cp=2), MTP, {"document_mask": True, "recompute": "full", "num_mtp_modules": 2}),
        (Layout(cp=2, ep=2), MTP, {"precision": "bf16"}),
        (Layout(dp=2, ep=2), NO_MTP, {"micro_batch": 1}),
        (Layout(pp=2, schedule="1f1b"), MTP, {"tie_embeddings": True, "micro_batch": 1}),
        (Layout(pp=2, schedule="interleaved", zero=1), MTP, {"num_layers": 4, "num_mtp_modules": 0, "precision": "bf16"}),
        (Layout(pp=2, schedule="zbv"), NO_MTP, {"num_layers": 5, "recompute": "full"}),
        (Layout(pp=2, schedule="dualpipe", zero=1), MTP, {"micro_batch": 1}),
    ],
    4: [
        (Layout(dp=4, zero=1, zero_ranks=2), MTP, {}),
        (Layout(dp=4, ep=4, zero=2, zero_ranks=2), MTP, {"micro_batch": 1}),
        (Layout(dp=4, ep=2, zero=3), MTP, {"precision": "bf16", "recompute": "full"}),
        (Layout(dp=2, tp=2, ep=2, expert_tp=2, zero=1), MTP, {"recompute": "full"}),
        (Layout(dp=2, cp=2, ep=4, zero=2), NO_MTP, {"recompute": "selective"}),
        (Layout(tp=2, cp=2, zero=1), MTP, {"document_mask": True, "precision": "bf16"}),
        (Layout(pp=2, tp=2, zero=1, schedule="zb1p"), MTP, {"num_dense_layers": 2, "recompute": "selective"}),
        (Layout(pp=2, tp=2, expert_tp=2, zero=1), MTP, {"num_layers": 4, "recompute": "full", "sequences": 4}),
        (Layout(pp=2, cp=2, ep=2, schedule="dualpipe", zero=1), MTP, {"micro_batch": 1, "document_mask": True}),
        (Layout(pp=2, dp=2, ep=2, zero=1), MTP, {"num_layers": 4, "micro_batch": 1, "sequences": 9}),
        (Layout(pp=4, schedule="1f1b", cut=(2, 1, 3, 0)), MTP, {"num_layers": 6, "precision": "bf16"}),
    ],
    8: [(Layout(dp=2, tp=2, cp=2, ep=4, zero=3), MTP, {"precision": "bf16", "document_mask": True})],
}


@pytest.mark.parametrize("count", RUNS)
def test_every_rank_sends_the_bytes_foretold_along_every_axis(count: int) -> None:
    cases = [(a_run(layout, **changes), mtp) for layout, mtp, changes in RUNS[count]]
    a_step(a_run(Layout(), recompute="full"), mtp=False)  # what recomputation imports, the children inherit
    found = on_ranks(count, lambda rank: [a_step(run, mtp=mtp) for run, mtp in cases])
    for index, (run, mtp) in enumerate(cases):
        seen = [by_rank[index] for by_rank in found]
        for rank in range(count):
            assert foretold(run, rank, mtp=mtp, rows=rows_of(run.layout, rank, seen)) == seen[rank].sent, (run.layout, rank)


def test_without_counted_rows_the_mean_is_foretold() -> None:
    layout = Layout(dp=4, ep=4)
    run = a_run(layout, num_mtp_modules=2)
    found = on_ranks(4, lambda rank: a_step(run, mtp=True))
    # Rows of all ranks; which ranks' experts are chosen is chance, but not by much.
    own = [rows_of(layout, rank, found) for rank in range(4)]
    tokens = settings_of(run).batch_sequences * LENGTH
    sent, mean = sum(rows.out for rows in own), 4 * mean_rows(run.model, layout, tokens=tokens)
    assert sent == sum(rows.into for rows in own)
    assert sent == pytest.approx(mean, rel=0.1)
    said = sum(foretold(run, rank, mtp=True, rows=None)["ep"] for rank in range(4))
    assert said == pytest.approx(sum(seen.sent["ep"] for seen in found), rel=0.1)


def without_processes(layout: Layout) -> Mesh:
    """Rank 0 of a layout: its groups have their sizes, and nobody to talk to."""
    return Mesh(layout, 0, {axis: Group(axis, layout.group_of(0, axis), 0) for axis in GROUPS})


@settings(max_examples=15, deadline=None)
@given(models(largest=12), st.data())
def test_buckets_are_those_that_zero_makes(model: Model, data: st.DataObject) -> None:
    layout = data.draw(layouts(model, [48]).filter(lambda layout: layout.pp == 1 and layout.num_ranks <= 24))
    numel = data.draw(st.sampled_from([1, 300, 5_000, 10**9]))
    with torch.device("meta"):
        net = Transformer(model)
    names = {name: holders(name, layout, model) for name, _ in net.named_parameters()}
    made = ShardedParameters(net, without_processes(layout), dtype=torch.float32, device=torch.device("meta"), closed_at=numel)
    expected = [
        (names[bucket.pieces[0].name], bucket.numel, is_mtp, bucket.shard.size, bucket.replicate.size)
        for bucket, is_mtp in zip(made.buckets, made.is_mtp, strict=True)
    ]
    found = bucket_sizes(model, layout, closed_at=numel)
    shards = [len(layout.group_of(0, f"{bucket.holders}.shard")) for bucket in found]
    assert [
        (bucket.holders, bucket.numel, bucket.mtp, size, num_replicas(layout, bucket.holders))
        for bucket, size in zip(found, shards, strict=True)
    ] == expected
