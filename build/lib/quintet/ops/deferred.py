"""Weight gradients that wait: a backward in two halves, first the gradients of inputs, which others wait for, then those of weights.

While `putting_off(later)` is open, the products of `linear` and `ops.grouped_matmul` whose weight is a parameter leave its gradient, in
backward, as a piece of work in `later` and give autograd nothing for it. Everything else (norms, routers, embeddings: little work) goes its
usual way. Splitting autograd's graph by hand instead would run custom functions twice, recompute what is recomputed once more, and fail
where a weight is used twice (Qi et al., arXiv 2401.10241, defer the work likewise).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class WeightGradients:
    """Work put off by one backward, in the order in which it came."""

    def __init__(self) -> None:
        self._work: list[tuple[Tensor, Callable[[], Tensor]]] = []

    def __len__(self) -> int:
        return len(self._work)

    def add(self, weight: Tensor, make: Callable[[], Tensor]) -> None:
        """Put off the gradient of a parameter, which `make` computes in its shape."""
        self._work.append((weight, make))

    @torch.no_grad()
    def run(self, take: Callable[[Tensor, Tensor], None]) -> None:
        """Do the work: `take` gets each parameter with a gradient; what the work held is freed as it goes."""
        self._work.reverse()
        while self._work:
            weight, make = self._work.pop()
            take(weight, make())


_later: WeightGradients | None = None
"""Where backward puts weight gradients off to. Global, because on CUDA backward runs in a thread of its own."""


@contextmanager
def putting_off(later: WeightGradients) -> Iterator[None]:
    """Backward leaves weight gradients in `later`."""
    global _later
    assert _later is None
    _later = later
    try:
        yield
    finally:
        _later = None


def parameter_of(weight: Tensor) -> Tensor | None:
    """`weight` itself if it is a parameter, to be noted in a function's context: what autograd saves may come back as another object."""
    return weight if weight.is_leaf else None


def deferred(parameter: Tensor | None, make: Callable[[], Tensor]) -> Tensor | None:
    """The gradient that `make` computes, or None where it is put off; None for `parameter` never is."""
    if _later is None or parameter is None:
        return make()
    _later.add(parameter, make)
    return None


def linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., I], weight [..., I] -> [..., O], all leading dims of the weight taken as one."""
    return F.linear(x, weight.flatten(0, -2))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """As the reference, with a weight gradient that can be put off."""
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return linear_reference(x, weight)
    out: Tensor = _Linear.apply(x, weight)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.parameter = parameter_of(weight)
        return linear_reference(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        grad_x = (grad @ weight.flatten(0, -2)).view_as(x) if ctx.needs_input_grad[0] else None
        grad_weight = deferred(ctx.parameter, lambda: (grad.t() @ x.flatten(0, -2)).view_as(weight)) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight
