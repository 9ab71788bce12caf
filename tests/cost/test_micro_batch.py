"""The size of micro-batches follows from what part of a stage's time is fixed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quintet.cost.micro_batch import better_micro_batch, expected, step_seconds
from quintet.spec.layout import Layout

LINE = Layout(pp=4, schedule="1f1b")


def settle(layout: Layout, size: int, batch: int, *, fixed: float, each: float) -> tuple[int, list[int]]:
    """Where the choice ends on stages that take fixed + each * size, and the sizes that were tried."""
    measured: dict[int, list[float]] = {}
    tried: list[int] = []
    while True:
        assert len(tried) < 20, "it comes to rest"
        tried.append(size)
        measured[size] = [fixed + each * size] * layout.num_stages
        better = better_micro_batch(layout, size, measured, batch_sequences=batch)
        if better is None:
            return size, tried
        size = better


def test_one_forward_one_backward_takes_its_formula() -> None:
    assert step_seconds(LINE, 2, [3.0] * 4, batch_sequences=16) == pytest.approx((8 + 3) * 3.0)


def test_fixed_costs_make_micro_batches_grow_and_work_makes_them_shrink() -> None:
    assert settle(LINE, 1, 32, fixed=1.0, each=0.0)[0] == 32
    assert settle(LINE, 8, 32, fixed=0.0, each=1.0)[0] == 1


@settings(max_examples=40)
@given(fixed=st.floats(0, 10), each=st.floats(0, 10), start=st.sampled_from((1, 2, 4, 8)), pp=st.integers(1, 4))
def test_it_comes_to_rest_within_5_percent_of_the_best_neighbour(fixed: float, each: float, start: int, pp: int) -> None:
    layout = Layout(pp=pp + 1, schedule="1f1b")
    end, tried = settle(layout, start, 32, fixed=fixed, each=each)

    def seconds(size: int) -> float:
        return step_seconds(layout, size, [fixed + each * size] * layout.num_stages, batch_sequences=32)

    neighbours = [size for size in (end // 2, 2 * end) if 1 <= size <= 32]
    if len(tried) > 1:  # one size alone may give a neighbour no chance at best
        assert seconds(end) * 0.95 <= min(map(seconds, neighbours)) * (1 + 1e-9)
    assert seconds(end) * 0.95 <= seconds(start) * (1 + 1e-9), "a trial that loses less is not undone"


def test_a_schedule_that_was_asked_for_keeps_its_micro_batches() -> None:
    pairs = Layout(pp=2, schedule="dualpipev")
    assert settle(pairs, 1, 8, fixed=1.0, each=0.0)[0] == 2, "8 sequences are 4 micro-batches of 2"
    assert settle(Layout(pp=2, dp=2), 1, 8, fixed=1.0, each=0.0)[0] == 4, "no more than a replica's sequences"
    assert settle(LINE, 3, 12, fixed=0.0, each=1.0)[0] == 3, "an odd size has no half"


def test_a_line_through_noise_neither_falls_nor_starts_below_nothing() -> None:
    assert expected(4, {1: [2.0], 2: [1.0]}) == [1.5]
    assert expected(4, {1: [1.0], 2: [3.0]}) == pytest.approx([2 + 4 / 3 * 2.5])
