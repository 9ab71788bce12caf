"""The named schedules: literal little tables, the published formulas to the tick, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quintet.errors import SpecError
from quintet.schedule import NAMES, Schedule, build, check
from quintet.schedule.classic import rounds
from quintet.schedule.clock import unit, walk
from tests.schedule.schedules import schedules


def rows(schedule: Schedule) -> list[str]:
    return [" ".join(map(str, row)) for row in schedule.table]


def ticks_idle(schedule: Schedule) -> set[float]:
    """How long the ranks idle if F, I and W take a tick each, and B and pairs what they hold."""
    timeline = walk(schedule, unit(schedule))
    return {timeline.makespan - timeline.busy(rank) for rank in range(schedule.num_ranks)}


def peak(schedule: Schedule) -> int:
    return max(check(schedule).peak_activations)


# Little tables that a reader can follow.


def test_gpipe_runs_all_forwards_first() -> None:
    assert rows(build("gpipe", 2, 3)) == ["0F0 0F1 0F2 0B0 0B1 0B2", "1F0 1F1 1F2 1B0 1B1 1B2"]


def test_1f1b_alternates_once_the_pipeline_is_full() -> None:
    assert rows(build("1f1b", 3, 4)) == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]


def test_zb1p_puts_off_as_many_weight_gradients_as_ranks_lie_before() -> None:
    assert rows(build("zb1p", 3, 4)) == [
        "0F0 0F1 0F2 0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3",
        "1F0 1F1 1I0 1F2 1I1 1W0 1F3 1I2 1W1 1I3 1W2 1W3",
        "2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3",
    ]


def test_interleaved_loops_over_the_ranks() -> None:
    assert rows(build("interleaved", 2, 2)) == ["0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1", "1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1"]


def test_zbv_folds_the_stages_into_a_v() -> None:
    assert rows(build("zbv", 2, 3)) == [
        "0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0I0 0W0 3F2 3I2 3W2 0I1 0W1 0I2 0W2",
        "1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1I1 2I2 1I2 1W1 2W2 1W2",
    ]


def test_dualpipe_on_two_ranks_meets_in_the_middle_at_once() -> None:
    # Micro-batches 0 and 1 enter at rank 0, 2 and 3 at rank 1. Rank 0 holds stage 0 for the former and stage 1 for the latter.
    assert rows(build("dualpipe", 2, 4)) == [
        "0F0 1F2 0F1 1B2 (1F3;0B0) 1B3 0I1 0W1",
        "0F2 1F0 0F3 1B0 (1F1;0B2) 1B1 0I3 0W3",
    ]


def test_dualpipe_on_four_ranks_has_the_eight_phases() -> None:
    schedule = build("dualpipe", 4, 10)
    assert rows(schedule)[0] == (
        "0F0 0F1 0F2 3F5 3I5 3W5 3F6 (0F3;3B6) (3F7;0B0) (0F4;3B7) (3F8;0B1) 3B8 (3F9;0B2) 3B9 0I3 0W3 0I4 0W4"
    )
    assert rows(schedule)[1] == (
        "1F0 2F5 1F1 2F6 1F2 2B5 (2F7;1B0) (1F3;2B6) (2F8;1B1) (1F4;2B7) (2F9;1B2) 2B8 1B3 2I9 1I4 2W9 1W4"
    )


def test_dualpipe_mirrors_its_ranks() -> None:
    schedule = build("dualpipe", 8, 20)
    assert schedule.routes == ((0, 1, 2, 3, 4, 5, 6, 7), (7, 6, 5, 4, 3, 2, 1, 0))
    assert schedule.stages[2] == ((0, 2), (1, 5))
    for rank in range(4):
        mirrored = [(op.kind, op.stage, (op.microbatch + 10) % 20) for work in schedule.table[7 - rank] for op in work.ops]
        assert [tuple(op) for work in schedule.table[rank] for op in work.ops] == mirrored


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 20), (8, 20), (16, 120)])
def test_dualpipe_has_deepseeks_counts_of_every_kind(ranks: int, microbatches: int) -> None:
    """From the published loops: 2(N-h-1) + 2(h+1) + (N-h-1) single F and so on, with one pair less in the middle."""
    middle = ranks // 2
    for rank, row in enumerate(build("dualpipe", ranks, microbatches).table):
        h = min(rank, ranks - 1 - rank)
        outer, in_the_middle = middle - h - 1, h == middle - 1
        kinds = [work.kind for work in row]
        assert kinds.count("FB") == 2 * (microbatches // 2 - ranks + h + 1) + outer - in_the_middle
        assert kinds.count("F") == 3 * outer + 2 * (h + 1) + in_the_middle
        assert kinds.count("B") == outer + (h + 1) + in_the_middle
        assert kinds.count("I") == kinds.count("W") == 2 * outer + (h + 1)


def test_dualpipev_keeps_both_ends_of_the_v_on_rank_0() -> None:
    schedule = build("dualpipev", 2, 4)
    assert schedule.routes == ((0, 1, 1, 0),)
    assert rows(schedule) == [
        "0F0 0F1 0F2 3F0 3I0 3W0 3F1 (0F3;3B1) (3F2;0B0) 3B2 (3F3;0B1) 3B3 0I2 0W2 0I3 0W3",
        "1F0 2F0 1F1 2F1 1F2 2B0 (2F2;1B0) (1F3;2B1) (2F3;1B1) 2B2 1B2 2I3 1I3 2W3 1W3",
    ]


# The published formulas, in ticks: F = I = W = 1, so B = 2 and F&B = 3.

RANKS = st.integers(1, 12)


@given(p=RANKS, m=st.integers(1, 40))
def test_gpipe_and_1f1b_idle_for_p_minus_1_forwards_and_backwards(p: int, m: int) -> None:
    assert ticks_idle(build("gpipe", p, m)) == ticks_idle(build("1f1b", p, m)) == {3 * (p - 1)}


@given(p=RANKS, m=st.integers(1, 40))
def test_1f1b_and_zb1p_keep_p_activations(p: int, m: int) -> None:
    assert check(build("1f1b", p, m)).peak_activations == tuple(min(m, p - rank) for rank in range(p))
    assert peak(build("zb1p", p, m)) == min(p, m)


@given(p=RANKS, extra=st.integers(0, 30))
def test_zb1p_idles_for_p_minus_1_times_f_plus_b_minus_2w(p: int, extra: int) -> None:
    assert ticks_idle(build("zb1p", p, p + extra)) == {p - 1}


@given(p=RANKS, rounds_=st.integers(1, 4), v=st.integers(2, 4))
def test_interleaving_divides_the_bubble_by_the_chunks(p: int, rounds_: int, v: int) -> None:
    assert ticks_idle(build("interleaved", p, rounds_ * p, chunks=v)) == {3 * (p - 1)}
    assert ticks_idle(build("interleaved-zb", p, rounds_ * p, chunks=v)) == {p - 1}


@given(p=RANKS, extra=st.integers(0, 30))
def test_zbv_idles_only_for_the_skew_of_p_minus_1_forwards(p: int, extra: int) -> None:
    schedule = build("zbv", p, 2 * p + extra)
    timeline = walk(schedule, unit(schedule))
    assert ticks_idle(schedule) == {p - 1}
    assert all(timeline.ends[rank][-1] - timeline.starts[rank][0] == timeline.busy(rank) for rank in range(p))
    assert peak(schedule) == 2 * p


@given(half=st.integers(1, 8), extra=st.integers(0, 20))
def test_dualpipe_idles_for_half_p_minus_1_times_pair_plus_b_minus_3w(half: int, extra: int) -> None:
    schedule = build("dualpipe", 2 * half, 4 * half + 2 * extra)
    assert ticks_idle(schedule) == {(half - 1) * (3 + 2 - 3)}
    # P + 1, once there are enough micro-batches to have that many under way.
    assert peak(schedule) == 2 * half + 1


@given(p=RANKS, extra=st.integers(0, 30))
def test_dualpipev_idles_like_dualpipe_of_twice_the_stages(p: int, extra: int) -> None:
    schedule = build("dualpipev", p, 2 * p + extra)
    assert ticks_idle(schedule) == {(p - 1) * (3 + 2 - 3)}
    assert peak(schedule) == 2 * p + 1


# Interleaved with any number of micro-batches.


def test_rounds_are_spread_evenly() -> None:
    assert [len(one) for one in rounds(16, 120)] == [18, 17, 17, 17, 17, 17, 17]
    assert rounds(4, 3) == [range(3)]


@given(p=RANKS, m=st.integers(1, 200))
def test_rounds_hold_every_microbatch_once_and_fill_the_pipeline(p: int, m: int) -> None:
    found = rounds(p, m)
    assert [one for round_ in found for one in round_] == list(range(m))
    assert max(map(len, found)) - min(map(len, found)) <= 1
    assert m < p or min(map(len, found)) >= p


@pytest.mark.parametrize("name", ["interleaved", "interleaved-zb"])
def test_deepseeks_own_shape_loses_nothing_to_its_odd_number_of_microbatches(name: str) -> None:
    assert ticks_idle(build(name, 16, 120)) == ticks_idle(build(name, 16, 128))


# Refusals.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dualpip", 4, 8), "'dualpip' is not a schedule (did you mean 'dualpipe'?); schedules: gpipe, 1f1b"),
        (("ZBV", 4, 8), "did you mean 'zbv'?"),
        (("dualpipe", 5, 20), "num_ranks (5) must be even for dualpipe, whose ranks mirror each other in pairs; choose 4 or 6 ranks"),
        (("dualpipe", 1, 20), "choose 2 ranks, or dualpipev"),
        (("dualpipe", 4, 9), "num_microbatches (9) must be even for dualpipe, which feeds half of them from each end; choose 10"),
        (("dualpipe", 4, 5), "num_microbatches (5) must be even for dualpipe, which feeds half of them from each end; choose 8"),
        (("dualpipe", 8, 14), "num_microbatches (14) must be at least 2 x num_ranks (16) for dualpipe"),
        (("dualpipev", 3, 5), "choose 6 or more micro-batches, at most 2 ranks, or zbv"),
        (("1f1b", 0, 5), "num_ranks (0) and num_microbatches (5) must be at least 1"),
        (("gpipe", 2, 0), "must be at least 1"),
    ],
)
def test_what_cannot_be_scheduled_is_refused_by_rule(arguments: tuple[str, int, int], message: str) -> None:
    with pytest.raises(SpecError) as error:
        build(*arguments)
    assert message in str(error.value)


def test_one_chunk_is_no_interleaving() -> None:
    with pytest.raises(SpecError, match=r"chunks \(1\) must be at least 2 for interleaved-zb; with 1 it is zb1p"):
        build("interleaved-zb", 2, 2, chunks=1)


@given(schedule=schedules())
def test_every_schedule_is_right_at_every_shape(schedule: Schedule) -> None:
    found = check(schedule)
    assert len(found.program.rows) == schedule.num_ranks
    assert max(found.peak_activations) <= schedule.num_microbatches * max(map(len, schedule.stages))


def test_names_are_what_build_takes() -> None:
    assert [build(name, 2, 4).name for name in NAMES] == list(NAMES)
