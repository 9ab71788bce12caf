"""How many weights a rank holds: as many as on one device in all, and as many ranks share them as their group has."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from quintet.cost.flops import parameters
from quintet.cost.shard import held, num_shards
from quintet.spec.layout import HOLDERS, Layout
from quintet.spec.model import Model
from tests.cost.test_flops import V3
from tests.spec.strategies import layouts, models


@given(models())
def test_one_device_holds_every_weight(model: Model) -> None:
    assert held(model, Layout()).total.total() == parameters(model).total_with_mtp


@settings(max_examples=40)
@given(models(), st.data())
def test_all_ranks_together_hold_every_weight_once_per_holder(model: Model, data: Any) -> None:
    layout = data.draw(layouts(model, [64]))
    found: Counter[str] = Counter()
    for place in range(layout.pp):
        first = place * layout.num_ranks // layout.pp
        for holders, count in held(model, layout, place=place).total.items():
            copies = len(layout.group_of(first, f"{holders}.shard")) * len(layout.group_of(first, f"{holders}.replicate"))
            found[f"{holders}/{copies}"] += count * (layout.num_ranks // layout.pp)
    assert sum(count // int(key.partition("/")[2]) for key, count in found.items()) == parameters(model).total_with_mtp


@settings(max_examples=60)
@given(models(), st.data())
def test_a_weight_has_as_many_shards_as_its_group_has_ranks(model: Model, data: Any) -> None:
    layout = data.draw(layouts(model, [64]))
    assume(layout.num_ranks <= 512)
    for holders in HOLDERS:
        if holders.startswith("expert") and layout.ep == 1:
            continue  # experts that are not divided have other holders
        assert num_shards(layout, holders) == len(layout.group_of(0, f"{holders}.shard")), holders


@pytest.mark.parametrize(("place", "layers", "billions"), [(0, 1, 3.086), (1, 4, 1.637), (15, 2, 2.774)])
def test_a_rank_of_the_published_layout_holds_a_64th_of_the_experts_of_its_layers(place: int, layers: int, billions: float) -> None:
    total = held(V3, Layout(pp=16, dp=128, ep=64, zero=1, schedule="1f1b"), place=place).total
    assert total["expert"] == layers * 4 * 3 * 7168 * 2048
    assert total.total() / 1e9 == pytest.approx(billions, abs=1e-3)
