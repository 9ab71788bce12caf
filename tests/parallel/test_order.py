"""Every rank of a process group asks for the same messages in the same order: NCCL hangs otherwise, though gloo would forgive it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from quintet.parallel import collectives
from quintet.parallel.mesh import make_mesh
from quintet.spec.layout import Layout
from quintet.train.build import build
from quintet.train.step import run_step
from tests.parity.test_layouts import CPU, a_run, batches, settings_of
from tests.ranks import on_ranks

CASES: list[tuple[Layout, dict[str, Any]]] = [
    (Layout(pp=2, dp=2, ep=2, zero=1), {"num_layers": 4, "micro_batch": 1, "sequences": 9}),
    (Layout(pp=2, cp=2, ep=2, zero=1, schedule="dualpipe"), {"micro_batch": 1, "document_mask": True}),
    (Layout(dp=2, tp=2, ep=2, expert_tp=2, zero=3), {"recompute": "full"}),
]

Asked = dict[str, list[tuple[object, ...]]]


def asked(layout: Layout, changes: dict[str, Any]) -> Asked:
    """By process group: each collective that this rank asked for in a step, and by pair of ranks each message."""
    run = a_run(layout, **changes)
    mesh, found = make_mesh(layout), defaultdict[str, list[tuple[object, ...]]](list)
    built = build(run, mesh, CPU, on_message=lambda text: None)

    def noted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def note(tensor: Tensor, *rest: Any, group: dist.ProcessGroup, **named: Any) -> Any:
            # Of an uneven all-to-all ranks have different parts.
            found[group.group_name].append((name, tensor.dtype, None if name == "all_to_all" else tensor.numel()))
            return call(tensor, *rest, group=group, **named)

        return note

    def batch(operations: list[dist.P2POp]) -> Any:
        for each in operations:
            kind, ends = ("send", (dist.get_rank(), each.peer)) if each.op is dist.isend else ("receive", (each.peer, dist.get_rank()))
            found[f"{each.group.group_name} {kind} {ends}"].append((each.tensor.dtype, each.tensor.shape))
        found[each.group.group_name].append(("batch",))
        return exchange(operations)

    exchange = dist.batch_isend_irecv
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", noted("all_reduce", dist.all_reduce))
        patch.setattr(dist, "all_to_all_single", noted("all_to_all", dist.all_to_all_single))
        patch.setattr(collectives, "_all_gather_single", noted("all_gather", collectives._all_gather_single))
        patch.setattr(dist, "batch_isend_irecv", batch)
        (whole,) = batches(run, count=1)
        own = whole.rows(slice(mesh.at.dp, None, layout.dp))
        run_step(built, own, settings=settings_of(run), train=run.train, document_mask=run.data.document_mask, step=1)
        built.parameters.finish_gathering()
    return dict(found)


@pytest.mark.parametrize(("layout", "changes"), CASES, ids=lambda value: str(value) if isinstance(value, Layout) else ",".join(value))
def test_all_ranks_of_a_group_ask_for_the_same_in_the_same_order(layout: Layout, changes: dict[str, Any]) -> None:
    found = on_ranks(layout.num_ranks, lambda rank: asked(layout, changes))
    names = {name for rank in found for name in rank if " " not in name}
    assert len(names) > 1
    for name in names:
        first, *others = [rank[name] for rank in found if name in rank]
        collective = [[each for each in order if each != ("batch",)] for order in (first, *others)]
        assert others and all(order == collective[0] for order in collective[1:]), name
    sent = {name.replace(" send ", " "): order for rank in found for name, order in rank.items() if " send " in name}
    received = {name.replace(" receive ", " "): order for rank in found for name, order in rank.items() if " receive " in name}
    assert sent == received and bool(sent) == (layout.pp > 1)
