"""The curriculum: phases counted out in steps, and what each step is trained with."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quintet.spec.curriculum import PhaseCurves, curriculum
from quintet.spec.run import Phase, Train
from tests.spec.strategies import phases
from tests.spec.test_rules import PHASE, RUN


def stepwise(phase: Phase, *, limit: int) -> tuple[int, int, list[int]]:
    """Steps, tokens and batches of a phase walked one step at a time, at most `limit` steps."""
    curves, steps, tokens, batches = PhaseCurves(phase), 0, 0, []
    while not curves.is_over(steps, tokens) and steps < limit:
        batches.append(curves.batch_sequences(steps, tokens))
        steps, tokens = steps + 1, tokens + batches[-1] * phase.sequence_length
    return steps, tokens, batches


@pytest.mark.parametrize(("steps", "tokens", "share"), [(0, 0, 0.0), (5, 10**9, 0.5), (10, 0, 1.0), (12, 0, 1.0)])
def test_progress_in_a_phase_counted_in_steps_follows_the_steps(steps: int, tokens: int, share: float) -> None:
    assert PhaseCurves(PHASE).progress(steps, tokens).share == share


@given(st.integers(min_value=0, max_value=2000))
def test_progress_in_a_phase_counted_in_tokens_follows_the_tokens(tokens: int) -> None:
    progress = PhaseCurves(replace(PHASE, length="1K tokens")).progress(7, tokens)
    assert (progress.steps, progress.tokens, progress.share) == (7, tokens, min(tokens / 1000, 1.0))


def test_a_batch_is_a_whole_number_of_sequences() -> None:
    curves = PhaseCurves(replace(PHASE, batch=("linear from 1 to 4 until 10 steps", "hold")))
    assert [curves.batch_sequences(step, 0) for step in (0, 1, 2, 5, 9, 10, 99)] == [1, 1, 2, 2, 4, 4, 4]


def test_the_first_step_of_a_warm_up_learns_already_and_the_last_ends_at_the_curves_end() -> None:
    curves = PhaseCurves(replace(PHASE, learning_rate=("linear to 1 until 4 steps", "linear to 0 until 10 steps")))
    rates = [curves.settings(step, 2 * 8 * step).learning_rate for step in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0.0])


@given(phases(max_context=64), st.integers(min_value=1, max_value=300))
def test_counting_a_phase_out_gives_what_walking_through_it_gives(phase: Phase, length: int) -> None:
    for unit, scale in (("steps", 1), ("tokens", 500)):
        (stretch,) = curriculum(replace(RUN, phases=(replace(phase, sequence_length=8, length=f"{length * scale} {unit}"),)))
        steps, tokens, batches = stepwise(stretch.phase, limit=10**5)
        assert (stretch.num_steps, stretch.num_tokens) == (steps, tokens)
        assert (stretch.first_batch, stretch.last_batch) == (batches[0], batches[-1])


@given(st.lists(st.integers(min_value=1, max_value=50), min_size=1, max_size=4), st.integers(min_value=1, max_value=500))
def test_a_given_number_of_steps_is_shared_in_proportion_and_used_up(lengths: list[int], steps: int) -> None:
    several = tuple(replace(PHASE, length=f"{length} steps") for length in lengths)
    stretches = curriculum(replace(RUN, phases=several, train=Train(steps=steps)))
    assert sum(stretch.num_steps for stretch in stretches) == steps
    if len(stretches) == len(lengths):
        for stretch, length in zip(stretches, lengths, strict=True):
            assert stretch.num_steps == pytest.approx(steps * length / sum(lengths), abs=1)


@pytest.mark.parametrize("batch", ["linear from 4 to 8", "cosine from 1 to 80", "linear from 4 to 8 until 1%", "8"])
@pytest.mark.parametrize("length", ["10B tokens", "1000000000000000 steps"])
def test_a_long_phase_is_counted_out_at_once(batch: str, length: str) -> None:
    begin = time.perf_counter()
    (stretch,) = curriculum(replace(RUN, phases=(replace(PHASE, length=length, batch=(batch, "8")[: 2 if "until" in batch else 1]),)))
    assert time.perf_counter() - begin < 2
    counted = stretch.num_steps if "steps" in length else stretch.num_tokens
    wanted = 10**15 if "steps" in length else 10**10
    assert wanted <= counted < wanted + 80 * PHASE.sequence_length
