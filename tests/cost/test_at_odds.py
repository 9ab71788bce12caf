"""What a schedule and recomputation take from each other is told where they are chosen."""

from __future__ import annotations

import pytest

from quintet.cost.memory import step_memory
from quintet.cost.pipeline import at_odds
from quintet.spec.layout import ARRANGEMENT, Layout, PipelineName
from quintet.spec.run import Recompute, Train
from tests.cost.test_flops import V3

FULL = Train(recompute="full")


def test_nothing_is_told_without_a_pipeline_or_without_full_recomputation() -> None:
    assert at_odds(Layout(dp=2, ep=2), FULL) == at_odds(Layout(pp=4, dp=2, ep=2), Train(recompute="selective")) == []
    assert at_odds(Layout(pp=4, schedule="zbv"), Train()) == []


def test_pairs_that_hide_nothing_are_told() -> None:
    hidden, kept = at_odds(Layout(pp=4, dp=2, ep=2), FULL)  # the default is dualpipev where experts are split
    assert hidden.startswith("pairs of dualpipev hide no all-to-all under train.recompute full")
    assert kept.startswith("dualpipev puts weight gradients off")
    assert len(at_odds(Layout(pp=4), FULL)) == 1, "without experts' all-to-all there is nothing to hide"


@pytest.mark.parametrize("policy", ["selective", "full"])
@pytest.mark.parametrize("name", ARRANGEMENT)
def test_it_is_told_of_exactly_the_schedules_that_recomputation_saves_little(name: PipelineName, policy: Recompute) -> None:
    layout = Layout(pp=8, schedule=name)

    def kept(recompute: Recompute) -> int:
        train = Train(recompute=recompute)
        return max(step_memory(V3, train, sequence_length=4096, layout=layout, place=place).activations for place in range(8))

    little = {"selective": 0.8, "full": 0.4}[policy]
    assert bool(at_odds(layout, Train(recompute=policy))) == (kept(policy) > little * kept("none"))
