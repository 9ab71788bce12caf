"""The process groups of a rank: shared where they may be, apart where one message would wait for another, and met when they are made."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from quintet.parallel.mesh import make_mesh
from quintet.spec.layout import Layout
from tests.ranks import on_ranks


def made(layout: Layout) -> tuple[dict[str, int], int, int]:
    """Axis -> the number of its process group, in the order of their making; how many were made; and the one beside ep's."""
    order: list[dist.ProcessGroup] = []
    real = dist.all_reduce

    def note(tensor: object, *rest: object, group: dist.ProcessGroup, **named: object) -> object:
        order.append(group)
        return real(tensor, *rest, group=group, **named)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", note)
        mesh = make_mesh(layout)
    numbers = {axis: order.index(group.process_group) for axis, group in mesh.groups.items() if group.process_group is not None}
    return numbers, len(order), order.index(beside) if (beside := mesh["ep"].beside) is not None else -1


def test_what_computation_waits_for_does_not_queue_behind_gradients_nor_numbers_behind_rows() -> None:
    for numbers, count, beside in on_ranks(2, lambda rank: made(Layout(cp=2, ep=2, zero=1))):
        assert numbers["cp"] == numbers["sequence"] and numbers["replicated.shard"] == numbers["stage"] == numbers["world"] == 0
        assert len({numbers["cp"], numbers["ep"], beside, 0}) == count == 4


def test_axes_of_the_same_ranks_share_a_group_and_every_group_is_met_once() -> None:
    for numbers, count, beside in on_ranks(4, lambda rank: made(Layout(dp=2, tp=2, zero=1))):
        assert beside == -1 and numbers["tp"] == numbers["sequence"]
        assert numbers["dp"] == numbers["tp_split.shard"] and numbers["replicated.shard"] == numbers["world"]
        assert count == 3  # all; those of tp; those of dp


def test_a_pipeline_of_four_meets_all_at_once_before_neighbours_speak() -> None:
    for numbers, _, _ in on_ranks(4, lambda rank: made(Layout(pp=4, schedule="1f1b"))):
        assert numbers["pp"] > numbers["world"]
