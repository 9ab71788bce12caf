"""Recomputation: the same loss and gradients to the bit, and fewer bytes kept."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from quintet.model.loss import targets_by_depth
from quintet.model.recompute import recomputed
from quintet.model.transformer import Transformer
from quintet.spec.run import Recompute
from tests.checkpoint.models import like_small
from tests.model.build import build, gradients, loss_of, some_tokens

POLICIES: tuple[Recompute, ...] = get_args(Recompute)
MODELS = {
    "small": {},
    "no q-LoRA, two MTP modules": {"q_lora_rank": None, "num_mtp_modules": 2},
    "no dense layer, no shared expert": {"num_dense_layers": 0, "num_shared_experts": 0},
}


def results(net: Transformer, policy: Recompute, *, length: int, masked: bool) -> list[Tensor]:
    """Loss and every gradient under a policy."""
    tokens = some_tokens(net.model, 2, length + 1)
    ids = (torch.arange(length) // 7).expand(2, -1) if masked else None
    net.set_recompute(policy)
    loss = loss_of(net, tokens[:, :-1], tokens[:, 1:], document_ids=ids).total
    return [loss.detach(), *gradients(net, loss).values()]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_every_policy_gives_the_same_loss_and_gradients_to_the_bit(changes: dict[str, Any], masked: bool) -> None:
    net = build(like_small(**changes), steady=False)
    expected = results(net, "none", length=20, masked=masked)
    assert all(t.any() for t in expected)
    for policy in POLICIES[1:]:
        ours = results(net, policy, length=20, masked=masked)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True)), policy


def test_in_bf16_too() -> None:
    net = build(like_small(expert_ffn_size=16), dtype=torch.bfloat16, steady=False)
    none, selective, full = (results(net, policy, length=20, masked=False) for policy in POLICIES)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(none, selective, full, strict=True))


def kept_bytes(net: Transformer, policy: Recompute) -> int:
    """Bytes allocated in a forward pass that are still held behind it."""
    tokens = some_tokens(net.model, 2, 65)
    net.set_recompute(policy)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profile:
        held = net(tokens[:, :-1], targets=targets_by_depth(tokens[:, 1:], net.model.num_mtp_modules))
    assert held.hidden.requires_grad and profile.profiler and profile.profiler.kineto_results
    return sum(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")


def test_recomputing_more_keeps_less() -> None:
    net = build(like_small())
    none, selective, full = (kept_bytes(net, policy) for policy in POLICIES)
    assert none > 1.3 * selective > 1.3 * 1.3 * full


def test_a_recipe_replaces_what_would_be_kept_and_runs_once_in_backward() -> None:
    calls = 0

    def double() -> Tensor:
        nonlocal calls
        calls += 1
        return 2 * x

    x = torch.arange(1.0, 4.0, requires_grad=True)
    doubled = double()
    with recomputed((doubled,), lambda: (double(),), active=True):
        out = doubled * doubled + doubled.view(1, 3).sin()[0]
    assert calls == 1
    out.sum().backward()
    assert calls == 2, "three saved tensors, one recipe"
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 8 * x.detach() + 2 * (2 * x.detach()).cos())


@pytest.mark.parametrize("active", [False, True])
def test_without_gradients_or_when_off_nothing_is_made_again(active: bool) -> None:
    x = torch.ones(3, requires_grad=True)
    with torch.set_grad_enabled(not active), recomputed((x,), lambda: pytest.fail("made again"), active=active):
        out = x * x
    if not active:
        out.sum().backward()
        assert x.grad is not None and x.grad.tolist() == [2.0] * 3


def test_a_policy_is_taken_back_by_the_next() -> None:
    net = build(like_small())
    before = kept_bytes(net, "none")
    kept_bytes(net, "selective"), kept_bytes(net, "full")
    assert kept_bytes(net, "none") == before
