"""The training loss: next-token cross-entropy, plus lambda/M times the MTP losses, plus alpha times the balance loss (V3 2.1.2, 2.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quintet.model.moe import MoEStatistics
from quintet.model.mtp import shifted
from quintet.model.router import sequence_balance_loss
from quintet.model.transformer import Transformer


@dataclass(frozen=True)
class Weights:
    """Weights of the parts of the loss."""

    mtp: float
    """lambda: weight of the mean of the MTP losses; at 0 the modules do not run."""
    balance: float
    """alpha: weight of the sum over layers of the sequence-wise balance loss."""


@dataclass(frozen=True)
class Loss:
    """Parts of one micro-batch's share of the step's loss: scalars in fp32, `load` and `dropped` [layers, E] int64 (see MoEStatistics),
    MTP modules last.

    `total` carries the graph, the others are detached: cross-entropies in nats per token of the whole step. The shares of all
    micro-batches on all ranks add up to the step's loss, and their gradients to its gradient.
    """

    total: Tensor
    main: Tensor
    mtp: Tensor
    balance: Tensor
    load: Tensor
    dropped: Tensor


def targets_by_depth(labels: Tensor, num_mtp_modules: int) -> Tensor:
    """labels [B, S] of whole sequences -> [M+1, B, S]: the targets of the main model, then of each MTP module."""
    return torch.stack([shifted(labels, depth) for depth in range(num_mtp_modules + 1)])


def count_targets(targets: Tensor) -> Tensor:
    """targets [M+1, B, S] -> how many are predicted at each depth: int64 [M+1]."""
    return (targets >= 0).sum((1, 2))


def training_loss(
    model: Transformer,
    inputs: Tensor,
    targets: Tensor,
    *,
    positions: Tensor | None = None,
    document_ids: Tensor | None = None,
    weights: Weights,
    num_targets: Sequence[int],
    num_sequences: int,
    chunk: int,
) -> Loss:
    """inputs and document_ids [B, S] and targets [M+1, B, S] (see targets_by_depth) of a micro-batch -> its share of the loss of a step.
    Where inputs are parts of sequences, document_ids are those of the whole ones.

    `num_targets` (see count_targets) and `num_sequences` are those of the whole step, so that the shares of its micro-batches add
    up to the step's mean whatever their padding. `positions` [S] are the tokens' places in their sequence, if not 0, 1, 2 ...
    """
    output = model(inputs, targets=targets if weights.mtp else None, positions=positions, document_ids=document_ids)
    hidden = (output.hidden, *output.mtp)
    return share_of_loss(
        model, hidden, output.moe, targets, weights=weights, num_targets=num_targets, num_sequences=num_sequences, chunk=chunk
    )


def share_of_loss(
    model: Transformer,
    hidden: Sequence[Tensor],
    moe: Mapping[int, MoEStatistics],
    targets: Tensor,
    *,
    weights: Weights,
    num_targets: Sequence[int],
    num_sequences: int,
    chunk: int,
) -> Loss:
    """What a part of the model adds to the loss of a step: its MoE layers the balance loss, and its hidden states [B, S, D] of each depth,
    if it has come to them, the cross-entropies. See `training_loss`."""
    none = torch.zeros((), device=targets.device)
    losses = [model.loss(states, targets[depth], chunk=chunk) / max(num_targets[depth], 1) for depth, states in enumerate(hidden)] or [none]
    mtp = torch.stack(losses[1:]).mean() if losses[1:] else none
    balance = none
    if moe:
        count = model.whole_count(torch.stack([statistics.count for statistics in moe.values()]))  # of all layers at once
        affinity = torch.stack([statistics.affinity for statistics in moe.values()])
        balance = sequence_balance_loss(count, affinity, model.model.num_experts_per_token) / num_sequences
    counts = torch.zeros(2, model.num_moe_layers, model.model.num_routed_experts, dtype=torch.int64, device=targets.device)
    for layer, statistics in moe.items():  # modules that did not run have no load
        counts[0, layer], counts[1, layer] = statistics.load, statistics.dropped
    total = losses[0] + weights.mtp * mtp + weights.balance * balance
    return Loss(total=total, main=losses[0].detach(), mtp=mtp.detach(), balance=balance.detach(), load=counts[0], dropped=counts[1])
