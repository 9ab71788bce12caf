"""Loss on held-out documents, per source: inside the training loop and of a trained model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quintet.data.loader import Batch, held_out_batches
from quintet.data.prepare import Prepared
from quintet.errors import DataError
from quintet.model.loss import Weights
from quintet.model.transformer import Transformer
from quintet.monitor.metrics import Evaluated
from quintet.parallel.collectives import all_reduce
from quintet.parallel.mesh import Mesh, single
from quintet.parallel.sequence import shard_positions, shard_tokens
from quintet.parallel.stages import Context, MicroBatch, ModelPipeline
from quintet.spec.run import Run


@torch.no_grad()
def held_out_loss(
    model: Transformer,
    prepared: Prepared,
    run: Run,
    *,
    sequence_length: int,
    step: int,
    mesh: Mesh | None = None,
    pipeline: ModelPipeline | None = None,
) -> Evaluated:
    """Cross-entropy of the next token over the same held-out sequences each time; sources without held-out documents are left out.
    All ranks of `mesh` call it together and get the same. Raises DataError if no source has any.

    Bits per byte are nats per token, times the source's tokens per byte, over ln 2.
    """
    mesh, device = mesh or single(), model.embed.weight.device if pipeline is None else next(model.parameters()).device
    positions = shard_positions(sequence_length, mesh["cp"]).to(device)
    losses: dict[str, float] = {}
    bits: dict[str, float] = {}
    tokens: dict[str, int] = {}
    domains: dict[str, str] = {}
    for name, part in prepared.sources.items():
        if not part.held_out.num_documents:
            continue
        batches = held_out_batches(
            prepared,
            name,
            sequence_length=sequence_length,
            num_sequences=run.evaluation.num_sequences,
            batch_size=run.train.micro_batch * mesh.layout.dp,
            part=mesh.at.dp,
            num_parts=mesh.layout.dp,
        )
        micro_batches = (_micro_batch(batch, mesh, device, document_mask=run.data.document_mask) for batch in batches)
        chunk = run.train.loss_chunk
        if pipeline is None:
            sums = torch.stack([_loss_and_tokens(model, each, positions, chunk) for each in micro_batches]).sum(0)
        else:
            sums = _through_pipeline(pipeline, [*micro_batches], positions, chunk)
        sums[1] /= mesh.layout.tp * mesh.layout.pp  # its ranks share the losses out, but have the same labels
        total, counted = all_reduce(sums, mesh["world"]).tolist()
        losses[name], tokens[name], domains[name] = total / max(counted, 1), round(counted), part.source.domain
        meta = part.held_out.meta
        bits[name] = losses[name] * meta.num_tokens / max(meta.num_bytes, 1) / math.log(2)
    if not losses:
        raise DataError(f"no source in {prepared.directory} has a held-out document; raise data.held_out or add text, then prepare again")
    return Evaluated(step=step, losses=losses, domains=domains, bits_per_byte=bits, tokens=tokens)


def _micro_batch(batch: Batch, mesh: Mesh, device: torch.device, *, document_mask: bool) -> MicroBatch:
    """This rank's part of each sequence."""
    inputs, labels = (shard_tokens(x, mesh["cp"], dim=1).contiguous().to(device) for x in (batch.inputs, batch.labels))
    return MicroBatch(inputs, labels[None], batch.document_ids.to(device) if document_mask else None)


def _loss_and_tokens(model: Transformer, at: MicroBatch, positions: Tensor, chunk: int) -> Tensor:
    """The sum of the losses and the number of labels: [2] in fp64."""
    hidden = model(at.inputs, positions=positions, document_ids=at.document_ids).hidden
    return torch.stack((model.loss(hidden, at.targets[0], chunk=chunk).double(), (at.targets >= 0).sum().double()))


def _through_pipeline(pipeline: ModelPipeline, micro_batches: list[MicroBatch], positions: Tensor, chunk: int) -> Tensor:
    """The same over all micro-batches; only the rank of the last stage sees losses, which for others are 0."""
    none = Weights(mtp=0.0, balance=0.0)
    context = Context(positions=positions, weights=none, num_targets=[1], num_sequences=1, chunk=chunk)
    losses = pipeline.evaluate(micro_batches, context)
    labels = torch.stack([(each.targets >= 0).sum() for each in micro_batches])
    return torch.stack((torch.stack([loss.main for loss in losses]).double().sum(), labels.sum().double()))
