"""Throughput, MFU and ETA are plain arithmetic."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quintet.monitor.meter import Pace, mfu, smoothed, throughput
from quintet.monitor.units import count, duration, num_bytes, sparkline


def test_mfu_is_the_share_of_the_peak_that_the_model_needed() -> None:
    assert throughput(1000, 5.0) == 200
    assert mfu(2e9 * 1000, 5.0, peak_flops=1e12) == pytest.approx(0.4)


def test_without_a_peak_there_is_no_mfu_and_without_time_no_throughput() -> None:
    assert mfu(2e12, 5.0, peak_flops=None) is None
    assert throughput(1000, 0.0) == mfu(2e12, 0.0, peak_flops=1e12) == 0


def test_a_slow_first_step_does_not_spoil_the_eta() -> None:
    pace = Pace()
    assert pace.eta(10) is None
    for seconds in (60.0, 0.5, 0.5):
        pace = pace.after(steps=1, seconds=seconds)
    assert pace.eta(100) == 50


def test_the_pace_forgets_what_was_long_ago_and_counts_per_step() -> None:
    pace = Pace(window=3)
    for seconds in (9.0, 9.0, 9.0, 4.0, 4.0, 4.0):
        pace = pace.after(steps=2, seconds=seconds)
    assert pace.recent == (2, 2, 2)
    assert pace.after(steps=0, seconds=1.0) == pace


@given(st.floats(-1e6, 1e6), st.integers(1, 30))
def test_smoothing_leaves_a_constant_alone(value: float, length: int) -> None:
    assert smoothed([value] * length) == pytest.approx([value] * length)


def test_smoothing_passes_over_what_is_not_finite() -> None:
    assert smoothed([1.0, math.nan, math.inf, 1.0]) == pytest.approx([1, 1, 1, 1])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0s"), (59.94, "59.9s"), (59.96, "1m 00s"), (187, "3m 07s"), (18120, "5h 02m"), (1050000, "12d 3h"), (None, "--")],
)
def test_durations_read_as_people_say_them(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (950, "950"), (999.7, "1K"), (12345, "12.3K"), (671_026_404_352, "671B"), (14.8e12, "14.8T")]
)
def test_counts_have_three_digits(number: float, text: str) -> None:
    assert count(number) == text


@pytest.mark.parametrize(("number", "text"), [(512, "512 B"), (1000, "0.977 KiB"), (2.11 * 2**30, "2.11 GiB")])
def test_bytes_have_three_digits(number: float, text: str) -> None:
    assert num_bytes(number) == text


def test_a_sparkline_falls_with_the_loss() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], width=8) == "█▇▆▅▄▃▂▁"
    assert sparkline([8, 8, 1, 1], width=2) == "█▁"
    assert sparkline([1.0, math.nan], width=5) == "▁"
    assert sparkline([], width=5) == ""
