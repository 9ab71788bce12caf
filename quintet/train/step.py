"""One optimizer step: micro-batches forward and backward, clip, update, router bias."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quintet.data.loader import Batch
from quintet.errors import NumericsError
from quintet.model.loss import Weights, count_targets, targets_by_depth, training_loss
from quintet.model.router import updated_bias
from quintet.model.transformer import Transformer
from quintet.spec.curriculum import Settings
from quintet.spec.run import Train
from quintet.train.optimizer import AdamW


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Losses in nats per token, the gradient's norm before clipping, and the load of each MoE layer's experts [layers, E]."""

    loss: float
    main_loss: float
    mtp_loss: float
    balance_loss: float
    gradient_norm: float
    load: Tensor


def run_step(
    model: Transformer, optimizer: AdamW, batch: Batch, *, settings: Settings, train: Train, document_mask: bool, step: int
) -> StepResult:
    """Update number `step` from a global batch, `train.micro_batch` rows at a time.

    Raises NumericsError, with weights and moments untouched, if loss or gradient is not finite.
    """
    device = model.embed.weight.device
    targets = targets_by_depth(batch.labels, model.model.num_mtp_modules)
    num_targets = count_targets(targets).tolist()
    num_sequences = batch.inputs.shape[0]
    sums: list[Tensor] = []
    load: Tensor | None = None
    begins = range(0, num_sequences, train.micro_batch)
    for begin in begins:
        rows = slice(begin, begin + train.micro_batch)
        loss = training_loss(
            model,
            batch.inputs[rows].to(device),
            targets[:, rows].to(device),
            document_ids=batch.document_ids[rows].to(device) if document_mask else None,
            weights=Weights(mtp=settings.mtp_weight, balance=train.balance_weight),
            num_targets=num_targets,
            num_sequences=num_sequences,
            chunk=train.loss_chunk,
        )
        loss.total.backward()
        optimizer.collect(alone=len(begins) == 1)
        sums.append(torch.stack((loss.total.detach(), loss.main, loss.mtp, loss.balance)))
        load = loss.load if load is None else load + loss.load
    assert load is not None
    norm = optimizer.gradient_norm()
    total, main, mtp, balance, gradient_norm = torch.cat((torch.stack(sums).sum(0), norm[None])).tolist()
    if not (math.isfinite(total) and math.isfinite(gradient_norm)):
        optimizer.discard()
        raise NumericsError(
            f"step {step}: loss {total}, gradient norm {gradient_norm}; both must be finite. Nothing was updated: "
            "lower the learning rate in the run's recipe.toml, or look at the data of this step, and resume from the newest checkpoint"
        )
    optimizer.step(settings.learning_rate, norm)
    for layer, counts in zip(model.moe_layers(), load, strict=True):
        layer.router.expert_bias.copy_(updated_bias(layer.router.expert_bias, counts, settings.bias_speed))
    return StepResult(loss=total, main_loss=main, mtp_loss=mtp, balance_loss=balance, gradient_norm=gradient_norm, load=load.cpu())
