"""Seconds of products, attention and collectives: never faster than the device, and slower for more work."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quintet.plan.rates import attention_seconds, exchange_seconds, gather_seconds, product_seconds, within
from quintet.spec.cluster import CATALOGUE, named

DEVICE = {"rate": 1e12, "bandwidth": 1e11, "cores": 100, "size": 2.0, "ramp": 256.0}
sizes = st.integers(1, 20_000)


@settings(max_examples=100, deadline=None)
@given(rows=sizes, outputs=sizes, inputs=sizes)
def test_a_product_is_bound_by_arithmetic_and_by_traffic(rows: int, outputs: int, inputs: int) -> None:
    seconds = product_seconds(rows, outputs, inputs, **DEVICE)  # type: ignore[arg-type]
    assert seconds >= 2 * rows * outputs * inputs / DEVICE["rate"]
    assert seconds >= (rows * inputs + inputs * outputs + rows * outputs) * 2 / DEVICE["bandwidth"]


@settings(max_examples=60, deadline=None)
@given(rows=sizes, outputs=sizes, inputs=sizes, more=st.integers(1, 5000))
def test_more_rows_never_take_less_time(rows: int, outputs: int, inputs: int, more: int) -> None:
    few, many = (product_seconds(n, outputs, inputs, **DEVICE) for n in (rows, rows + more))  # type: ignore[arg-type]
    assert many >= few * (1 - 1e-12)


def test_large_products_reach_the_rate_and_grouped_ones_of_few_rows_do_not() -> None:
    fast = product_seconds(12800, 25600, 16384, **DEVICE)  # type: ignore[arg-type]
    assert 2 * 12800 * 25600 * 16384 / fast == pytest.approx(1e12, rel=0.01)
    narrow = product_seconds(12, 25600, 16384, count=1000, **DEVICE)  # type: ignore[arg-type]
    assert narrow > 1.5 * product_seconds(12000, 25600, 16384, **DEVICE)  # type: ignore[arg-type]


def test_attention_reaches_what_was_measured_at_4k_and_16k() -> None:
    gpu = CATALOGUE["h100"].gpu
    for keys, backward, rate in ((4096, False, 553), (16384, False, 638), (4096, True, 422), (16384, True, 523)):
        assert 1e12 / attention_seconds(gpu, 1e12, keys=keys, backward=backward) / 1e12 == pytest.approx(rate, rel=0.01)


def test_a_gather_between_nodes_uses_every_card_of_the_group_in_a_node() -> None:
    cluster = named("h100", num_gpus=64)
    assert gather_seconds(cluster, 1e9, ranks=1, stride=1) == 0
    inside, across, sparse = (gather_seconds(cluster, 1e9, ranks=n, stride=s) for n, s in ((8, 1), (64, 1), (8, 8)))
    assert inside < across < sparse
    assert sparse == pytest.approx(1e9 * 7 / 8 / cluster.network.effective, rel=0.01)
    assert across == pytest.approx(1e9 * 7 / 8 / (8 * cluster.network.effective), rel=0.05)


def test_an_exchange_is_over_with_its_slower_part() -> None:
    cluster = named("h800", num_gpus=64)
    both = exchange_seconds(cluster, far_bytes=1e8, near_bytes=1e8, domains=8)
    assert both == pytest.approx(1e8 / cluster.network.effective, rel=0.02)
    assert exchange_seconds(cluster, far_bytes=0, near_bytes=0, domains=1) == 0


@given(ranks=st.integers(1, 512), stride=st.integers(1, 64))
def test_neighbours_of_a_group_in_a_domain_are_as_many_as_fit(ranks: int, stride: int) -> None:
    near = within(named("h100", num_gpus=512), ranks=ranks, stride=stride)
    assert 1 <= near <= ranks
    assert near * stride <= max(8, stride)
