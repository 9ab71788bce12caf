"""The head's loss by chunks equals the loss from all logits at once, with its gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quintet.ops.cross_entropy import IGNORED, head_loss, head_loss_reference
from quintet.ops.pointwise import cross_entropy

HIDDEN, VOCABULARY = 6, 11


def tokens(num_tokens: int, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Random hidden states [T, D] and head [C, D] that want gradients."""
    hidden, weight = torch.randn(num_tokens, HIDDEN), torch.randn(VOCABULARY, HIDDEN)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


labels_of = st.lists(st.integers(-2, VOCABULARY - 1) | st.just(IGNORED), min_size=1, max_size=17).map(torch.tensor)


def test_the_reference_sums_the_negative_log_probabilities_of_the_labels() -> None:
    # Logits (0, 0), (0, ln 3) and one that is ignored: probabilities 1/2 and 3/4.
    hidden, weight = torch.tensor([[0.0], [math.log(3)], [9.0]]), torch.tensor([[0.0], [1.0]])
    loss = head_loss_reference(hidden, weight, torch.tensor([0, 1, IGNORED]))
    assert loss.item() == pytest.approx(math.log(2) + math.log(4 / 3))


@given(labels=labels_of, chunk=st.integers(1, 20), factor=st.floats(-4, 4))
def test_any_chunk_gives_the_loss_and_the_gradients_of_the_whole(labels: Tensor, chunk: int, factor: float) -> None:
    hidden, weight = tokens(len(labels))
    ours = head_loss(hidden, weight, labels, chunk=chunk, kernel=cross_entropy)
    theirs = head_loss_reference(hidden, weight, labels)
    torch.testing.assert_close(ours, theirs)
    our_grads = torch.autograd.grad(ours * factor, (hidden, weight))
    their_grads = torch.autograd.grad(theirs * factor, (hidden, weight))
    for our, their in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)


def test_a_batch_without_labels_has_loss_0_and_gradients_of_zeros() -> None:
    hidden, weight = tokens(5)
    loss = head_loss(hidden, weight, torch.full((5,), IGNORED), chunk=2, kernel=cross_entropy)
    loss.backward()
    assert loss.item() == 0
    for tensor in (hidden, weight):
        assert tensor.grad is not None and not tensor.grad.any()


@given(labels=labels_of, chunk=st.integers(1, 20))
def test_without_gradients_the_loss_is_the_same(labels: Tensor, chunk: int) -> None:
    hidden, weight = tokens(len(labels))
    with torch.no_grad():
        loss = head_loss(hidden, weight, labels, chunk=chunk, kernel=cross_entropy)
    torch.testing.assert_close(loss, head_loss_reference(hidden, weight, labels).detach())


@pytest.mark.parametrize("wanted", [0, 1])
def test_only_the_gradients_that_are_wanted_are_made(wanted: int) -> None:
    tensors = hidden, weight = tokens(5)
    tensors[1 - wanted].requires_grad_(False)
    labels = torch.tensor([1, 2, IGNORED, 4, 5])
    grad = torch.autograd.grad(head_loss(hidden, weight, labels, chunk=2, kernel=cross_entropy), tensors[wanted])[0]
    expected = torch.autograd.grad(head_loss_reference(hidden, weight, labels), tensors[wanted])[0]
    torch.testing.assert_close(grad, expected)


def test_logits_never_exist_for_more_than_a_chunk() -> None:
    shapes: list[tuple[int, ...]] = []

    def spy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        shapes.append(tuple(logits.shape))
        return cross_entropy(logits, labels)

    hidden, weight = tokens(10)
    head_loss(hidden, weight, torch.arange(10), chunk=4, kernel=spy)
    assert shapes == [(4, VOCABULARY), (4, VOCABULARY), (2, VOCABULARY)]


def test_in_bf16_loss_and_gradients_stay_within_its_rounding() -> None:
    hidden, weight = tokens(64, dtype=torch.bfloat16)
    labels = torch.randint(VOCABULARY, (64,))
    loss = head_loss(hidden, weight, labels, chunk=16, kernel=cross_entropy)
    exact = hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    expected = head_loss_reference(exact[0], exact[1], labels)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=5e-3)
    for our, their in zip(torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, exact), strict=True):
        assert our.dtype == torch.bfloat16
        assert (our.float() - their).norm() / their.norm() < 0.02


def test_chunks_of_the_heads_gradient_add_up_in_fp32() -> None:
    # One token moves the gradient by 1/2 at most; after 512 of them a bf16 sum would stand still.
    num_tokens = 4096
    hidden = torch.ones(num_tokens, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    head_loss(hidden, weight, torch.zeros(num_tokens, dtype=torch.int64), chunk=1, kernel=cross_entropy).backward()
    assert weight.grad is not None and weight.grad.flatten().tolist() == [-num_tokens / 2, num_tokens / 2]
