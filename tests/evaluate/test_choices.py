"""A router repeats what it chose for the same token elsewhere: in another order, rounded, and of nothing."""

from __future__ import annotations

from dataclasses import replace

import torch

from quintet.evaluate.choices import Choices
from quintet.model.moe import MixtureOfExperts
from quintet.model.transformer import Transformer
from tests.parity.test_layouts import MODEL


def a_router(net: Transformer) -> MixtureOfExperts:
    return net.moe_layers()[0]


def test_choices_follow_their_tokens_into_another_order_and_through_rounding() -> None:
    torch.manual_seed(0)
    net = Transformer(replace(MODEL, num_mtp_modules=0))
    net.initialize(0)
    router, x = a_router(net).router, torch.randn(40, MODEL.hidden_size)
    choices = Choices()
    with choices.noting(net):
        first = router(x[:30]).experts
        second = router(x[30:]).experts
    order = torch.randperm(40)
    with torch.no_grad():
        router.weight.normal_()  # who chose anew would choose otherwise
    rounded = (x + 0.02 * torch.randn_like(x))[order]
    with choices.repeated(net, 0):
        found = router(rounded)
        assert router(x[:0]).experts.shape == (0, MODEL.num_experts_per_token)
    assert torch.equal(found.experts, torch.cat((first, second))[order])
    assert torch.equal(found.gates, router(rounded).scores.gather(1, found.experts) / router(rounded).scores.gather(1, found.experts).sum(
        1, keepdim=True
    ) * MODEL.routed_scaling_factor)
    assert not torch.equal(router(rounded).experts, found.experts)  # and now it is free again


def test_every_step_has_choices_of_its_own() -> None:
    net = Transformer(replace(MODEL, num_mtp_modules=0))
    net.initialize(0)
    router, x, choices = a_router(net).router, torch.randn(5, MODEL.hidden_size), Choices()
    chosen = []
    for bias in (0.0, 9.0):
        router.expert_bias[:4] = bias
        with choices.noting(net):
            chosen.append(router(x).experts)
    for step in (1, 0):
        with choices.repeated(net, step):
            assert torch.equal(router(x).experts, chosen[step])
