"""One optimizer step: micro-batches forward and backward, clip, update, router bias."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quintet.data.loader import Batch
from quintet.errors import NumericsError
from quintet.model.loss import Loss, Weights, count_targets, targets_by_depth, training_loss
from quintet.model.router import updated_bias
from quintet.parallel.collectives import all_reduce
from quintet.parallel.sequence import shard_positions, shard_tokens
from quintet.parallel.stages import Context, MicroBatch
from quintet.spec.curriculum import Settings
from quintet.spec.run import Train
from quintet.train.build import Built


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Of the whole step, the same on every rank: losses in nats per token, the gradient's norm before clipping, the load of each MoE
    layer's experts [layers, E], how many of those assignments were dropped (see model.capacity_factor), and whether any rank was asked to
    stop."""

    loss: float
    main_loss: float
    mtp_loss: float
    balance_loss: float
    gradient_norm: float
    load: Tensor
    num_dropped: int
    stop: bool


def run_step(
    built: Built,
    batch: Batch,
    *,
    settings: Settings,
    train: Train,
    document_mask: bool,
    step: int,
    stop: Callable[[], bool] = lambda: False,
    before_update: Callable[[], None] = lambda: None,
) -> StepResult:
    """Update number `step` from this rank's rows of a batch of `settings.batch_sequences`, `train.micro_batch` rows at a time.

    `before_update` is called before anything that a checkpoint holds changes: a save beside training copies it until then.
    Raises NumericsError, with weights and moments untouched, if loss or gradient is not finite.
    """
    sums, load = accumulate(built, batch, settings=settings, train=train, document_mask=document_mask)
    before_update()
    return update(built, sums, load, settings=settings, step=step, stop=stop())


def update(built: Built, sums: Tensor, load: Tensor, *, settings: Settings, step: int, stop: bool = False) -> StepResult:
    """The second half of `run_step`: from what `accumulate` left and returned."""
    # One message for all that must be known of every rank before the update.
    told = torch.cat((sums, built.parameters.norm_squared()[None], load.new_tensor([stop]).double(), load.flatten().double()))
    told = all_reduce(told, built.mesh["world"]).cpu()
    total, main, mtp, balance, dropped, norm_squared, stops = told[:7].tolist()
    gradient_norm, load = math.sqrt(norm_squared) if norm_squared >= 0 else math.nan, told[7:].long().view(load.shape)
    if not (math.isfinite(total) and math.isfinite(gradient_norm)):
        built.parameters.discard()
        raise NumericsError(
            f"step {step}: loss {total}, gradient norm {gradient_norm}; both must be finite. Nothing was updated: "
            "lower the learning rate in the run's recipe.toml, or look at the data of this step, and resume from the newest checkpoint"
        )
    built.optimizer.step(settings.learning_rate, gradient_norm)
    for number, layer in built.model.moe_layers().items():
        bias = layer.router.expert_bias
        bias.copy_(updated_bias(bias, load[number].to(bias.device), settings.bias_speed))
    return StepResult(
        loss=total,
        main_loss=main,
        mtp_loss=mtp,
        balance_loss=balance,
        gradient_norm=gradient_norm,
        load=load,
        num_dropped=round(dropped),
        stop=stops > 0,
    )


def accumulate(built: Built, batch: Batch, *, settings: Settings, train: Train, document_mask: bool) -> tuple[Tensor, Tensor]:
    """The first half of `run_step`: forward and backward of all micro-batches, after which `built.parameters` hold the step's gradient.

    Returns this rank's shares of the sums [5] (losses: total, main, MTP, balance; dropped assignments) in fp64, and of the load
    [layers, E].
    """
    model, mesh, device = built.model, built.mesh, built.device
    targets = targets_by_depth(batch.labels, model.model.num_mtp_modules)
    context = Context(
        positions=shard_positions(batch.inputs.shape[1], mesh["cp"]).to(device),
        weights=Weights(mtp=settings.mtp_weight, balance=train.balance_weight),
        num_targets=all_reduce(count_targets(targets).to(device), mesh["dp"]).tolist(),
        num_sequences=settings.batch_sequences,
        chunk=train.loss_chunk,
    )

    def mine(x: Tensor) -> Tensor:
        """This rank's part of each sequence, from whole ones [.., S]."""
        return shard_tokens(x, mesh["cp"], dim=-1).contiguous().to(device)

    # A rank whose share of the batch is smaller goes through its last micro-batch with fewer rows, or none: the others wait for it there.
    micro_batches = [
        MicroBatch(
            inputs=mine(batch.inputs[rows]),
            targets=mine(targets[:, rows]),
            document_ids=batch.document_ids[rows].to(device) if document_mask else None,
        )
        for i in range(mesh.layout.num_microbatches(settings.batch_sequences, train.micro_batch))
        for rows in [slice(i * train.micro_batch, (i + 1) * train.micro_batch)]
    ]
    built.parameters.begin_step(mtp=settings.mtp_weight > 0)
    losses = _through_pipeline(built, micro_batches, context) if mesh.layout.pp > 1 else _one_by_one(built, micro_batches, context)
    sums = [torch.stack((loss.total.detach(), loss.main, loss.mtp, loss.balance, loss.dropped.sum())).double() for loss in losses]
    return torch.stack(sums).sum(0), torch.stack([loss.load for loss in losses]).sum(0)


def _one_by_one(built: Built, micro_batches: Sequence[MicroBatch], context: Context) -> list[Loss]:
    """Each micro-batch forward and backward through the whole model."""
    losses = []
    for i, micro_batch in enumerate(micro_batches, 1):
        built.parameters.begin_micro_batch(last=i == len(micro_batches))
        loss = training_loss(
            built.model,
            micro_batch.inputs,
            micro_batch.targets,
            positions=context.positions,
            document_ids=micro_batch.document_ids,
            weights=context.weights,
            num_targets=context.num_targets,
            num_sequences=context.num_sequences,
            chunk=context.chunk,
        )
        loss.total.backward()
        built.parameters.end_micro_batch()
        losses.append(replace(loss, total=loss.total.detach()))
    return losses


def _through_pipeline(built: Built, micro_batches: Sequence[MicroBatch], context: Context) -> list[Loss]:
    """All micro-batches through this rank's stages; their gradients are reduced at the end."""
    assert built.pipeline is not None
    built.parameters.begin_micro_batch(last=True)
    losses = built.pipeline.train(micro_batches, context)
    built.parameters.end_micro_batch()
    return losses
