"""The training loss: next-token cross-entropy, plus lambda/M times the MTP losses, plus alpha times the balance loss (V3 2.1.2, 2.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quintet.model.mtp import shifted
from quintet.model.transformer import Transformer
from quintet.ops.cross_entropy import head_loss


@dataclass(frozen=True)
class Weights:
    """Weights of the parts of the loss."""

    mtp: float
    """lambda: weight of the mean of the MTP losses; at 0 the modules do not run."""
    balance: float
    """alpha: weight of the sum over layers of the sequence-wise balance loss."""


@dataclass(frozen=True)
class Loss:
    """Parts of one micro-batch's share of the step's loss: scalars in fp32, `load` [layers, E] int64, MTP modules last.

    `total` carries the graph, the others are detached: cross-entropies in nats per token of the whole step.
    """

    total: Tensor
    main: Tensor
    mtp: Tensor
    balance: Tensor
    load: Tensor


def count_labels(labels: Tensor, num_mtp_modules: int) -> tuple[int, ...]:
    """Predicted positions of labels [B, S]: of the main model, then of each MTP depth."""
    return tuple(int((shifted(labels, depth) >= 0).sum()) for depth in range(num_mtp_modules + 1))


def training_loss(
    model: Transformer,
    inputs: Tensor,
    labels: Tensor,
    *,
    document_ids: Tensor | None = None,
    weights: Weights,
    num_labels: tuple[int, ...],
    num_sequences: int,
    chunk: int,
) -> Loss:
    """inputs, labels and document_ids [B, S] of a micro-batch -> its share of the loss of a step.

    `num_labels` (see count_labels) and `num_sequences` are those of the whole step, so that the shares of its micro-batches add
    up to the step's mean whatever their padding.
    """
    output = model(inputs, labels=labels if weights.mtp else None, document_ids=document_ids)
    kernel = model.kernels.cross_entropy
    losses = [
        head_loss(hidden.flatten(0, 1), model.head_weight, shifted(labels, depth).flatten(), chunk=chunk, kernel=kernel)
        / max(num_labels[depth], 1)
        for depth, hidden in enumerate((output.hidden, *output.mtp))
    ]
    none = torch.zeros((), device=inputs.device)
    mtp = torch.stack(losses[1:]).mean() if output.mtp else none
    balance = torch.stack([s.balance_loss for s in output.moe]).sum() * (inputs.shape[0] / num_sequences) if output.moe else none
    load = torch.zeros(model.num_moe_layers, model.model.num_routed_experts, dtype=torch.int64, device=inputs.device)
    for row, statistics in zip(load, output.moe, strict=False):  # modules that did not run have no load
        row.copy_(statistics.load)
    total = losses[0] + weights.mtp * mtp + weights.balance * balance
    return Loss(total=total, main=losses[0].detach(), mtp=mtp.detach(), balance=balance.detach(), load=load)
