"""The router's linear map: fp32 arithmetic, the inputs' dtype in what is kept and in the gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quintet.ops.exact_linear import exact_linear, exact_linear_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_and_gradients_equal_the_reference(dtype: torch.dtype) -> None:
    x, weight = torch.randn(7, 5).to(dtype).requires_grad_(), torch.randn(3, 5).to(dtype).requires_grad_()
    ours, theirs = exact_linear(x, weight), exact_linear_reference(x, weight)
    assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
    grad = torch.randn(7, 3)
    for our, their in zip(torch.autograd.grad(ours, (x, weight), grad), torch.autograd.grad(theirs, (x, weight), grad), strict=True):
        assert our.dtype == dtype
        torch.testing.assert_close(our, their)


def test_a_bf16_product_is_not_rounded_to_bf16() -> None:
    x, weight = torch.tensor([[256.0, 1.0]]).bfloat16(), torch.ones(1, 2).bfloat16()
    assert exact_linear(x, weight).item() == 257.0  # bf16 knows 256 and 258


def test_only_the_bf16_tensors_are_kept() -> None:
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    x, weight = torch.randn(7, 5).bfloat16().requires_grad_(), torch.randn(3, 5).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        exact_linear(x, weight)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), weight.data_ptr()}
