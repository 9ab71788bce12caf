"""The degrees of parallelism: who sits where, which ranks form a group, and what is refused with which remedy."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from quintet.errors import SpecError
from quintet.spec import parse
from quintet.spec.layout import ARRANGEMENT, GROUPS, HOLDERS, Layout, broken_rules, without_effect
from quintet.spec.legal import fewer_ranks, nearest_legal, require_legal
from quintet.spec.model import Model
from quintet.spec.placement import Box, is_expert, local_box, placement
from tests.spec.strategies import layouts, models

V3 = parse.read(Path(__file__).parents[2] / "recipes" / "v3-671b.toml").model


@st.composite
def small_layouts(draw: st.DrawFn) -> Layout:
    """Legal layouts of few ranks."""
    model = draw(models())
    layout = draw(layouts(model, [2 * draw(st.integers(1, 8))]))
    assume(layout.num_ranks <= 256)
    return layout


def partition(layout: Layout, axis: str) -> set[tuple[int, ...]]:
    """All groups of an axis, which `groups` lists in order."""
    found = {layout.group_of(rank, axis) for rank in range(layout.num_ranks)}
    assert layout.groups(axis) == sorted(found)
    return found


@settings(max_examples=25)
@given(small_layouts())
def test_the_groups_of_every_axis_divide_the_ranks_into_equal_parts(layout: Layout) -> None:
    sizes = {"tp": layout.tp, "cp": layout.cp, "ep": layout.ep, "pp": layout.pp, "sequence": layout.cp * layout.tp}
    for axis in GROUPS:
        groups = partition(layout, axis)
        assert sorted(rank for group in groups for rank in group) == [*range(layout.num_ranks)], axis
        if not axis.startswith("both_ends"):
            assert len({len(group) for group in groups}) == 1, axis
        if axis in sizes:
            assert {len(group) for group in groups} == {sizes[axis]}


@settings(max_examples=25)
@given(small_layouts())
def test_shards_times_equal_shards_are_all_holders_of_a_parameter(layout: Layout) -> None:
    for name, holders in HOLDERS.items():
        for rank in {0, layout.num_ranks // 2, layout.num_ranks - 1}:
            key = holders(layout, layout.coordinates(rank))
            same = [other for other in range(layout.num_ranks) if holders(layout, layout.coordinates(other)) == key]
            shard, equal = layout.group_of(rank, f"{name}.shard"), layout.group_of(rank, f"{name}.replicate")
            reached = sorted({other for near in shard for other in layout.group_of(near, f"{name}.replicate")})
            assert reached == same and len(shard) * len(equal) == len(same)
            assert set(shard) & set(equal) == {rank}
            if not layout.zero:
                assert shard == (rank,)


def test_ranks_are_numbered_with_tp_innermost_and_experts_are_shared_out_among_neighbours() -> None:
    layout = Layout(dp=2, cp=2, tp=2, ep=2)
    assert layout.group_of(0, "tp") == (0, 1) and layout.group_of(0, "cp") == (0, 2) and layout.group_of(0, "ep") == (0, 2)
    assert layout.group_of(5, "sequence") == (4, 5, 6, 7)
    assert [layout.coordinates(5).along(axis) for axis in ("pp", "dp", "cp", "tp", "ep", "expert_dp")] == [0, 1, 0, 1, 0, 1]


def test_with_hybrid_sharding_the_replicas_of_one_expert_stay_within_their_shards() -> None:
    layout = Layout(dp=8, ep=2, zero=1, zero_ranks=4)
    assert partition(layout, "replicated.shard") == {(0, 1, 2, 3), (4, 5, 6, 7)}
    assert partition(layout, "expert.shard") == {(0, 2), (1, 3), (4, 6), (5, 7)}
    assert partition(layout, "expert.replicate") == {(0, 4), (1, 5), (2, 6), (3, 7)}


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (Layout(tp=3), "model.num_heads (128) must be divisible by layout.tp (3); choose layout.tp from 1, 2, 4, 8,"),
        (Layout(dp=9, ep=9, node_size=9), "model.num_routed_experts (256) must be divisible by layout.ep (9)"),
        (Layout(dp=6, ep=4), "layout.dp x cp (6) must be divisible by layout.ep (4); choose layout.ep from 1, 2, 3, 6"),
        (Layout(cp=3), "sequence_length (4096) must be divisible by 2 x layout.cp (6)"),
        (Layout(tp=4, expert_tp=2), "layout.expert_tp (2) must be 1 or layout.tp (4)"),
        (Layout(pp=64, schedule="1f1b"), "layout.pp (64) with 1f1b makes 64 stages, which must be at most model.num_layers (61)"),
        (Layout(pp=32), "makes 64 stages (2 on each rank), which must be at most model.num_layers (61); 1f1b and zb1p put one"),
        (Layout(pp=3, schedule="dualpipe", node_size=1), "layout.pp (3) must be even for dualpipe"),
        (Layout(pp=2, schedule="interleaved", chunks=1), "layout.chunks (1) must be at least 2 for interleaved"),
        (Layout(pp=2, zero=2, dp=2), "layout.zero (2) must be 0 or 1 where layout.pp (2) is above 1"),
        (Layout(pp=2, schedule="1f1b", cut=(61, 1)), "layout.cut (61, 1) must share out model.num_layers (61) to 2 stages"),
        (Layout(pp=3, schedule="1f1b", cut=(61, 0, 0), node_size=1), "at least one to each but the last"),
        (Layout(cut=(61,)), "layout.cut (61) needs layout.pp above 1"),
        (Layout(dp=8, zero=1, zero_ranks=3), "layout.dp x cp (8) must be divisible by layout.zero_ranks (3)"),
        (Layout(dp=8, zero_ranks=2), "layout.zero_ranks (2) needs layout.zero of 1, 2 or 3"),
        (Layout(dp=24, ep=6, zero=1, zero_ranks=8), "layout.zero_ranks (8) must divide layout.ep (6) or be a multiple of it"),
        (Layout(dp=12), "12 ranks must fill whole nodes of layout.node_size (8)"),
    ],
)
def test_an_illegal_layout_is_refused_with_the_rule_the_values_and_legal_ones(layout: Layout, expected: str) -> None:
    with pytest.raises(SpecError) as error:
        require_legal(layout, V3, [4096])
    rules, _, near = str(error.value).partition("\nnearest legal layouts:")
    assert expected in rules
    assert len(near.strip().splitlines()) == 3


@settings(max_examples=15)
@given(models(), st.integers(1, 64), st.data())
def test_what_is_proposed_instead_is_legal(model: Model, length: int, data: Any) -> None:
    degrees = data.draw(st.fixed_dictionaries({name: st.integers(1, 12) | st.integers(1, 1000) for name in ("dp", "tp", "pp", "ep", "cp")}))
    others = data.draw(st.fixed_dictionaries({name: st.integers(1, 8) for name in ("expert_tp", "zero_ranks", "node_size", "chunks")}))
    layout = Layout(**degrees, **others, zero=data.draw(st.sampled_from([0, 1, 2, 3])), schedule=data.draw(st.sampled_from([*ARRANGEMENT])))
    near = nearest_legal(layout, model, [length])
    assert near
    for other in near:
        assert broken_rules(other, model, [length]) == []


def test_far_from_anything_legal_a_layout_is_still_proposed_on_the_nearest_degrees() -> None:
    near = nearest_legal(Layout(dp=1000, tp=100, ep=60, expert_tp=3, zero=3, zero_ranks=7), V3, [4096])
    assert near and all(broken_rules(other, V3, [4096]) == [] for other in near)
    assert all(other.tp in (64, 128) and other.ep in (32, 64) and other.dp in range(900, 1100) for other in near)


def test_the_published_and_the_largest_layouts_are_legal() -> None:
    for layout in (Layout(pp=16, dp=128, ep=64, zero=1), Layout(pp=16, dp=512, ep=64, zero=1), Layout(pp=4, dp=4, ep=4)):
        require_legal(layout, V3, [4096])
    eight_thousand = Layout(pp=16, dp=512, ep=64)
    assert eight_thousand.num_ranks == 8192 and eight_thousand.expert_dp == 8
    assert [len(eight_thousand.group_of(8191, axis)) for axis in ("pp", "ep", "expert.replicate")] == [16, 64, 8]


def test_the_table_places_parameters_by_their_names() -> None:
    expected = {
        "embed.weight": {"tp": 0},
        "head.weight": {"tp": 0},
        "norm.weight": {},
        "layers.3.attention.wq_a.weight": {},
        "layers.3.attention.wq_b.weight": {"tp": 0},
        "layers.3.attention.wkv_a.weight": {},
        "layers.3.attention.wo.weight": {"tp": 1},
        "layers.0.ffn.w13": {"tp": 1},
        "layers.3.ffn.shared.w2": {"tp": 1},
        "layers.3.ffn.experts.w13": {"ep": 0, "expert_tp": 2},
        "layers.3.ffn.router.weight": {},
        "mtp.0.eh_proj.weight": {},
        "mtp.0.block.attention.wkv_b.weight": {"tp": 0},
    }
    assert {name: dict(placement(name)) for name in expected} == expected
    assert [name for name in expected if is_expert(name)] == ["layers.3.ffn.experts.w13"]


@given(small_layouts(), st.sampled_from(["layers.1.ffn.experts.w2", "embed.weight", "layers.0.attention.wo.weight", "norm.weight"]))
@settings(max_examples=25)
def test_the_boxes_of_all_ranks_of_a_stage_cover_a_parameter_without_a_gap(layout: Layout, name: str) -> None:
    shape = {3: (840, 2, 840), 2: (840, 840), 1: (840,)}[3 if "experts" in name else 1 if name == "norm.weight" else 2]
    assume(all(shape[dim] % layout.degree(axis) == 0 for axis, dim in placement(name).items()))
    boxes = {local_box(name, shape, layout, rank) for rank in range(layout.num_ranks // layout.pp)}
    assert sum(math.prod(box.sizes) for box in boxes) == math.prod(shape)
    assert all(isinstance(box, Box) and all(o % s == 0 for o, s in zip(box.offsets, box.sizes, strict=True)) for box in boxes)


def test_a_layout_says_what_it_is_in_few_words() -> None:
    assert str(Layout()) == "one device"
    assert str(replace(Layout(pp=16, dp=128, ep=64), zero=1, zero_ranks=8)) == "pp=16 dp=128 ep=64 zero=1 zero_ranks=8 dualpipev"
    assert str(Layout(pp=4, schedule="interleaved", chunks=3)) == "pp=4 interleaved3"


@settings(max_examples=15)
@given(models(), st.integers(1, 40), st.data())
def test_a_layout_of_fewer_ranks_divides_the_same_dimensions(model: Model, most: int, data: Any) -> None:
    layout = data.draw(layouts(model, [48]).filter(lambda layout: layout.num_ranks <= 256))
    fewer = fewer_ranks(layout, model, [48], most=most)
    if fewer is None:
        return
    assert fewer.num_ranks <= most and broken_rules(fewer, model, [48]) == []
    for axis in ("dp", "tp", "pp", "ep", "cp", "expert_tp"):
        assert (fewer.degree(axis) > 1) == (layout.degree(axis) > 1), axis
    assert (fewer.zero, fewer.pipeline) == (layout.zero, layout.pipeline)


def test_the_published_layout_fits_sixteen_ranks_with_every_dimension_divided() -> None:
    fewer = fewer_ranks(Layout(pp=16, dp=128, ep=64, zero=1), V3, [4096], most=16)
    assert fewer == Layout(pp=2, dp=8, ep=4, zero=1)
    assert fewer.options == "--layout.pp 2 --layout.dp 8 --layout.ep 4"
    hybrid = fewer_ranks(Layout(dp=64, cp=4, tp=8, ep=32, expert_tp=8, zero=3, zero_ranks=32), V3, [4096], most=16)
    assert hybrid == Layout(dp=4, cp=2, tp=2, ep=4, expert_tp=2, zero=3, zero_ranks=8)
    assert fewer_ranks(Layout(dp=8, tp=8, cp=8), V3, [4096], most=7) is None


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ((31, 29), "to 2 stages, .*: it shares out 60, 1 too few"),
        ((31, 32), ": it shares out 63, 2 too many"),
        ((20, 20, 21), ": it is for 3"),
        ((0, 61), ": stage 0 has 0"),
        ((70, -9), ": stage 1 has -9"),
    ],
)
def test_a_wrong_cut_says_by_how_much(cut: tuple[int, ...], expected: str) -> None:
    with pytest.raises(SpecError, match=expected):
        require_legal(Layout(pp=2, schedule="1f1b", cut=cut), V3, [4096])
    require_legal(Layout(pp=2, schedule="1f1b", cut=(61, 0)), V3, [4096])


def test_what_has_no_effect_is_told() -> None:
    assert without_effect(Layout(pp=2, schedule="interleaved", chunks=3, dp=4, zero=1, zero_ranks=2)) == []
    assert without_effect(Layout(schedule="zbv", zero=1)) == [
        "layout.schedule (zbv) has no effect: layout.pp is 1",
        "layout.zero (1) has no effect: a single device has nobody to share with",
    ]
    assert without_effect(Layout(pp=2, chunks=3)) == [
        "layout.chunks (3) has no effect: zbv has its own number of stages; interleaved and interleaved-zb take it"
    ]
    assert without_effect(Layout(dp=4, zero=1, zero_ranks=4)) == [
        "layout.zero_ranks (4) has no effect: there are as many replicas, which is the default"
    ]
