"""The mixture of experts against a loop over tokens, gradients included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quintet.model.crossing import Crossing, Steps
from quintet.model.moe import Experts, MixtureOfExperts
from quintet.model.router import Routing, count_choices, sum_affinities
from quintet.ops.permute import ROW_ALIGNMENT
from quintet.ops.pointwise import REFERENCE
from quintet.spec.model import Model
from tests.checkpoint.models import like_small

LAYERS = {
    "as V3": {},
    "one group": {"num_groups": 1, "num_groups_per_token": 1},
    "two shared experts": {"num_shared_experts": 2},
    "no shared expert": {"num_shared_experts": 0},
    "plain gates": {"normalize_gates": False, "routed_scaling_factor": 1.0},
    "all experts": {"num_routed_experts": 4, "num_groups": 1, "num_groups_per_token": 1, "num_experts_per_token": 4},
}


def mixture(model: Model) -> MixtureOfExperts:
    """A layer with weights of unit gain and biases that matter."""
    layer = MixtureOfExperts(model, kernels=REFERENCE)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.0, parameter.shape[-1] ** -0.5)
    torch.nn.init.normal_(layer.router.expert_bias, 0.0, 0.1)
    return layer


def feed_forward(x: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """w2(silu(w1 x) * w3 x) of one token; w13 [2, F, D]."""
    gate = w13[0] @ x
    return w2 @ (gate * gate.sigmoid() * (w13[1] @ x))


def by_a_loop(layer: MixtureOfExperts, x: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, list[int]]:
    """x [T, D] in fp64 through each of its experts in turn, and how often each expert was chosen."""
    model, load, outs = layer.model, [0] * layer.model.num_routed_experts, []
    # The choice is taken over, so that rounding cannot make two of it.
    for token, chosen in zip(x, layer.router(x.detach().float()).experts.tolist(), strict=True):
        scores = (w["router.weight"] @ token).sigmoid()
        total = sum(scores[e] for e in chosen) if model.normalize_gates else 1.0
        out = feed_forward(token, w["shared.w13"], w["shared.w2"]) if model.num_shared_experts else torch.zeros_like(token)
        for e in chosen:
            load[e] += 1
            gate = scores[e] / total * model.routed_scaling_factor
            out = out + gate * feed_forward(token, w["experts.w13"][e], w["experts.w2"][e])
        outs.append(out)
    return torch.stack(outs), load


@pytest.mark.parametrize("length", [1, 7, 100])
@pytest.mark.parametrize("changes", LAYERS.values(), ids=LAYERS.keys())
def test_a_mixture_of_experts_equals_the_loop_over_tokens(changes: dict[str, Any], length: int) -> None:
    model = like_small(**changes)
    layer, x = mixture(model), torch.randn(2, length, model.hidden_size, requires_grad=True)
    padded = 2 * length * model.num_experts_per_token >= 4 * model.num_routed_experts * ROW_ALIGNMENT
    assert padded == (length == 100), "both ways of laying out rows are tested"
    ours, statistics = layer(x)
    exact = {name: parameter.detach().double().requires_grad_() for name, parameter in layer.named_parameters()}
    x_exact = x.detach().double().flatten(0, 1).requires_grad_()
    theirs, load = by_a_loop(layer, x_exact, exact)
    torch.testing.assert_close(ours.flatten(0, 1).double(), theirs, rtol=1e-4, atol=1e-5)
    assert statistics.load.tolist() == load

    grad = torch.randn(ours.shape)
    our_grads = torch.autograd.grad(ours, [x, *layer.parameters()], grad)
    their_grads = torch.autograd.grad(theirs, [x_exact, *exact.values()], grad.flatten(0, 1).double())
    for our, their in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(our.double().view_as(their), their, rtol=1e-4, atol=1e-4)


def test_every_token_is_served_however_uneven_the_load() -> None:
    model = like_small(num_groups=1, num_groups_per_token=1)
    layer = mixture(model)
    layer.router.expert_bias[:] = torch.tensor([9.0, 9.0, 9.0, 0, 0, 0, 0, 0])
    _, statistics = layer(torch.randn(4, 50, model.hidden_size))
    assert statistics.load.tolist() == [200, 200, 200, 0, 0, 0, 0, 0], "no capacity, no token dropped"


def test_in_bf16_output_and_gradients_stay_within_its_rounding() -> None:
    model = like_small(expert_ffn_size=16)
    exact, rounded = mixture(model), mixture(model)
    for a, b in zip(exact.parameters(), rounded.parameters(), strict=True):
        b.data = a.detach().bfloat16()
        a.data = b.detach().float()
    rounded.router.expert_bias.copy_(exact.router.expert_bias)
    x = torch.randn(2, 40, model.hidden_size).bfloat16()
    ours, theirs = rounded(x)[0], exact(x.float())[0]
    assert ours.dtype == torch.bfloat16 and (ours.float() - theirs).norm() / theirs.norm() < 0.02
    ours.float().square().sum().backward()
    theirs.square().sum().backward()
    for (name, a), b in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert (a.grad - b.grad.float()).norm() / a.grad.norm() < 0.05, name


def test_the_statistics_hold_what_the_balance_loss_is_made_of() -> None:
    model = like_small()
    layer, x = mixture(model), torch.randn(3, 5, model.hidden_size)
    statistics = layer(x)[1]
    scores = layer.router(x.flatten(0, 1)).scores
    count, affinity = count_choices(scores, 3, model.num_experts_per_token), sum_affinities(scores, 3)
    torch.testing.assert_close((statistics.count, statistics.affinity), (count, affinity))
    assert count.sum(1).tolist() == [5 * model.num_experts_per_token] * 3 and affinity.sum(1).tolist() == pytest.approx([5.0] * 3)


def test_another_dispatch_takes_its_place_in_the_seam() -> None:
    model = like_small(num_shared_experts=0)
    layer = mixture(model)

    def dispatch(
        x: Tensor, routing: Routing, experts: Experts, beside: Callable[[], Crossing]
    ) -> Steps[tuple[Tensor, Crossing, Tensor]]:
        x, *others = yield x, *beside()
        return 2 * x, tuple(others), torch.full((experts.w2.shape[0],), routing.experts.numel())

    layer.dispatch = dispatch
    x = torch.randn(2, 3, model.hidden_size)
    out, statistics = layer(x)
    assert torch.equal(out, 2 * x) and statistics.load.tolist() == [2 * 3 * 3] * 8
