"""Cross-entropy of an output head, computed chunk by chunk so that the logits of all tokens never exist at once.

The gradient of the logits is known as soon as they are, so forward turns each chunk's logits straight into the gradients of the
hidden states and of the head; backward only scales them. Letters: T tokens, D hidden, C vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""Label of a position that is not predicted; any negative label is ignored."""

CrossEntropy = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def head_loss_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """hidden [T, D], weight [C, D], labels [T] (negative: ignored) -> sum of the losses, from all logits at once."""
    return F.cross_entropy((hidden @ weight.t()).float(), labels.clamp(min=-1), ignore_index=-1, reduction="sum")


def head_loss(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk: int, kernel: CrossEntropy) -> Tensor:
    """As the reference, `chunk` tokens at a time; `kernel` maps logits and labels to losses and their gradient."""
    total: Tensor = _HeadLoss.apply(hidden, weight, labels, chunk, kernel)
    return total


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, kernel: CrossEntropy) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # Chunks add up in fp32: a bf16 sum of many small gradients would lose the late ones.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        for begin in range(0, hidden.shape[0], chunk):
            part = hidden[begin : begin + chunk]
            if grad_hidden is None and grad_weight is None:
                total += head_loss_reference(part, weight, labels[begin : begin + chunk])
                continue
            loss, grad_logits = kernel(part @ weight.t(), labels[begin : begin + chunk])
            total += loss.sum()
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[begin : begin + chunk])
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ part
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = (None if t is None else t * grads[0].to(t.dtype) for t in ctx.saved_tensors)
        return grad_hidden, grad_weight, None, None, None
