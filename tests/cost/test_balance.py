"""Stages are cut so that the most expensive one is as cheap as it can be, by operations or by how long they took."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quintet.cost.balance import cut, layer_costs, part_at, pipeline_stages, recut
from quintet.cost.flops import flops_per_token
from quintet.spec.layout import Layout
from tests.cost.test_flops import V3


def stage_costs(costs: list[float], counts: tuple[int, ...], behind: float) -> list[float]:
    found, begin = [], 0
    for i, count in enumerate(counts):
        found.append(sum(costs[begin : begin + count]) + (behind if i == len(counts) - 1 else 0))
        begin += count
    return found


@settings(max_examples=60)
@given(st.data())
def test_no_other_cut_is_better(data: st.DataObject) -> None:
    costs = [float(cost) for cost in data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=7))]
    num_stages = data.draw(st.integers(1, min(4, len(costs))))
    behind = float(data.draw(st.integers(0, 12)))
    counts = cut(costs, num_stages, behind=behind)
    assert sum(counts) == len(costs) and len(counts) == num_stages and all(counts[:-1])
    every = (
        each
        for each in itertools.product(range(len(costs) + 1), repeat=num_stages)
        if sum(each) == len(costs) and all(each[:-1])
    )
    best = min((max(s), sum(x * x for x in s)) for s in (stage_costs(costs, each, behind) for each in every))
    mine = stage_costs(costs, counts, behind)
    assert (max(mine), sum(x * x for x in mine)) == pytest.approx(best)


def test_layers_and_what_stands_behind_them_are_all_of_the_operations() -> None:
    layers, behind = layer_costs(V3)
    assert sum(layers) + behind == pytest.approx(flops_per_token(V3, sequence_length=4096, mtp=True).total)
    assert behind / layers[10] == pytest.approx(3.92, abs=0.01)


def test_v3_on_16_places_has_one_layer_beside_its_head_and_mtp_module() -> None:
    layout = Layout(pp=16, dp=128, ep=64, zero=1, schedule="1f1b")
    assert [len(stage.layers) for stage in pipeline_stages(V3, layout)] == [4] * 15 + [1]
    dualpipe = replace(layout, schedule="dualpipe")
    assert part_at(V3, dualpipe, 0) == part_at(V3, dualpipe, 15), "mirror ranks hold the same"
    assert part_at(V3, dualpipe, 0).embedding and part_at(V3, dualpipe, 0).last


def test_measured_stages_move_layers_away_from_a_slow_one_and_stay_where_it_would_not_pay() -> None:
    layout = Layout(pp=4, schedule="1f1b", cut=(16, 16, 16, 13))
    counts = recut(V3, layout, [2.0, 1.0, 1.0, 1.0])
    assert counts is not None and 12 <= counts[0] < 16 and sum(counts) == 61, "half of the way"
    # Times that are as the first ones said lead on, until nothing is left to gain.
    layers, behind = layer_costs(V3)
    rate = [seconds / cost for seconds, cost in zip([2.0, 1.0, 1.0, 1.0], stage_costs(layers, (16, 16, 16, 13), behind), strict=True)]
    slow = [cost * rate[min(layer // 16, 3)] for layer, cost in enumerate(layers)]
    last, steps = counts, 0
    while counts is not None:
        assert all(counts[:-1]) and sum(counts) == 61
        seconds, last, steps = stage_costs(slow, counts, behind * rate[3]), counts, steps + 1
        counts = recut(V3, replace(layout, cut=counts), seconds)
    assert max(seconds) < 1.4 and last[0] < 12 and steps <= 5
