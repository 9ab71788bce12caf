"""Experts with a capacity: who is dropped, and that a dropped expert is one with gate 0."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quintet.checkpoint import hub_config
from quintet.errors import CheckpointError, SpecError
from quintet.model.crossing import straight
from quintet.model.moe import MixtureOfExperts, local_dispatch
from quintet.model.router import NothingAhead, Routing, within_capacity
from quintet.ops.pointwise import REFERENCE
from tests.checkpoint.models import like_small
from tests.model.build import build, loss_of, some_tokens


def routed(experts: Tensor, num_experts: int) -> Routing:
    """experts [T, K] with gates of 0.5."""
    return Routing(experts, torch.full(experts.shape, 0.5), torch.rand(len(experts), num_experts))


def limited(experts: list[list[int]], num_sequences: int, factor: float, *, num_experts: int = 2) -> Routing:
    return within_capacity(routed(torch.tensor(experts), num_experts), num_sequences, factor, ahead=NothingAhead())


def test_each_expert_takes_the_earlier_tokens_of_each_sequence() -> None:
    got = limited([[0], [0], [0], [1], [1], [0], [1], [1]], 2, 1.0)  # ceil(1.0 x 4 tokens x 1 / 2 experts) = 2
    assert got.experts.flatten().tolist() == [0, 0, 2, 1, 1, 0, 1, 2]
    assert got.gates.flatten().tolist() == [0.5, 0.5, 0.0, 0.5, 0.5, 0.5, 0.5, 0.0]
    assert got.dropped is not None and got.dropped.tolist() == [1, 1]


def test_the_capacity_is_computed_from_the_decimals_that_were_written() -> None:
    got = limited([[0]] * 20, 1, 1.1)  # 1.1 x 20 / 2 is 11, but 11.000000000000002 in binary
    assert got.dropped is not None and got.dropped.tolist() == [9, 0]


def test_a_small_factor_leaves_room_for_one() -> None:
    got = limited([[0, 1], [1, 0], [2, 1]], 1, 0.001, num_experts=3)
    assert got.experts.tolist() == [[0, 1], [3, 3], [2, 3]]


@given(st.integers(0, 3), st.integers(1, 12), st.integers(1, 5), st.data(), st.floats(0.05, 3.0))
def test_no_expert_takes_more_than_its_capacity_and_none_less_than_it_could(
    num_sequences: int, length: int, num_experts: int, data: st.DataObject, factor: float
) -> None:
    per_token = data.draw(st.integers(1, num_experts))
    experts = torch.rand(num_sequences * length, num_experts).topk(per_token).indices
    got = within_capacity(routed(experts, num_experts), num_sequences, factor, ahead=NothingAhead())
    assert got.dropped is not None
    counts = [experts.view(num_sequences, -1 if num_sequences else 1) == e for e in range(num_experts)]
    kept = [got.experts.view(num_sequences, -1 if num_sequences else 1) == e for e in range(num_experts)]
    for expert in range(num_experts):
        asked, taken = counts[expert].sum(1), kept[expert].sum(1)
        assert bool((taken == asked.clamp(max=max(int(taken.max()), 1) if num_sequences else 1)).all())
        assert int((asked - taken).sum()) == int(got.dropped[expert])
        full = asked > taken
        assert bool((taken[full] >= factor * length * per_token / num_experts).all())
        assert bool((taken <= factor * length * per_token / num_experts + 1).all())


@pytest.mark.parametrize(("per_token", "factor"), [(1, 1.1), (3, 0.5), (3, 100.0)])
def test_a_dropped_expert_is_one_with_gate_0(per_token: int, factor: float) -> None:
    model = like_small(capacity_factor=factor, num_experts_per_token=per_token, num_shared_experts=0, expert_ffn_size=16)
    layer = MixtureOfExperts(model, kernels=REFERENCE)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.0, parameter.shape[-1] ** -0.5)
    layer.router.expert_bias.copy_(torch.arange(8) * 0.1)
    x = torch.randn(2, 40, model.hidden_size, requires_grad=True)

    def gated_with_0(x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        routing = layer.router(tokens)
        got = within_capacity(routing, 2, factor, ahead=NothingAhead())
        assert got.dropped is not None and bool(got.dropped.any()) == (factor < 100)
        steps = local_dispatch(tokens, Routing(routing.experts, got.gates, got.scores), layer.experts, lambda: ())
        return straight(steps)[0].view_as(x)

    out, statistics = layer(x)
    whole = gated_with_0(x)
    torch.testing.assert_close(out, whole)
    assert int(statistics.load.sum()) == 80 * per_token, "the load is what was asked for"
    direction = torch.randn_like(out)
    inputs = (x, *layer.parameters())
    for ours, theirs in zip(torch.autograd.grad(out, inputs, direction), torch.autograd.grad(whole, inputs, direction), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_follows_does_not_change_what_came_before() -> None:
    net = build(like_small(capacity_factor=0.5))
    tokens = some_tokens(net.model, 1, 12)
    other = tokens.clone()
    other[0, 8:] = (other[0, 8:] + 1) % net.model.vocab_size
    torch.testing.assert_close(net(tokens).hidden[:, :8], net(other).hidden[:, :8])


def test_the_loss_reports_what_was_dropped() -> None:
    net = build(like_small(capacity_factor=0.5))
    tokens = some_tokens(net.model, 2, 13)
    loss = loss_of(net, tokens[:, :-1], tokens[:, 1:])
    assert loss.dropped.shape == loss.load.shape and bool((loss.dropped.sum(1) > 0).all())
    # Few experts are chosen by all 24 tokens; of each sequence's 12 they take ceil(0.5 x 12 x 3 / 8) = 3.
    assert loss.load[0].unique().tolist() == [0, 24] and loss.dropped[0].unique().tolist() == [0, 18]


def test_a_capacity_must_be_positive_and_cannot_be_exported() -> None:
    for factor in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(SpecError, match="capacity_factor"):
            like_small(capacity_factor=factor)
    with pytest.raises(CheckpointError, match=r"capacity_factor \(1.1\)"):
        hub_config.from_model(like_small(capacity_factor=1.1), dtype="float32", bos_token_id=None, eos_token_id=None)
