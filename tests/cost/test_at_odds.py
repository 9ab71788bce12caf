"""What a schedule and recomputation take from each other is told where they are chosen."""

from __future__ import annotations

import pytest

from quintet.cost.memory import step_memory
from quintet.cost.pipeline import at_odds
from quintet.spec.layout import ARRANGEMENT, Layout, PipelineName
from quintet.spec.run import Train
from tests.cost.test_flops import V3

FULL = Train(recompute="full")


def test_nothing_is_told_without_a_pipeline_or_without_full_recomputation() -> None:
    assert at_odds(Layout(dp=2, ep=2), FULL) == at_odds(Layout(pp=4, dp=2, ep=2), Train(recompute="selective")) == []


def test_pairs_that_hide_nothing_are_told() -> None:
    hidden, kept = at_odds(Layout(pp=4, dp=2, ep=2), FULL)  # the default is dualpipev where experts are split
    assert hidden.startswith("pairs of dualpipev hide no all-to-all under train.recompute full")
    assert kept.startswith("dualpipev puts weight gradients off")
    assert len(at_odds(Layout(pp=4), FULL)) == 1, "without experts' all-to-all there is nothing to hide"


@pytest.mark.parametrize("name", ARRANGEMENT)
def test_it_is_told_of_exactly_the_schedules_that_keep_more_than_they_keep_of_layers(name: PipelineName) -> None:
    layout = Layout(pp=4, schedule=name)
    kept = max(step_memory(V3, FULL, sequence_length=4096, layout=layout, place=place).activations for place in range(4))
    gpipe = step_memory(V3, FULL, sequence_length=4096, layout=Layout(pp=4, schedule="gpipe"), place=1).activations
    assert bool(at_odds(layout, FULL)) == (kept > 1.5 * gpipe)
