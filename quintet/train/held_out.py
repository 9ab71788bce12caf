"""Loss on held-out documents, per source: inside the training loop and of a trained model."""

from __future__ import annotations

import math

import torch

from quintet.data.loader import held_out_batches
from quintet.data.prepare import Prepared
from quintet.errors import DataError
from quintet.model.transformer import Transformer
from quintet.monitor.metrics import Evaluated
from quintet.spec.run import Run


@torch.no_grad()
def held_out_loss(model: Transformer, prepared: Prepared, run: Run, *, sequence_length: int, step: int) -> Evaluated:
    """Cross-entropy of the next token over the same held-out sequences each time; sources without held-out documents are left out.
    Raises DataError if no source has any.

    Bits per byte are nats per token, times the source's tokens per byte, over ln 2.
    """
    device = model.embed.weight.device
    losses: dict[str, float] = {}
    bits: dict[str, float] = {}
    tokens: dict[str, int] = {}
    domains: dict[str, str] = {}
    for name, part in prepared.sources.items():
        if not part.held_out.num_documents:
            continue
        total, counted = 0.0, 0
        batches = held_out_batches(
            prepared,
            name,
            sequence_length=sequence_length,
            num_sequences=run.evaluation.num_sequences,
            batch_size=run.train.micro_batch,
        )
        for batch in batches:
            ids = batch.document_ids.to(device) if run.data.document_mask else None
            hidden = model(batch.inputs.to(device), document_ids=ids).hidden
            labels = batch.labels.to(device)
            total += float(model.loss(hidden, labels, chunk=run.train.loss_chunk))
            counted += int((labels >= 0).sum())
        losses[name], tokens[name], domains[name] = total / max(counted, 1), counted, part.source.domain
        meta = part.held_out.meta
        bits[name] = losses[name] * meta.num_tokens / max(meta.num_bytes, 1) / math.log(2)
    if not losses:
        raise DataError(f"no source in {prepared.directory} has a held-out document; raise data.held_out or add text, then prepare again")
    return Evaluated(step=step, losses=losses, domains=domains, bits_per_byte=bits, tokens=tokens)
