"""The bytes of a step by axis: what is alone sends nothing, and what is known of ZeRO and V3 holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quintet.cost.balance import part_at
from quintet.cost.flops import parameters
from quintet.cost.traffic import step_traffic
from quintet.cost.zero_comm import bucket_sizes, gradient_bytes, num_replicas, weight_bytes
from quintet.errors import SpecError
from quintet.spec.layout import GROUPS, HOLDERS, Layout
from quintet.spec.model import Model
from quintet.spec.run import Train
from tests.cost.test_flops import V3
from tests.spec.strategies import layouts, models

BF16 = Train(precision="bf16")


def sent(layout: Layout, *, model: Model = V3, train: Train = BF16, batch: int = 512, rank: int = 0) -> dict[str, float]:
    return step_traffic(model, train, layout, sequence_length=4096, batch_sequences=batch, rank=rank)


def test_one_device_sends_nothing() -> None:
    found = sent(Layout())
    assert found.keys() == {*GROUPS, "world"}
    assert not any(found.values())


@settings(max_examples=40, deadline=None)
@given(models(), st.data())
def test_an_axis_sends_something_just_where_it_has_more_than_one_rank(model: Model, data: st.DataObject) -> None:
    layout = data.draw(layouts(model, [48]).filter(lambda layout: layout.num_ranks <= 64))
    rank = data.draw(st.integers(0, layout.num_ranks - 1))
    batch = layout.dp * BF16.micro_batch * 2 * layout.pp
    found = step_traffic(model, BF16, layout, sequence_length=48, batch_sequences=batch, rank=rank)
    ranks = {axis: len(layout.group_of(rank, axis)) for axis in GROUPS} | {"world": layout.num_ranks}
    place = layout.coordinates(rank).pp
    part = part_at(model, layout, place)
    has_moe = any(layer >= model.num_dense_layers for layer in part.layers) or (part.last and model.num_mtp_modules > 0)
    held = {bucket.holders for bucket in bucket_sizes(model, layout, place=place)}
    for axis, count in ranks.items():
        used = {"stage": False, "sequence": has_moe, "ep": has_moe}.get(axis, axis.partition(".")[0] in {*held, axis})
        assert (found[axis] > 0) == (used and count > 1), axis


@settings(max_examples=40)
@given(models(), st.data())
def test_replicas_are_as_many_as_their_group(model: Model, data: st.DataObject) -> None:
    layout = data.draw(layouts(model, [48]).filter(lambda layout: layout.num_ranks <= 256))
    for holders in HOLDERS:
        if not holders.startswith("expert") or layout.ep > 1:
            assert num_replicas(layout, holders) == len(layout.group_of(0, f"{holders}.replicate")), holders


def test_zero_sends_what_an_all_reduce_sends_and_with_sharded_weights_half_as_much_again() -> None:
    # In fp32 and with whole multiples of the alignment: a reduce-scatter and a gather are an all-reduce, stage 3 gathers twice.
    model = replace(V3, num_layers=4, num_routed_experts=16, num_groups=1, num_groups_per_token=1, num_mtp_modules=0)
    train, count = Train(precision="fp32"), parameters(model).total
    by_stage = [sum(v for k, v in sent(Layout(dp=8, zero=z), model=model, train=train, batch=8).items() if "." in k) for z in (0, 1, 2, 3)]
    whole = 2 * 4 * count * 7 / 8
    assert by_stage[:3] == pytest.approx([whole] * 3, rel=1e-4)
    root = model.vocab_size * model.hidden_size * 2
    assert by_stage[3] == pytest.approx(whole + 4 * (count - root) * 7 / 8, rel=1e-4)


def test_micro_batches_repeat_reductions_from_stage_2_on_and_gathers_at_stage_3() -> None:
    for stage, reductions, gathers in ((1, 1, 1), (2, 5, 1), (3, 5, 10)):
        layout = Layout(dp=4, zero=stage)
        buckets = [bucket for bucket in bucket_sizes(V3, layout) if not bucket.root]
        once = 4 * sum(bucket.numel for bucket in buckets) * 3 // 4
        assert gradient_bytes(buckets, layout, micro_batches=5)["replicated.shard"] == reductions * once
        assert weight_bytes(buckets, layout, micro_batches=5, element_bytes=2)["replicated.shard"] == gathers * once // 2


def test_padding_is_a_small_part_of_a_published_models_buckets() -> None:
    layout = Layout(dp=2048, ep=64, zero=1)
    buckets = bucket_sizes(V3, layout)
    padded = {kind: sum(bucket.numel for bucket in buckets if bucket.holders == kind) for kind in ("replicated", "expert")}
    routed = 3 * 7168 * 2048 * 256 * 59 // 64
    assert padded["expert"] == routed
    assert padded["replicated"] == pytest.approx(parameters(V3).total_with_mtp - 64 * routed, rel=2e-3)
    assert padded["replicated"] > parameters(V3).total_with_mtp - 64 * routed


def test_rows_of_v3_to_other_nodes_outweigh_all_else_at_its_published_layout() -> None:
    # V3's rank sees 4 sequences of 4,096 tokens, and each goes to 7.36 of 64 ranks: 7,168 values there and back, in bf16, forward and
    # backward, and beside them 8 gates in fp32 and, forward, 8 numbers of experts.
    found = sent(Layout(dp=64, ep=64, zero=1), train=Train(micro_batch=4), batch=256)
    rows = 59 * 4 * 4096 * 7.35937 * 63 / 64
    assert found["ep"] == pytest.approx(rows * (4 * 7168 * 2 + 8 * (4 + 2) + 8 * 4) + 59 * 16 * 63, rel=1e-5)
    assert found["ep"] > sum(value for axis, value in found.items() if axis != "ep")


def test_experts_that_are_split_cost_a_step_within_a_node_and_spare_the_way_between() -> None:
    whole, split = (sent(Layout(dp=8, tp=8, ep=8, expert_tp=size), batch=8) for size in (1, 8))
    assert split["ep"] == whole["ep"] > 0 and split["tp"] > whole["tp"]


def test_a_rank_with_fewer_sequences_sends_less_of_them_and_as_much_of_the_weights() -> None:
    layout = Layout(dp=4, tp=2, cp=2, zero=2)
    more, fewer = (sent(layout, batch=6, rank=layout.num_ranks * dp // 4) for dp in (1, 2))
    assert fewer["cp"] * 2 == more["cp"] > 0
    assert fewer["tp"] * 2 == more["tp"] > 0
    assert {k: v for k, v in more.items() if "." in k} == {k: v for k, v in fewer.items() if "." in k}


def test_a_pipeline_hands_every_micro_batch_on_once_each_way_and_sums_what_lies_twice() -> None:
    # 16 replicas of 4 sequences of 4,096 tokens in micro-batches of 1: 7,168 values of 2 bytes for each token.
    message = 4096 * 7168 * 2
    layout, train = Layout(pp=4, dp=16, ep=16, zero=1, schedule="1f1b"), Train(micro_batch=1)
    by_place = [sent(layout, train=train, batch=64, rank=place * 16) for place in range(4)]
    assert [found["pp"] / message for found in by_place] == [4, 8, 8, 4]
    # The embedding is at both ends, once for MTP, and each end sums it with the other: all 32 holders share its shards.
    assert [found["both_ends.shard"] > 0 for found in by_place] == [True, False, False, True]
    # A v has the embedding once; its turn at the last place is no message.
    v = [sent(replace(layout, schedule="zbv"), train=train, batch=64, rank=place * 16) for place in range(4)]
    assert [found["pp"] / message for found in v] == [8, 16, 16, 8]
    # DualPipe holds every stage twice: a rank has twice the weights, and each is summed over twice the ranks.
    twice = [sent(replace(layout, schedule="dualpipe"), train=train, batch=128, rank=place * 16) for place in range(4)]
    assert [found["pp"] / message for found in twice] == [8, 16, 16, 8]
    once_each, twice_each = (sum(found["replicated.shard"] for found in places) for places in (by_place, twice))
    assert twice_each == pytest.approx(2 * once_each * (31 / 32) / (15 / 16), rel=1e-3)


def test_a_pipeline_wants_the_micro_batches_of_its_schedule() -> None:
    with pytest.raises(SpecError, match=r"micro-batches"):
        sent(Layout(pp=4, schedule="dualpipev"), train=Train(micro_batch=1), batch=4)
