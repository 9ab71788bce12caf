"""One optimizer step: micro-batches forward and backward, clip, update, router bias."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quintet.errors import NumericsError
from quintet.model.loss import Weights, count_labels, training_loss
from quintet.model.router import updated_bias
from quintet.model.transformer import Transformer
from quintet.spec.run import Train
from quintet.train.optimizer import AdamW


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The scheduled values of one step."""

    learning_rate: float
    mtp_weight: float
    bias_speed: float


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Losses in nats per token, the gradient's norm before clipping, and the load of each MoE layer's experts [layers, E]."""

    loss: float
    main_loss: float
    mtp_loss: float
    balance_loss: float
    gradient_norm: float
    load: Tensor


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Rows of token ids: inputs [B, S] int64, labels [B, S] (the next tokens, negative: not predicted), document_ids [B, S] or
    None where attention may cross documents."""

    inputs: Tensor
    labels: Tensor
    document_ids: Tensor | None

    def split(self, rows: int) -> Iterator[Tokens]:
        """Consecutive parts of at most `rows` rows."""
        for begin in range(0, self.inputs.shape[0], rows):
            part = slice(begin, begin + rows)
            ids = None if self.document_ids is None else self.document_ids[part]
            yield Tokens(inputs=self.inputs[part], labels=self.labels[part], document_ids=ids)

    def to(self, device: torch.device) -> Tokens:
        """The same rows on `device`."""
        ids = None if self.document_ids is None else self.document_ids.to(device)
        return Tokens(inputs=self.inputs.to(device), labels=self.labels.to(device), document_ids=ids)


def run_step(model: Transformer, optimizer: AdamW, batch: Tokens, *, rates: Rates, train: Train, step: int) -> StepResult:
    """One update from a global batch. Raises NumericsError, with the weights untouched, if loss or gradient is not finite."""
    device = model.embed.weight.device
    num_labels = count_labels(batch.labels, model.model.num_mtp_modules)
    num_sequences = batch.inputs.shape[0]
    sums: list[Tensor] = []
    load: Tensor | None = None
    parts = [*batch.split(train.micro_batch)]
    for i, part in enumerate(parts):
        part = part.to(device)
        loss = training_loss(
            model,
            part.inputs,
            part.labels,
            document_ids=part.document_ids,
            weights=Weights(mtp=rates.mtp_weight, balance=train.balance_weight),
            num_labels=num_labels,
            num_sequences=num_sequences,
            chunk=train.loss_chunk,
        )
        loss.total.backward()
        optimizer.collect(last=i + 1 == len(parts) == 1)
        sums.append(torch.stack((loss.total.detach(), loss.main, loss.mtp, loss.balance)))
        load = loss.load if load is None else load + loss.load
    assert load is not None
    norm = optimizer.gradient_norm()
    total, main, mtp, balance, gradient_norm = torch.cat((torch.stack(sums).sum(0), norm[None])).tolist()
    if not (torch.isfinite(torch.tensor(total)) and torch.isfinite(norm)):
        raise NumericsError(
            f"step {step}: loss {total}, gradient norm {gradient_norm}; both must be finite. The weights are those of step {step - 1}: "
            "lower the learning rate, or look at the data of this step"
        )
    optimizer.step(rates.learning_rate, norm)
    for layer, counts in zip(model.moe_layers(), load, strict=True):
        layer.router.expert_bias.copy_(updated_bias(layer.router.expert_bias, counts, rates.bias_speed))
    return StepResult(loss=total, main_loss=main, mtp_loss=mtp, balance_loss=balance, gradient_norm=gradient_norm, load=load.cpu())
