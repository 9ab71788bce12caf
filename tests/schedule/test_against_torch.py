"""Our orders against torch.distributed.pipelining's own, op by op, where it has them; and its validator's opinion of ours."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as peer

from quintet.schedule import Op, Schedule, build
from tests.schedule.schedules import schedules

CLASSES: dict[str, Any] = {
    "interleaved": peer.ScheduleInterleaved1F1B,
    "interleaved-zb": peer.ScheduleInterleavedZeroBubble,
    "zbv": peer.ScheduleZBVZeroBubble,
    "dualpipev": peer.ScheduleDualPipeV,
}
KINDS = {"F": peer.F, "B": peer.B, "I": peer.I, "W": peer.W}


def torch_rows(name: str, ranks: int, microbatches: int, chunks: int) -> list[list[str]]:
    """What torch's class would run, without its stages and process group, which the order does not depend on."""
    rounds = max(1, microbatches // ranks)
    given_ = SimpleNamespace(
        pp_group_size=ranks,
        num_stages=ranks * chunks,
        _num_stages=ranks * chunks,
        n_local_stages=chunks,
        _n_microbatches=microbatches,
        number_of_rounds=rounds,
        microbatches_per_round=microbatches // rounds,
    )
    return [
        [printed(action) for action in CLASSES[name]._calculate_single_rank_operations(given_, rank) if action is not None]
        for rank in range(ranks)
    ]


def printed(action: Any) -> str:
    if action.sub_actions is not None:
        return f"({';'.join(printed(one) for one in action.sub_actions)})"
    return f"{action.stage_index}{action.computation_type.value}{action.microbatch_index}"


def our_rows(schedule: Schedule) -> list[list[str]]:
    return [[str(work) for work in row] for row in schedule.table]


@pytest.mark.parametrize("name", ["interleaved", "interleaved-zb"])
@given(ranks=st.integers(1, 8), rounds=st.integers(1, 4), extra=st.integers(0, 7), chunks=st.integers(2, 4))
def test_interleaved_orders_are_torchs_where_it_takes_the_shape(name: str, ranks: int, rounds: int, extra: int, chunks: int) -> None:
    microbatches = rounds * (ranks + extra % ranks)
    if microbatches % max(1, microbatches // ranks):
        return
    assert our_rows(build(name, ranks, microbatches, chunks=chunks)) == torch_rows(name, ranks, microbatches, chunks)


@given(ranks=st.integers(1, 8), microbatches=st.integers(1, 30))
def test_zbv_is_torchs(ranks: int, microbatches: int) -> None:
    assert our_rows(build("zbv", ranks, microbatches)) == torch_rows("zbv", ranks, microbatches, 2)


@given(ranks=st.integers(1, 8), extra=st.integers(0, 20))
def test_dualpipev_is_torchs(ranks: int, extra: int) -> None:
    assert our_rows(build("dualpipev", ranks, 2 * ranks + extra)) == torch_rows("dualpipev", ranks, 2 * ranks + extra, 2)


@given(half=st.integers(1, 4), extra=st.integers(0, 10))
def test_dualpipe_is_torchs_dualpipev_of_half_the_ranks_and_their_mirror_images(half: int, extra: int) -> None:
    """Its first half of ranks runs DualPipeV's order, with the ways there and back on two directions of half the micro-batches each."""
    ranks, each = 2 * half, 2 * half + extra
    ours = build("dualpipe", ranks, 2 * each)
    folded = torch_rows("dualpipev", half, each, 2)
    unfolded = [
        # The way back of stage s, on rank P - 1 - s of the V, is direction 1's own s.
        [str_of([op._replace(microbatch=op.microbatch % each) for op in work.ops]) for work in row]
        for row in ours.table[:half]
    ]
    assert unfolded == folded


def str_of(ops: list[Op]) -> str:
    return str(ops[0]) if len(ops) == 1 else f"({';'.join(map(str, ops))})"


@given(schedule=schedules())
def test_torchs_validator_accepts_every_schedule(schedule: Schedule) -> None:
    """It knows one rank per stage: DualPipe's second direction counts as stages of its own, and its micro-batches from 0."""
    each, stages = schedule.num_microbatches // len(schedule.routes), schedule.num_stages
    actions = {
        rank: [action([(op, schedule.direction(op.microbatch)) for op in work.ops], each, stages) for work in row]
        for rank, row in enumerate(schedule.table)
    }
    found = peer._validate_schedule(actions, schedule.num_ranks, stages * len(schedule.routes), each)
    assert found == {d * stages + stage: rank for d, route in enumerate(schedule.routes) for stage, rank in enumerate(route)}


def action(ops: list[tuple[Op, int]], each: int, stages: int) -> Any:
    singles = [peer._Action(d * stages + op.stage, KINDS[op.kind], op.microbatch - d * each) for op, d in ops]
    if len(singles) == 1:
        return singles[0]
    return peer._Action(-1, peer.OVERLAP_F_B, None, tuple(singles))


def test_torch_refuses_deepseeks_shape_and_we_do_not() -> None:
    assert 120 % (120 // 16)
    assert build("interleaved", 16, 120).num_microbatches == 120
