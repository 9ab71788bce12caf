"""Curves: the sentences mean what they say, on literal cases and on every curve that hypothesis can write."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quintet.errors import SpecError
from quintet.spec.curve import Curve, Place, Progress
from tests.spec.strategies import curves


def steps(count: int, *, of: int = 100) -> Progress:
    return Progress(steps=count, tokens=10 * count, share=min(count / of, 1.0))


def along(*sentences: str, of: int = 100) -> list[float]:
    """The curve's value after 0, 25, 50, 75 and 100 % of `of` steps, rounded to 6 digits."""
    curve = Curve.parse(sentences)
    return [round(curve.at(steps(of * quarter // 4, of=of)), 6) for quarter in range(5)]


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("2000 steps", 2000, "steps"),
        ("1 step", 1, "steps"),
        ("2K steps", 2000, "steps"),
        ("14.8T tokens", 14_800_000_000_000, "tokens"),
        ("14.633T tokens", 14_633_000_000_000, "tokens"),
        ("469B tokens", 469_000_000_000, "tokens"),
        ("  1.5e3 tokens ", 1500, "tokens"),
        ("5%", 0.05, "share"),
        ("100 %", 1.0, "share"),
    ],
)
def test_a_place_is_steps_tokens_or_a_share(text: str, value: float, unit: str) -> None:
    assert Place.parse(text) == Place(value=value, unit=unit)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("2000", "'2000' is not a place in a phase; write for example '2000 steps'"),
        ("ten steps", "is not a place"),
        ("3 miles", "is not a place"),
        ("5% tokens", "is not a place"),
        ("-1 steps", "'-1 steps' lies before the phase begins; a place is at least 0"),
        ("101%", "'101%' lies after the phase ends; a share is at most 100%"),
    ],
)
def test_a_wrong_place_is_named_with_a_remedy(text: str, complaint: str) -> None:
    with pytest.raises(SpecError) as error:
        Place.parse(text)
    assert complaint in str(error.value)


def test_a_number_holds_everywhere() -> None:
    assert along("3e-4") == [0.0003] * 5


def test_a_number_holds_until_its_place_and_the_next_from_there_on() -> None:
    assert along("0.3 until 50 steps", "0.1") == [0.3, 0.3, 0.1, 0.1, 0.1]
    assert along("0.3 until 500 tokens", "0.1") == [0.3, 0.3, 0.1, 0.1, 0.1]
    assert along("0.3 until 50%", "0.1") == [0.3, 0.3, 0.1, 0.1, 0.1]


def test_a_line_begins_at_the_value_before_it_or_at_the_one_it_names() -> None:
    assert along("linear to 8 until 100 steps", "hold") == [0, 2, 4, 6, 8]
    assert along("linear from 4 to 8 until 100 steps", "hold") == [4, 5, 6, 7, 8]
    assert along("6 until 50%", "linear to 2") == [6, 6, 6, 4, 2]


def test_a_cosine_is_half_a_period() -> None:
    assert along("cosine from 2 to 0") == [2, 1.707107, 1, 0.292893, 0]


def test_hold_keeps_the_value_reached() -> None:
    assert along("linear to 8 until 50 steps", "hold until 75 steps", "linear to 0 until 100 steps", "hold") == [0, 4, 8, 8, 0]


def test_units_may_change_at_a_hold() -> None:
    assert along("linear to 8 until 50 steps", "hold until 750 tokens", "linear to 0 until 1000 tokens", "hold") == [0, 4, 8, 8, 0]


def test_after_the_last_place_the_last_value_stays() -> None:
    curve = Curve.parse(("linear to 8 until 10 steps",))
    assert curve.at(steps(10)) == curve.at(steps(99)) == 8


def test_a_last_slope_reaches_its_end_where_the_phase_ends() -> None:
    curve = Curve.parse(("linear to 8 until 50%", "cosine to 2"))
    assert curve.at(steps(100)) == curve.at(steps(250)) == 2


@pytest.mark.parametrize(
    ("sentences", "complaint"),
    [
        ((), "a curve needs at least one sentence, for example ['1e-3']"),
        (("quadratic to 3",), "'quadratic to 3' is not a piece of a curve; write for example 'linear to 2e-4 until 5%'"),
        (("linear 3",), "'linear 3' is not a piece of a curve"),
        (("1 until noon",), "'noon' is not a place in a phase"),
        (("1", "2"), "'1' has no end but is not the last piece; add 'until ...'"),
        (("1 until 9 steps", "2 until 3 steps"), "'2 until 3 steps' ends before it begins; places must not go backwards"),
        (("1 until 9 steps", "linear to 2 until 50%", "hold"), "begins at a place in steps and ends at one in share"),
        (("1 until 9 steps", "linear to 2"), "put a 'hold' piece between, or change the unit"),
    ],
)
def test_a_wrong_curve_names_the_sentence_and_the_remedy(sentences: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(SpecError) as error:
        Curve.parse(sentences)
    assert complaint in str(error.value)


@given(curves(), st.integers(min_value=0, max_value=2 * 10**6))
def test_a_curve_stays_between_its_lowest_and_highest_end(sentences: tuple[str, ...], count: int) -> None:
    curve = Curve.parse(sentences)
    lowest = min(min(segment.start, segment.end) for segment in curve.segments)
    value = curve.at(Progress(steps=count, tokens=count, share=min(count / 10**6, 1.0)))
    assert lowest - 1e-9 <= value <= curve.peak + 1e-9


@given(curves())
def test_each_piece_begins_at_its_start_and_ends_at_its_end(sentences: tuple[str, ...]) -> None:
    for segment in Curve.parse(sentences).segments:
        for place, value in ((segment.begin, segment.start), (segment.until, segment.end)):
            if place is not None and not (segment.shape == "hold" and place is segment.begin):
                here = Progress(steps=int(place.value), tokens=int(place.value), share=place.value)
                assert segment.at(here) == pytest.approx(value)


@given(st.floats(min_value=0, max_value=1), st.floats(min_value=0, max_value=1))
def test_a_rise_never_falls(one: float, other: float) -> None:
    curve = Curve.parse(("linear from 1 to 5 until 40%", "cosine to 9"))
    low, high = (curve.at(Progress(steps=0, tokens=0, share=share)) for share in sorted((one, other)))
    assert low <= high + 1e-12
