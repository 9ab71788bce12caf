"""Multi-token prediction: who predicts what, from what, and whom the loss teaches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from quintet.model.loss import count_targets, targets_by_depth
from quintet.model.mtp import MtpModule, shifted
from quintet.model.rope import rotation
from quintet.model.transformer import Transformer
from quintet.ops.cross_entropy import IGNORED, head_loss_reference
from quintet.ops.pointwise import rms_norm
from tests.checkpoint.models import like_small
from tests.model.build import build, gradients, loss_of, some_tokens

TWO = like_small(num_mtp_modules=2)


def test_labels_move_left_and_leave_the_end_without_any() -> None:
    labels = torch.tensor([[5, 6, 7, 8], [1, 2, IGNORED, IGNORED]])
    assert shifted(labels, 0).tolist() == labels.tolist()
    assert shifted(labels, 1).tolist() == [[6, 7, 8, IGNORED], [2, IGNORED, IGNORED, IGNORED]]
    assert shifted(labels, 3).tolist() == [[8] + [IGNORED] * 3, [IGNORED] * 4]
    assert shifted(labels, 9).tolist() == [[IGNORED] * 4] * 2


@given(st.integers(0, 4), st.integers(0, 4))
def test_moving_twice_is_moving_by_the_sum(first: int, second: int) -> None:
    labels = torch.arange(12).view(2, 6)
    assert torch.equal(shifted(shifted(labels, first), second), shifted(labels, first + second))


def test_each_depth_has_one_label_less_per_row() -> None:
    labels = torch.tensor([[5, 6, 7, 8], [1, 2, IGNORED, IGNORED]])
    assert count_targets(targets_by_depth(labels, 3)).tolist() == [6, 4, 2, 1]


def states_by_hand(net: Transformer, tokens: Tensor) -> list[Tensor]:
    """Normalised hidden states of each depth for one row of S + 1 tokens: depth k at place i has seen token i + k."""
    length = len(tokens) - 1
    turn = rotation(net.model, torch.arange(length))
    states = [net(tokens[None, :-1]).hidden]
    for depth, module in enumerate(net.mtp, 1):
        assert isinstance(module, MtpModule)
        seen = [int(tokens[i + depth]) if i + depth <= length else 0 for i in range(length)]
        eps = net.model.rms_norm_eps
        embedded = rms_norm(net.embed.weight[seen], module.embed_norm.weight, eps)
        before = rms_norm(states[-1][0], module.hidden_norm.weight, eps)
        mixed = torch.stack([module.eh_proj.weight @ torch.cat(pair) for pair in zip(embedded, before, strict=True)])
        states.append(rms_norm(module.block(mixed[None], turn, None)[0], module.norm.weight, eps))
    return states


def test_a_module_joins_the_states_before_with_the_embedding_of_one_token_further() -> None:
    net, tokens = build(TWO), some_tokens(TWO, 9)
    output = net(tokens[None, :-1], targets=targets_by_depth(tokens[None, 1:], 2))
    expected = states_by_hand(net, tokens)
    assert len(output.mtp) == 2
    for depth, (ours, theirs) in enumerate(zip((output.hidden, *output.mtp), expected, strict=True)):
        places = 8 - depth  # behind them a token would be needed that is not in the row
        torch.testing.assert_close(ours[:, :places], theirs[:, :places], rtol=1e-4, atol=1e-5)


def test_depth_k_predicts_the_token_k_plus_1_places_further_with_the_shared_head() -> None:
    net, tokens = build(TWO), some_tokens(TWO, 9)
    losses = []
    for depth, states in enumerate(states_by_hand(net, tokens)):
        logits = states[0] @ net.head_weight.t()
        pairs = [(i, i + 1 + depth) for i in range(8) if i + 1 + depth <= 8]
        losses.append(torch.stack([F.cross_entropy(logits[i], tokens[j]) for i, j in pairs]).mean())
    loss = loss_of(net, tokens[None, :-1], tokens[None, 1:], mtp=0.3, balance=0.0)
    assert loss.main.item() == pytest.approx(losses[0].item(), rel=1e-5)
    assert loss.mtp.item() == pytest.approx((losses[1].item() + losses[2].item()) / 2, rel=1e-5)
    assert loss.total.item() == pytest.approx(losses[0].item() + 0.3 * loss.mtp.item(), rel=1e-5)


def test_without_targets_the_modules_do_not_run() -> None:
    net, tokens = build(TWO), some_tokens(TWO, 1, 6)
    with_labels, without = net(tokens, targets=targets_by_depth(tokens, 2)), net(tokens)
    assert without.mtp == () and len(without.moe) == 2 and len(with_labels.moe) == 4
    assert torch.equal(with_labels.hidden, without.hidden)


@pytest.mark.parametrize("tied", [False, True])
def test_the_mtp_loss_teaches_the_shared_embedding_and_head_and_the_layers_below(tied: bool) -> None:
    net, tokens = build(like_small(tie_embeddings=tied)), some_tokens(TWO, 2, 9)
    output = net(tokens[:, :-1], targets=targets_by_depth(tokens[:, 1:], 1))
    states, labels = output.mtp[0].flatten(0, 1), shifted(tokens[:, 1:], 1).flatten()
    grads = gradients(net, head_loss_reference(states, net.head_weight, labels))
    assert ("head.weight" in grads) != tied
    assert {name for name, grad in grads.items() if not grad.any()} == set()


def test_labels_that_are_ignored_teach_nobody_at_any_depth() -> None:
    net, tokens = build(TWO), some_tokens(TWO, 1, 9)
    labels = tokens[:, 1:].clone()
    labels[:, 3:] = IGNORED
    short = loss_of(net, tokens[:, :3], labels[:, :3], balance=0.0).total
    padded = loss_of(net, tokens[:, :-1], labels, balance=0.0).total
    torch.testing.assert_close(padded, short)
    expected = gradients(net, short)
    for name, grad in gradients(net, padded).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)
