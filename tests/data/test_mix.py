"""The mixture: shares exact to within one sequence, continued from its counts."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from quintet.data.mix import Mixture

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=12)


def test_three_to_one_is_every_fourth() -> None:
    mixture = Mixture([3.0, 1.0])
    assert [mixture.next() for _ in range(8)] == [0, 0, 1, 0, 0, 0, 1, 0]
    assert mixture.counts == [6, 2]


@given(WEIGHTS)
def test_after_any_number_of_sequences_every_share_is_within_one(weights: list[float]) -> None:
    mixture = Mixture(weights)
    total = sum(map(Fraction, weights))
    bound = 1 - Fraction(1, max(2 * len(weights) - 2, 1))
    for k in range(1, 200):
        mixture.next()
        for weight, count in zip(weights, mixture.counts, strict=True):
            assert abs(Fraction(weight) * k / total - count) <= bound


@given(st.floats(0.01, 100), st.floats(0.01, 100), st.integers(0, 100), st.integers(1, 100))
def test_of_two_sources_any_window_has_its_share_within_one(first: float, second: float, begin: int, length: int) -> None:
    mixture = Mixture([first, second])
    chosen = [mixture.next() for _ in range(begin + length)][begin:]
    assert abs(chosen.count(0) - length * Fraction(first) / (Fraction(first) + Fraction(second))) <= 1


@given(WEIGHTS, st.integers(0, 60))
def test_counts_are_the_whole_state(weights: list[float], taken: int) -> None:
    whole = Mixture(weights)
    for _ in range(taken):
        whole.next()
    resumed = Mixture(weights, counts=whole.counts)
    assert [resumed.next() for _ in range(30)] == [whole.next() for _ in range(30)]
