"""Loss on held-out documents, per source: inside the training loop and of a trained model."""

from __future__ import annotations

import math

import torch

from quintet.data.loader import held_out_batches
from quintet.data.prepare import Prepared
from quintet.errors import DataError
from quintet.model.transformer import Transformer
from quintet.monitor.metrics import Evaluated
from quintet.parallel.collectives import all_reduce
from quintet.parallel.mesh import Mesh, single
from quintet.parallel.sequence import shard_positions, shard_tokens
from quintet.spec.run import Run


@torch.no_grad()
def held_out_loss(
    model: Transformer, prepared: Prepared, run: Run, *, sequence_length: int, step: int, mesh: Mesh | None = None
) -> Evaluated:
    """Cross-entropy of the next token over the same held-out sequences each time; sources without held-out documents are left out.
    All ranks of `mesh` call it together and get the same. Raises DataError if no source has any.

    Bits per byte are nats per token, times the source's tokens per byte, over ln 2.
    """
    mesh, device = mesh or single(), model.embed.weight.device
    positions = shard_positions(sequence_length, mesh["cp"]).to(device)
    losses: dict[str, float] = {}
    bits: dict[str, float] = {}
    tokens: dict[str, int] = {}
    domains: dict[str, str] = {}
    for name, part in prepared.sources.items():
        if not part.held_out.num_documents:
            continue
        sums = torch.zeros(2, dtype=torch.float64, device=device)  # of the losses, and of the tokens
        batches = held_out_batches(
            prepared,
            name,
            sequence_length=sequence_length,
            num_sequences=run.evaluation.num_sequences,
            batch_size=run.train.micro_batch * mesh.layout.dp,
            part=mesh.at.dp,
            num_parts=mesh.layout.dp,
        )
        for batch in batches:
            inputs, labels, ids = (
                shard_tokens(x, mesh["cp"], dim=1).to(device) for x in (batch.inputs, batch.labels, batch.document_ids)
            )
            hidden = model(inputs, positions=positions, document_ids=ids if run.data.document_mask else None).hidden
            sums[0] += model.loss(hidden, labels, chunk=run.train.loss_chunk)
            sums[1] += (labels >= 0).sum() / mesh.layout.tp  # its ranks share the losses out, but have the same labels
        total, counted = all_reduce(sums, mesh["world"]).tolist()
        losses[name], tokens[name], domains[name] = total / max(counted, 1), round(counted), part.source.domain
        meta = part.held_out.meta
        bits[name] = losses[name] * meta.num_tokens / max(meta.num_bytes, 1) / math.log(2)
    if not losses:
        raise DataError(f"no source in {prepared.directory} has a held-out document; raise data.held_out or add text, then prepare again")
    return Evaluated(step=step, losses=losses, domains=domains, bits_per_byte=bits, tokens=tokens)
