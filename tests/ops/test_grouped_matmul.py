"""The grouped product equals a loop over experts, gradients included, whatever the loads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quintet.ops.grouped_matmul import grouped_matmul, grouped_matmul_reference

INNER, OUTER = 8, 16


def ends_of(loads: list[int]) -> Tensor:
    """Where each expert's rows stop."""
    return torch.tensor(loads).cumsum(0).to(torch.int32)


def with_gradients(call: Callable[..., Tensor], rows: Tensor, weight: Tensor, ends: Tensor) -> list[Tensor]:
    """The product and the gradients of rows and weight for one fixed output gradient."""
    rows, weight = rows.clone().requires_grad_(), weight.clone().requires_grad_()
    out = call(rows, weight, ends)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, (rows, weight), grad)]


def test_the_reference_gives_each_row_its_experts_matrix() -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    weight = torch.stack((torch.tensor([[1.0, 1.0]]), torch.tensor([[9.0, 9.0]]), torch.tensor([[10.0, -1.0]])))
    assert grouped_matmul_reference(rows, weight, torch.tensor([1, 1, 3])).tolist() == [[3.0], [26.0], [44.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(loads=st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any))
def test_product_and_gradients_equal_the_loop_with_any_load(dtype: torch.dtype, loads: list[int]) -> None:
    rows = torch.randn(sum(loads), INNER).to(dtype)
    weight = torch.randn(len(loads), OUTER, INNER).to(dtype)
    ours = with_gradients(grouped_matmul, rows, weight, ends_of(loads))
    theirs = with_gradients(grouped_matmul_reference, rows, weight, ends_of(loads))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their)


def test_an_expert_without_rows_gets_a_gradient_of_zeros() -> None:
    _, _, grad = with_gradients(grouped_matmul, torch.randn(5, INNER), torch.randn(4, OUTER, INNER), ends_of([0, 3, 0, 2]))
    assert [bool(expert.any()) for expert in grad] == [False, True, False, True]


def test_the_weights_gradient_lies_in_memory_as_the_weight_does() -> None:
    grad = with_gradients(grouped_matmul, torch.randn(5, INNER), torch.randn(2, OUTER, INNER), ends_of([2, 3]))[2]
    assert grad.is_contiguous() and grad.shape == (2, OUTER, INNER)


def test_an_output_gradient_that_is_a_view_is_taken() -> None:
    rows, weight = torch.randn(6, INNER).requires_grad_(), torch.randn(2, OUTER, INNER).requires_grad_()
    grad = torch.randn(OUTER, 6).t()
    ours = torch.autograd.grad(grouped_matmul(rows, weight, ends_of([2, 4])), (rows, weight), grad)
    theirs = torch.autograd.grad(grouped_matmul_reference(rows, weight, ends_of([2, 4])), (rows, weight), grad)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their)


def test_rows_behind_the_last_end_touch_neither_the_product_nor_the_weights_gradient() -> None:
    loads, weight = [2, 3], torch.randn(2, OUTER, INNER)
    used = torch.randn(5, INNER)
    padded = torch.cat((used, torch.full((3, INNER), torch.nan))).requires_grad_()
    expected = with_gradients(grouped_matmul, used, weight, ends_of(loads))
    weight = weight.requires_grad_()
    out = grouped_matmul(padded, weight, ends_of(loads))
    grad = torch.randn(5, OUTER, generator=torch.Generator().manual_seed(1))
    grad_rows, grad_weight = torch.autograd.grad(out, (padded, weight), torch.cat((grad, torch.full((3, OUTER), torch.nan))))
    for our, their in zip((out[:5], grad_rows[:5], grad_weight), expected, strict=True):
        torch.testing.assert_close(our.detach(), their)


@pytest.mark.parametrize("wanted", [0, 1])
def test_a_gradient_that_nobody_wants_is_left_out(wanted: int) -> None:
    tensors = [torch.randn(5, INNER), torch.randn(2, OUTER, INNER)]
    tensors[wanted].requires_grad_()
    grouped_matmul(tensors[0], tensors[1], ends_of([2, 3])).sum().backward()
    assert tensors[wanted].grad is not None and tensors[1 - wanted].grad is None


def test_widths_that_the_kernel_refuses_take_the_loop(generator: torch.Generator) -> None:
    rows = torch.randn(9, 10, generator=generator, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(3, 6, 10, generator=generator, dtype=torch.bfloat16, requires_grad=True)
    ends = torch.tensor([4, 4, 7], dtype=torch.int32)
    out = grouped_matmul(rows, weight, ends)
    assert out.shape == (9, 6)
    assert torch.equal(out[:7], grouped_matmul_reference(rows, weight, ends))
    out[:7].sum().backward()
    assert weight.grad is not None and not weight.grad[1].any()
