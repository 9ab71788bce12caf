"""The checker finds what is broken: each test breaks a right schedule or program in one way."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quintet.errors import SpecError
from quintet.schedule import Op, Pair, Schedule, add_transfers, build, check, forward_only
from quintet.schedule.check import check_program
from quintet.schedule.lower import Exchange, Program, Step, Transfer
from quintet.schedule.op import Work
from tests.schedule.schedules import schedules


def with_row(schedule: Schedule, rank: int, row: list[Work]) -> Schedule:
    table = list(schedule.table)
    table[rank] = tuple(row)
    return replace(schedule, table=tuple(table))


def with_program_row(program: Program, rank: int, row: list[Step]) -> Program:
    rows = list(program.rows)
    rows[rank] = tuple(row)
    return replace(program, rows=tuple(rows))


def refused(schedule: Schedule) -> str:
    with pytest.raises(SpecError) as error:
        check(schedule)
    return str(error.value)


@given(schedule=schedules(), data=st.data())
def test_a_missing_or_doubled_op_is_found(schedule: Schedule, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, schedule.num_ranks - 1))
    row = list(schedule.table[rank])
    position = data.draw(st.integers(0, len(row) - 1))
    work = row[position]
    assert "must happen once" in refused(with_row(schedule, rank, row[:position] + row[position + 1 :]))
    assert "must happen once" in refused(with_row(schedule, rank, [*row, work]))


@given(schedule=schedules(), data=st.data())
def test_a_shuffled_row_is_either_refused_or_truly_runnable(schedule: Schedule, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, schedule.num_ranks - 1))
    row = list(schedule.table[rank])
    i = data.draw(st.integers(0, len(row) - 1))
    j = data.draw(st.integers(0, len(row) - 1))
    row[i], row[j] = row[j], row[i]
    shuffled = with_row(schedule, rank, row)
    assert finishes(shuffled) == accepted(shuffled)


def accepted(schedule: Schedule) -> bool:
    try:
        check(schedule)
    except SpecError:
        return False
    return True


def finishes(schedule: Schedule) -> bool:
    """Run whatever can run, in no particular order, with rules of its own: the plainest executor."""
    done: set[tuple[str, int, int]] = set()
    at = [0] * schedule.num_ranks
    last = schedule.num_stages - 1
    moved = True
    while moved:
        moved = False
        for rank in random.sample(range(schedule.num_ranks), schedule.num_ranks):
            while at[rank] < len(schedule.table[rank]):
                ops = schedule.table[rank][at[rank]].ops
                if not all(ready(op, done, last) for op in ops):
                    break
                done |= {("G" if op.kind in "BI" else op.kind, op.stage, op.microbatch) for op in ops}
                at[rank] += 1
                moved = True
    return all(at[rank] == len(row) for rank, row in enumerate(schedule.table))


def ready(op: Op, done: set[tuple[str, int, int]], last: int) -> bool:
    if op.kind == "F":
        return op.stage == 0 or ("F", op.stage - 1, op.microbatch) in done
    if op.kind == "W":
        return ("G", op.stage, op.microbatch) in done
    return ("F", op.stage, op.microbatch) in done and (op.stage == last or ("G", op.stage + 1, op.microbatch) in done)


def test_messages_of_the_checker() -> None:
    good = build("zb1p", 2, 2)
    assert str(good.table[1][1]) == "1I0"
    assert refused(with_row(good, 1, [*good.table[1][1:], good.table[1][0]])) == "rank 1 has 1I0 before 1F0, which it needs"
    assert refused(with_row(good, 1, [*good.table[1], Op("F", 2, 0)])) == "rank 1 has 2F0, but there are 2 stages and 2 micro-batches"
    assert refused(with_row(good, 1, [*good.table[1], Op("F", 0, 0)])) == "rank 1 has 0F0, which belongs to rank 0"
    assert refused(with_row(good, 0, list(good.table[0][1:]))) == "0F0 must happen once in zb1p, and happens 0 times"
    doubled = refused(with_row(good, 0, [*good.table[0], Op("B", 0, 1)]))
    assert doubled == "0I1 (or as part of 0B1) must happen once in zb1p, and happens 2 times"


def test_a_pair_cannot_wait_for_itself() -> None:
    row = (Pair(Op("F", 0, 0), Op("B", 0, 0)),)
    assert "rank 0 has (0F0;0B0) before 0F0" in refused(Schedule(name="own", num_microbatches=1, routes=((0,),), table=(row,)))


def test_peaks_count_from_forward_to_weight_gradient() -> None:
    found = check(build("zb1p", 3, 4))
    assert found.peak_activations == (3, 3, 3)
    assert found.peak_deferred == (1, 2, 3)
    assert check(build("gpipe", 2, 5)).peak_activations == (5, 5)
    assert check(build("gpipe", 2, 5)).peak_deferred == (0, 0)


# Programs.


def test_a_program_of_two_ranks() -> None:
    assert str(add_transfers(build("1f1b", 2, 2))) == (
        "rank 0: 0F0 [send 0F0 to 1] 0F1 [send 0F1 to 1, receive 0B0 from 1] 0B0 [receive 0B1 from 1] 0B1\n"
        "rank 1: [receive 1F0 from 0] 1F0 [receive 1F1 from 0] 1B0 [send 1B0 to 0] 1F1 1B1 [send 1B1 to 0]"
    )


@given(schedule=schedules())
def test_a_program_is_its_schedule_with_exchanges(schedule: Schedule) -> None:
    program = add_transfers(schedule)
    kept = tuple(tuple(step for step in row if not isinstance(step, Exchange)) for row in program.rows)
    assert kept == schedule.table
    transfers = [transfer for row in program.rows for step in row if isinstance(step, Exchange) for transfer in step.transfers]
    hops = sum(
        route[stage] != route[stage + 1]
        for microbatch in range(schedule.num_microbatches)
        for route in [schedule.routes[schedule.direction(microbatch)]]
        for stage in range(schedule.num_stages - 1)
    )
    assert len(transfers) == 2 * 2 * hops
    assert not any(isinstance(a, Exchange) and isinstance(b, Exchange) for row in program.rows for a, b in pairwise(row))


@given(schedule=schedules())
def test_forwards_alone_can_run_too(schedule: Schedule) -> None:
    program = add_transfers(forward_only(schedule))
    check_program(program)
    assert sum(isinstance(step, Op) for row in program.rows for step in row) == schedule.num_stages * schedule.num_microbatches


@given(schedule=schedules(most_ranks=6, most_microbatches=10), data=st.data())
def test_a_dropped_transfer_is_found(schedule: Schedule, data: st.DataObject) -> None:
    program = add_transfers(schedule)
    places = [
        (rank, i, transfer)
        for rank, row in enumerate(program.rows)
        for i, step in enumerate(row)
        if isinstance(step, Exchange)
        for transfer in step.transfers
    ]
    if not places:
        return
    rank, i, transfer = data.draw(st.sampled_from(places))
    row = list(program.rows[rank])
    step = row[i]
    assert isinstance(step, Exchange)
    row[i] = Exchange(tuple(one for one in step.transfers if one != transfer))
    with pytest.raises(SpecError, match="between ranks"):
        check_program(with_program_row(program, rank, row))


def test_two_ranks_that_send_first_and_receive_later_deadlock() -> None:
    # Both send before they receive, which buffered sends would bear.
    schedule = build("dualpipe", 2, 4)
    program = add_transfers(schedule)
    assert isinstance(program.rows[0][1], Exchange)
    rows: list[tuple[Step, ...]] = []
    for row in program.rows:
        split: list[Step] = []
        for step in row:
            split += [Exchange((one,)) for one in sorted(step.transfers, reverse=True)] if isinstance(step, Exchange) else [step]
        rows.append(tuple(split))
    with pytest.raises(SpecError, match="between ranks 0 and 1 differs"):
        check_program(replace(program, rows=tuple(rows)))


def test_exchanges_in_a_circle_deadlock_with_blocking_sends() -> None:
    # Three ranks; each sends to the next before it receives from the one before. Between any two, the order is the same at both ends.
    routes = ((0, 1), (1, 2), (2, 0))
    ops = [(Op("F", 0, r), Op("F", 1, (r - 1) % 3), Op("B", 1, (r - 1) % 3), Op("B", 0, r)) for r in range(3)]
    schedule = Schedule(name="ring", num_microbatches=3, routes=routes, table=tuple(ops))
    check(schedule)
    rows: list[tuple[Step, ...]] = []
    for r in range(3):
        after, before = (r + 1) % 3, (r - 1) % 3
        send = Transfer("send", "activation", 0, r, after)
        receive = Transfer("receive", "activation", 1, before, before)
        back = Transfer("send", "gradient", 1, before, before)
        home = Transfer("receive", "gradient", 0, r, after)
        f0, f1, b1, b0 = ops[r]
        rows.append((f0, Exchange((send,)), Exchange((receive,)), f1, b1, Exchange((back, home)), b0))
    with pytest.raises(SpecError, match=r"ring deadlocks if sends block until they are received: rank 0 waits for send 0F0 to 1; rank 1"):
        check_program(Program(schedule=schedule, rows=tuple(rows)))
    batched = [(row[0], Exchange((*row[1].transfers, *row[2].transfers)), *row[3:]) for row in rows]  # type: ignore[union-attr]
    check_program(Program(schedule=schedule, rows=tuple(batched)))


def test_work_before_its_message_is_found() -> None:
    program = add_transfers(build("1f1b", 2, 1))
    f0, exchange, b0 = program.rows[0][0], program.rows[0][1], program.rows[0][-1]
    with pytest.raises(SpecError, match="rank 0 runs 0B0 before it has 1I0"):
        check_program(with_program_row(program, 0, [f0, b0, exchange]))
