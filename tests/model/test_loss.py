"""The training loss: its parts, and that the shares of micro-batches add up to the step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from quintet.model.loss import Loss, count_targets, targets_by_depth
from quintet.model.moe import MoEStatistics
from quintet.model.router import sequence_balance_loss
from quintet.model.transformer import Transformer
from quintet.ops.cross_entropy import IGNORED
from tests.checkpoint.models import SMALL, like_small
from tests.model.build import build, gradients, loss_of, some_tokens

LENGTH = 10


def padded_rows(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Inputs and labels [B, S] of rows with this many tokens before their padding."""
    tokens = some_tokens(SMALL, len(lengths), LENGTH + 1)
    labels = tokens[:, 1:].clone()
    for row, length in enumerate(lengths):
        labels[row, length:] = IGNORED
    return tokens[:, :-1], labels


def test_the_main_loss_is_the_mean_cross_entropy_of_the_predicted_tokens() -> None:
    net = build(SMALL)
    inputs, labels = padded_rows([10, 4, 7])
    expected = F.cross_entropy(net.logits(inputs).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    assert loss_of(net, inputs, labels).main.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_total_weighs_the_parts_and_alone_carries_the_graph() -> None:
    net = build(SMALL)
    inputs, labels = padded_rows([10, 4, 7])
    loss = loss_of(net, inputs, labels, mtp=0.7, balance=0.2)
    assert loss.total.item() == pytest.approx((loss.main + 0.7 * loss.mtp + 0.2 * loss.balance).item(), rel=1e-6)
    assert [part.requires_grad for part in (loss.total, loss.main, loss.mtp, loss.balance)] == [True, False, False, False]


def balance(layer: MoEStatistics) -> float:
    return sequence_balance_loss(layer.count, layer.affinity, SMALL.num_experts_per_token).item()


def test_balance_and_load_come_from_every_mixture_of_experts_those_of_mtp_modules_last() -> None:
    net = build(SMALL)  # 2 of 3 layers are mixtures of experts, and the MTP module's block
    inputs, labels = padded_rows([10, 10])
    loss, output = loss_of(net, inputs, labels), net(inputs, targets=targets_by_depth(labels, 1))
    assert loss.load.shape == (3, SMALL.num_routed_experts) == (len(net.moe_layers()), 8)
    assert loss.load.sum(1).tolist() == [2 * LENGTH * SMALL.num_experts_per_token] * 3
    assert loss.load.tolist() == [layer.load.tolist() for layer in output.moe.values()]
    assert loss.balance.item() == pytest.approx(sum(balance(layer) for layer in output.moe.values()) / 2)


def test_a_dense_model_has_no_load_and_no_balance_loss() -> None:
    net = build(like_small(num_dense_layers=3, num_mtp_modules=0))
    loss = loss_of(net, *padded_rows([10, 4]))
    assert loss.load.numel() == 0 and loss.balance == loss.mtp == 0 and torch.equal(loss.total.detach(), loss.main)


def test_modules_of_weight_0_do_not_run_and_have_no_load() -> None:
    net, (inputs, labels) = build(SMALL), padded_rows([10, 4])
    without, with_them = (loss_of(net, inputs, labels, mtp=weight, balance=0.0) for weight in (0.0, 0.3))
    assert torch.equal(without.total.detach(), without.main) and torch.equal(without.main, with_them.main)
    assert without.mtp == 0 < with_them.mtp
    assert torch.equal(without.load[:2], with_them.load[:2]) and not without.load[2].any() and with_them.load[2].any()
    assert {name for name, grad in gradients(net, without.total).items() if not grad.any()} == {
        name for name, _ in net.named_parameters() if name.startswith("mtp.")
    }


def add_up(net: Transformer, inputs: Tensor, labels: Tensor, sizes: list[int]) -> tuple[list[Loss], dict[str, Tensor]]:
    """The losses of consecutive micro-batches of these sizes, and the sum of their gradients."""
    counts = count_targets(targets_by_depth(labels, net.model.num_mtp_modules)).tolist()
    losses, total = [], dict[str, Tensor]()
    for part, its_labels in zip(inputs.split(sizes), labels.split(sizes), strict=True):
        losses.append(loss_of(net, part, its_labels, num_targets=counts, num_sequences=len(inputs)))
        for name, grad in gradients(net, losses[-1].total).items():
            total[name] = total[name] + grad if name in total else grad
    return losses, total


@settings(max_examples=20)
@given(lengths=st.lists(st.integers(0, LENGTH), min_size=2, max_size=6), data=st.data())
def test_shares_of_micro_batches_add_up_to_the_whole_batch_whatever_their_padding(lengths: list[int], data: st.DataObject) -> None:
    net, (inputs, labels) = build(SMALL), padded_rows(lengths)
    cut = data.draw(st.integers(1, len(lengths) - 1), label="first micro-batch")
    (whole,), gradient = add_up(net, inputs, labels, [len(lengths)])
    parts, summed = add_up(net, inputs, labels, [cut, len(lengths) - cut])
    for name in ("total", "main", "mtp", "balance", "load"):
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name), rtol=1e-5, atol=1e-6)
    for name, grad in gradient.items():
        torch.testing.assert_close(summed[name], grad, rtol=1e-4, atol=1e-6)


@given(chunk=st.integers(1, 25))
@settings(max_examples=10)
def test_the_chunk_changes_nothing(chunk: int) -> None:
    net, (inputs, labels) = build(SMALL), padded_rows([10, 4])
    torch.testing.assert_close(loss_of(net, inputs, labels, chunk=chunk).total, loss_of(net, inputs, labels, chunk=1000).total)


def test_a_batch_of_padding_alone_has_a_finite_loss_and_no_gradient_from_it() -> None:
    net, (inputs, labels) = build(SMALL), padded_rows([0, 0])
    loss = loss_of(net, inputs, labels, balance=0.0)
    assert loss.total.item() == 0
    assert not any(grad.any() for grad in gradients(net, loss.total).values())
