"""Steps on a measured CPU: every term is a measured figure times what is counted, and all terms add up."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from quintet.cost.traffic import step_traffic
from quintet.errors import SpecError
from quintet.plan.eager_time import QUERY_BLOCK, core_work, eager_hop, eager_update
from quintet.plan.estimate import estimate, terms
from quintet.plan.setup import Setup, of_run
from quintet.plan.software import generation
from quintet.spec import parse
from quintet.spec.cluster import Calls, Cluster, Eager, as_tree, dumps, named, read
from quintet.spec.layout import Layout
from quintet.spec.run import Recompute

FREE = Eager(**{field.name: Calls() for field in fields(Eager)})


def cluster_with(num_gpus: int = 2, **changes: Calls) -> Cluster:
    return replace(named("h100", num_gpus=num_gpus), eager=replace(FREE, **changes))


def laptop(layout: Layout, *, batch: int = 16) -> Setup:
    run = parse.read(Path(__file__).parents[2] / "recipes" / "laptop.toml")
    run = replace(run, layout=layout, train=replace(run.train, micro_batch=2), model=replace(run.model, num_mtp_modules=0))
    return of_run(run, software=generation("eager"), batch_sequences=batch, precision="bf16")


def test_where_nothing_costs_anything_a_step_takes_no_time_and_products_take_their_operations() -> None:
    assert estimate(laptop(Layout()), cluster_with(1)).seconds == 0
    one = Calls(per_flop=1e-9)
    names = ("product", "product_input", "product_weight", "grouped", "grouped_input", "grouped_weight")
    setup = laptop(Layout())
    found = estimate(setup, cluster_with(1, **dict.fromkeys(names, one)))
    a, tokens = setup.architecture, setup.batch_sequences * setup.sequence_length
    attention = 3 * a.num_layers * a.attention_flops(keys=setup.sequence_length / 2)
    assert found.seconds == pytest.approx(1e-9 * tokens * (a.flops_per_token(sequence_length=setup.sequence_length) - attention))


@pytest.mark.parametrize(
    ("layout", "kind", "calls_per_microbatch"),
    [
        (Layout(dp=2, ep=2), "exchange", 4 * 2 * 3),  # 3 mixtures of experts: 4 all-to-alls, and small messages before half of them
        (Layout(tp=2), "gather", 2 * (2 + 2 + 2 + 2) + 1 + 1),  # two of each layer and direction, one for the head, one for the embedding
        (Layout(cp=2), "send", 4 * 4),  # the payload, the payload again, and its gradient twice
    ],
)
def test_messages_of_a_layer_are_as_many_as_the_runtime_sends(layout: Layout, kind: str, calls_per_microbatch: int) -> None:
    setup = laptop(layout)
    found = estimate(setup, cluster_with(2, **{kind: Calls(call=1.0)}))
    assert found.seconds == pytest.approx(setup.num_microbatches * calls_per_microbatch, rel=0.01)


def test_zero_reduces_once_a_step_or_once_a_micro_batch() -> None:
    seconds = [
        estimate(laptop(Layout(dp=2, zero=zero)), cluster_with(scatter=Calls(per_byte=1e-9))).step.gradients  # type: ignore[arg-type]
        for zero in (0, 1, 2, 3)
    ]
    assert seconds[0] == 0 < seconds[1]
    assert seconds[2] == seconds[3] == pytest.approx(4 * seconds[1])
    gathered = [
        estimate(laptop(Layout(dp=2, zero=zero)), cluster_with(gather=Calls(per_byte=1e-9))).step.weights  # type: ignore[arg-type]
        for zero in (1, 3)
    ]
    a = laptop(Layout()).architecture
    root = 2e-9 * a.vocab_size * a.hidden_size * (1 if a.tie_embeddings else 2) / 2  # embedding and head stay whole in a step
    assert gathered[1] == pytest.approx(8 * gathered[0] - 7 * root)


def test_attention_in_blocks_does_all_of_the_diagonal_ones() -> None:
    assert core_work(1, QUERY_BLOCK, heads=1, widths=1) == (1, 2 * QUERY_BLOCK**2)
    assert core_work(1, 2 * QUERY_BLOCK, heads=1, widths=1) == (2, 2 * 3 * QUERY_BLOCK**2)


def test_a_cluster_with_measured_calls_survives_its_file_and_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    cluster = cluster_with(gather=Calls(call=1e-4, per_byte=1e-9))
    path = tmp_path / "cluster.toml"
    path.write_text(dumps(cluster))
    assert read(path) == cluster
    path.write_text(dumps(cluster).replace("[eager.gather]", "[eager.gahter]"))
    with pytest.raises(SpecError, match=r"gahter.*did you mean.*gather"):
        read(path)
    path.write_text(dumps(cluster).replace("per_byte = 1e-09", "per_byte = -1e-09"))
    with pytest.raises(SpecError, match="per_byte"):
        read(path)
    assert "eager" not in as_tree(named("h100", num_gpus=2))


def test_what_if_changes_measured_calls_as_well() -> None:
    product, send = Calls(call=1.0, per_flop=2.0, per_byte=4.0), Calls(call=1.0, per_byte=4.0)
    cluster = cluster_with(product=product, send=send, update=Calls(per_byte=1.0))
    faster = cluster.scaled({"compute": 2.0, "link": 4.0, "memory_bandwidth": 2.0})
    assert faster.eager is not None
    assert faster.eager.product == Calls(call=1.0, per_flop=1.0, per_byte=2.0)
    assert eager_hop(faster, 1.0) == 2.0
    assert eager_update(faster, 1.0) == eager_update(cluster, 1.0) / 2


def test_every_layout_of_two_ranks_has_a_positive_time_whose_terms_add_up() -> None:
    cluster = cluster_with(**dict.fromkeys((field.name for field in fields(Eager)), Calls(call=1e-5, per_flop=1e-11, per_byte=1e-9)))
    for layout in (Layout(dp=2), Layout(tp=2), Layout(cp=2), Layout(dp=2, ep=2, zero=3), Layout(pp=2, schedule="zbv")):
        found = terms(estimate(laptop(layout), cluster))
        parts = {name: value for name, value in found.items() if name.startswith("time.") and name != "time.total"}
        assert found["time.total"] == pytest.approx(sum(parts.values()))
        assert found["time.total"] > 0
        assert all(value >= 0 for name, value in parts.items() if name != "time.overlap")


LAYOUTS = [
    Layout(dp=dp, tp=tp, cp=cp, ep=ep, expert_tp=split, zero=zero)
    for dp, tp, cp, ep, split in (
        (2, 1, 1, 1, 1),
        (4, 1, 1, 4, 1),
        (1, 2, 1, 1, 1),
        (2, 2, 1, 2, 1),
        (2, 2, 1, 2, 2),
        (1, 1, 4, 2, 1),
        (2, 2, 2, 4, 1),
    )
    for zero in (0, 1, 3)
    if zero == 0 or dp > 1
]


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_messages_are_those_that_cost_counts(layout: Layout, recompute: Recompute) -> None:
    """With a second per byte of every message and nothing else, a step takes as many seconds as a rank sends bytes."""
    run = parse.read(Path(__file__).parents[2] / "recipes" / "v3-16b.toml")
    run = replace(run, layout=layout, train=replace(run.train, micro_batch=2, recompute=recompute))
    setup = of_run(run, software=generation("eager"), batch_sequences=8, precision="bf16")
    messages = dict.fromkeys(("gather", "scatter", "reduce", "exchange", "send"), Calls(per_byte=1.0))
    planned = estimate(setup, cluster_with(layout.num_ranks, **messages)).seconds
    counted = step_traffic(setup.model or run.model, run.train, layout, sequence_length=setup.sequence_length, batch_sequences=8)
    besides = sum(counted.pop(axis) for axis in ("sequence", "dp", "world"))  # experts' counts and losses, a few KB
    assert besides < 0.01 * planned
    # Recomputation stops before the last sums of a block, which the plan sends again.
    assert planned == pytest.approx(sum(counted.values()), rel=0.01 if recompute == "none" else 0.025)


def test_a_message_between_stages_is_what_cost_counts() -> None:
    run = parse.read(Path(__file__).parents[2] / "recipes" / "v3-16b.toml")
    run = replace(run, layout=Layout(pp=4, dp=2, tp=2, schedule="1f1b"), train=replace(run.train, micro_batch=2))
    setup = of_run(run, software=generation("eager"), batch_sequences=32, precision="bf16")
    cluster = cluster_with(16, send=Calls(per_byte=1.0))
    one = eager_hop(cluster, setup.tokens / 2 * setup.architecture.hidden_size * 2)
    counted = step_traffic(run.model, run.train, run.layout, sequence_length=setup.sequence_length, batch_sequences=32)
    assert counted["pp"] == setup.num_microbatches * one  # the first rank sends activations on, and no gradients
