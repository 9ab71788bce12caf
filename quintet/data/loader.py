"""Batches of packed sequences: the only file of this room that imports torch.

B sequences of a batch, L tokens of a sequence; a row has L + 1 tokens, of which the inputs are the first L and the labels the last L
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quintet.data.mix import Mixture
from quintet.data.pack import PADDING, Rows, stream_key
from quintet.data.prepare import Prepared
from quintet.errors import DataError
from quintet.ops.cross_entropy import IGNORED
from quintet.spec.run import Data


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences of one length."""

    inputs: Tensor
    """Token ids: int64 [B, L]."""
    labels: Tensor
    """The next token within the row, `IGNORED` where that is padding: int64 [B, L]."""
    document_ids: Tensor
    """Document of each input, counted within its row, -1 at padding: int32 [B, L]."""


class Loader:
    """The endless stream of training rows, mixed by the sources' weights.

    Row k depends on the seed and on k alone, never on how rows are divided into batches; the state is a few integers, and a
    loader that restores it goes on exactly.
    """

    def __init__(self, prepared: Prepared, data: Data, *, sequence_length: int, seed: int) -> None:
        self.sequence_length = sequence_length
        self._mixture = Mixture([part.source.weight for part in prepared.sources.values()])
        self._fingerprints = {"data": int(prepared.fingerprint[:12], 16), "seed": seed}
        self._rows = {
            name: Rows(
                part.train,
                row_length=sequence_length + 1,
                key=stream_key(seed, name),
                eos_id=prepared.tokenizer.eos_id,
                fim=prepared.tokenizer.fim if part.source.domain == "code" else None,
                fim_rate=data.fim_rate,
            )
            for name, part in prepared.sources.items()
        }
        self._streams = list(self._rows.values())

    def next_batch(self, num_sequences: int, *, part: int = 0, num_parts: int = 1) -> Batch:
        """Of the next `num_sequences` rows those whose place in the batch is `part` modulo `num_parts` (B of the batch); the others are
        passed over, so loaders of all parts go on alike."""
        streams = [self._streams[self._mixture.next()] for _ in range(num_sequences)]
        return _batch(streams, self.sequence_length, part=part, num_parts=num_parts)

    def state(self) -> dict[str, int]:
        """Where the stream is: plain integers, for JSON."""
        state = dict(self._fingerprints, sequence_length=self.sequence_length)
        for (name, rows), count in zip(self._rows.items(), self._mixture.counts, strict=True):
            state |= {f"{name}.rows": count, f"{name}.epoch": rows.epoch, f"{name}.window": rows.window, f"{name}.offset": rows.offset}
        return state

    def restore(self, state: Mapping[str, int]) -> None:
        """Go to where `state` was taken.

        After a change of the sequence length (a new phase) each source goes on with its next window of documents: what was left
        of the current one is passed over, and no document comes twice.

        Raises DataError if the state is of other data, another seed or other sources.
        """
        known = self.state()
        if missing := sorted(known.keys() ^ state.keys()):
            raise DataError(f"the data state is of other sources: {', '.join(missing)} do not match; resume with the recipe of the run")
        for name, value in self._fingerprints.items():
            if state[name] != value:
                what = "prepared data" if name == "data" else "seed"
                raise DataError(
                    f"the data state was taken with another {what} ({state[name]}, now {value}), so the order of the sequences cannot go "
                    f"on; give back the {what} of the run, or start a new run"
                )
        for i, (name, rows) in enumerate(self._rows.items()):
            self._mixture.counts[i] = state[f"{name}.rows"]
            rows.epoch, rows.window, rows.offset = (state[f"{name}.{part}"] for part in ("epoch", "window", "offset"))
            if state["sequence_length"] != self.sequence_length and rows.offset:
                rows.skip_window()


def held_out_batches(
    prepared: Prepared, source_name: str, *, sequence_length: int, num_sequences: int, batch_size: int, part: int = 0, num_parts: int = 1
) -> Iterator[Batch]:
    """The first `num_sequences` rows of a source's held-out documents (all of them if there are fewer), always the same ones, in batches
    of `batch_size`, of which `part` of `num_parts` is returned as in Loader.next_batch.

    Documents are packed as for training but never rearranged for fill-in-the-middle. The last batch may be smaller.
    Raises DataError if the source has no held-out document.
    """
    source = prepared.sources[source_name]
    if not source.held_out.num_documents:
        raise DataError(f"source {source_name!r} has no held-out document; raise data.held_out or add documents, then prepare again")
    rows = Rows(source.held_out, row_length=sequence_length + 1, key=stream_key("held out", source_name), eos_id=prepared.tokenizer.eos_id)
    taken = 0
    while taken < num_sequences and rows.epoch == 0:
        left = rows.packed().num_rows - rows.offset
        size = min(batch_size, num_sequences - taken, left)
        yield _batch([rows] * size, sequence_length, part=part, num_parts=num_parts)
        taken += size


def _batch(streams: list[Rows], sequence_length: int, *, part: int, num_parts: int) -> Batch:
    """One row from each of `streams`, in order: those at places that are `part` modulo `num_parts`, the others are passed over."""
    tokens = np.empty((len(range(part, len(streams), num_parts)), sequence_length + 1), np.int64)
    document_ids = np.empty(tokens.shape, np.int32)
    for i, rows in enumerate(streams):
        if i % num_parts == part:
            rows.read(tokens[i // num_parts], document_ids[i // num_parts])
        else:
            rows.skip()
    return Batch(
        inputs=torch.from_numpy(tokens[:, :-1].copy()),
        labels=torch.from_numpy(np.where(document_ids[:, 1:] == PADDING, IGNORED, tokens[:, 1:])),
        document_ids=torch.from_numpy(document_ids[:, :-1].copy()),
    )
