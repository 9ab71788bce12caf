"""Batches of packed sequences: the only file of this room that imports torch.

B sequences of a batch, L tokens of a sequence; a row has L + 1 tokens, of which the inputs are the first L and the labels the last L
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from quintet.data.mix import Mixture
from quintet.data.pack import PADDING, Empty, Row, Rows, Stream, stream_key
from quintet.data.prepare import Prepared
from quintet.data.shards import Chosen, Documents
from quintet.errors import DataError
from quintet.ops.cross_entropy import IGNORED
from quintet.spec.run import Data


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences of one length."""

    inputs: Tensor
    """Token ids: int64 [B, L]. Inputs and labels may be views of the same rows."""
    labels: Tensor
    """The next token within the row, `IGNORED` where that is padding: int64 [B, L]."""
    sizes: Sequence[Sequence[int]]
    """Tokens of each document of each row, and, at last, of its padding: they add up to L + 1."""
    rows_per_sequence: int = 1
    """Rows that stand in the place of one sequence of the phase's length: more than one in short buckets."""

    @cached_property
    def document_ids(self) -> Tensor:
        """Document of each input, counted within its row, -1 at padding: int32 [B, L]."""
        numbers = [number for row in self.sizes for number in (*range(len(row) - 1), PADDING)]
        sizes = np.fromiter(chain.from_iterable(self.sizes), np.int64, len(numbers))
        num_rows, length = self.inputs.shape
        return torch.from_numpy(np.repeat(np.array(numbers, np.int32), sizes).reshape(num_rows, length + 1)[:, :-1])

    def rows(self, chosen: slice) -> Batch:
        """The `chosen` rows alone."""
        return replace(self, inputs=self.inputs[chosen], labels=self.labels[chosen], sizes=self.sizes[chosen])


class Loader:
    """The endless stream of training rows, mixed by the sources' weights.

    Row k depends on the seed and on k alone, never on how rows are divided into batches or among ranks; the state is a few integers, and
    a loader that restores it, on any number of ranks, goes on exactly.

    With `data.buckets` each call of `next_batch` takes one of those lengths, and a document lies in a row of the least bucket that holds
    it: alone where a bucket is at most twice the one before. Documents in the smallest bucket, and the rests of those that are longer than
    the largest, share rows. Which bucket comes depends on the number of the call: they come as often as the room in them is needed.
    """

    def __init__(
        self, prepared: Prepared, data: Data, *, sequence_length: int, seed: int, mixture: Mapping[str, float] = MappingProxyType({})
    ) -> None:
        """`mixture` replaces the weights of the sources that it names; 0 leaves one out. Raises SpecError for an unknown source."""
        self.sequence_length = sequence_length
        self._fingerprints = {"data": int(prepared.fingerprint[:12], 16), "seed": seed}
        replaced = {source.name: weight for source, weight in zip(data.sources, data.weights(mixture), strict=True)}
        weights = {name: replaced[name] for name in prepared.sources}
        self._eos_id = prepared.tokenizer.eos_id
        self._in_buckets = bool(data.buckets)
        if self._in_buckets:
            self._lengths = {f"{bucket}.": bucket for bucket in data.buckets}
            self._streams = _bucketed(prepared, data, weights, seed=seed)
        else:
            self._lengths = {"": sequence_length}
            everything = {name: (part.train, weights[name]) for name, part in prepared.sources.items()}
            self._streams = {"": _Mixed(prepared, data, everything, row_length=sequence_length + 1, seed=seed)}
        self._turns = {name: 0 for name in self._streams}

    def next_batch(self, num_sequences: int, *, part: int = 0, num_parts: int = 1) -> Batch:
        """Of the next `num_sequences` rows those whose place in the batch is `part` modulo `num_parts` (B of the batch); the others are
        passed over, so loaders of all parts go on alike. In a bucket of length L there are sequence_length // L rows for each sequence.
        Raises DataError where no source may be seen once more."""
        length, streams, num_rows = self._next_rows(num_sequences)
        return replace(_batch(streams, num_rows, length, part=part, num_parts=num_parts), rows_per_sequence=num_rows // num_sequences)

    def skip(self, num_sequences: int) -> None:
        """Pass over the rows of the next batch, without touching their tokens: for a rank that needs none of them."""
        _, streams, _ = self._next_rows(num_sequences)
        for stream in streams:
            stream.skip()

    def _next_rows(self, num_sequences: int) -> tuple[int, Iterator[Stream], int]:
        """Of the next batch the length of its rows, the stream of each, and their number; where a bucket ends, empty rows follow."""
        if not self._in_buckets:
            mixed = self._streams[""]
            return self.sequence_length, (mixed.next() for _ in range(num_sequences)), num_sequences
        name = self._next_bucket()
        length, mixed = self._lengths[name], self._streams[name]
        num_rows = num_sequences * (self.sequence_length // length)
        empty = Empty(row_length=length + 1, eos_id=self._eos_id)
        return length, (empty if i and mixed.is_over else mixed.next() for i in range(num_rows)), num_rows

    def _next_bucket(self) -> str:
        """The bucket of the next batch, of those that may be seen once more."""
        names = [name for name, mixed in self._streams.items() if not mixed.is_over] or list(self._streams)
        turns = Mixture([self._streams[name].weight for name in names], [self._turns[name] for name in names])
        name = names[turns.next()]
        self._turns[name] += 1
        return name

    def state(self) -> dict[str, int]:
        """Where the stream is: plain integers, for JSON."""
        state = dict(self._fingerprints, sequence_length=self.sequence_length)
        for name, mixed in self._streams.items():
            state |= {f"{name}{key}": value for key, value in mixed.state().items()}
            state |= {f"{name}turns": self._turns[name]} if name else {}
        return state

    def restore(self, state: Mapping[str, int]) -> None:
        """Go to where `state` was taken.

        After a change of the sequence length (a new phase) each source goes on with its next window of documents: what was left
        of the current one is passed over, and no document comes twice. Another mixture begins anew, at these documents. Buckets do not
        depend on the sequence length.

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
        for name, mixed in self._streams.items():
            own = {key.removeprefix(name): value for key, value in state.items() if key.startswith(name)}
            mixed.restore(own, other_rows=not name and state["sequence_length"] != self.sequence_length)
            self._turns[name] = own["turns"] if name else 0


class _Mixed:
    """Streams of rows of one length, one of each source, mixed by weights."""

    def __init__(
        self, prepared: Prepared, data: Data, documents: Mapping[str, tuple[Documents, float]], *, row_length: int, seed: int, key: str = ""
    ) -> None:
        """`documents`: of each source, with its weight; `key` tells these streams from others of the same seed."""
        self._rows = {
            name: Rows(
                found,
                row_length=row_length,
                key=stream_key(seed, name, *([key] if key else [])),
                eos_id=prepared.tokenizer.eos_id,
                fim=prepared.tokenizer.fim if prepared.sources[name].source.domain == "code" else None,
                fim_rate=data.fim_rate,
            )
            for name, (found, _) in documents.items()
        }
        self._streams = list(self._rows.values())
        self._taken = [0] * len(self._streams)
        self._weights = [weight for _, weight in documents.values()]
        self._most_epochs = [prepared.sources[name].source.epochs for name in documents]
        self._begin_mixture()

    def _begin_mixture(self) -> None:
        """Mix the sources that may still be seen, from the beginning."""
        self._mixed = tuple(i for i, weight in enumerate(self._weights) if weight and not self._is_over(i))
        self._mixture = Mixture([self._weights[i] for i in self._mixed]) if self._mixed else None
        self._last = -1

    def _is_over(self, i: int) -> bool:
        most = self._most_epochs[i]
        return most is not None and self._streams[i].epoch >= most

    @property
    def is_over(self) -> bool:
        """Whether no source may be seen once more."""
        return all(self._is_over(i) or not weight for i, weight in enumerate(self._weights))

    @property
    def weight(self) -> float:
        """Of all sources together."""
        return sum(self._weights)

    def next(self) -> Rows:
        """The stream of the next row. Raises DataError where no source may be seen once more."""
        if self._last >= 0 and self._is_over(self._last):
            self._begin_mixture()
        if self._mixture is None:
            raise DataError(
                "every source of the mixture was seen as often as its epochs allow; raise data.sources.epochs, add text, or shorten the "
                "phases"
            )
        self._last = self._mixed[self._mixture.next()]
        self._taken[self._last] += 1
        return self._streams[self._last]

    def state(self) -> dict[str, int]:
        """Where the streams are."""
        if self._last >= 0 and self._is_over(self._last):
            self._begin_mixture()
        state = {"mixture": self._mixture_key()}
        counts = dict(zip(self._mixed, self._mixture.counts if self._mixture else (), strict=True))
        for i, (name, rows) in enumerate(self._rows.items()):
            state |= {f"{name}.rows": self._taken[i], f"{name}.mixed": counts.get(i, 0)}
            state |= {f"{name}.epoch": rows.epoch, f"{name}.window": rows.window, f"{name}.offset": rows.offset}
        return state

    def _mixture_key(self) -> int:
        """Tells one mixture from another: 48 bits."""
        return stream_key(repr([(i, float(self._weights[i])) for i in self._mixed])) >> 16

    def restore(self, state: Mapping[str, int], *, other_rows: bool) -> None:
        """Go to where `state` was taken; `other_rows`: of streams whose rows had another length."""
        for i, (name, rows) in enumerate(self._rows.items()):
            self._taken[i] = state[f"{name}.rows"]
            rows.epoch, rows.window, rows.offset = (state[f"{name}.{part}"] for part in ("epoch", "window", "offset"))
            if other_rows and rows.offset:
                rows.skip_window()
        self._begin_mixture()
        if self._mixture and state["mixture"] == self._mixture_key():
            names = list(self._rows)
            self._mixture.counts = [state[f"{names[i]}.mixed"] for i in self._mixed]


def _bucketed(prepared: Prepared, data: Data, weights: Mapping[str, float], *, seed: int) -> dict[str, _Mixed]:
    """The streams of each bucket that has documents; a source's weight is divided among its buckets by the room that its documents take."""
    found: dict[int, dict[str, tuple[Documents, float]]] = {bucket: {} for bucket in data.buckets}
    for name, part in prepared.sources.items():
        # A row of L inputs has L + 1 tokens, and a rearranged document three more than it had.
        lengths = part.train.lengths()
        more = 3 if part.source.domain == "code" and prepared.tokenizer.fim and data.fim_rate else 0
        places = np.minimum(np.searchsorted(data.buckets, lengths + more - 1), len(data.buckets) - 1)
        row = np.array(data.buckets)[places] + 1
        alone = (2 * lengths > row) & (lengths <= row)
        areas = np.bincount(places, np.where(alone, row, lengths), len(data.buckets))
        for i in np.flatnonzero(areas).tolist():
            chosen = Chosen(part.train, np.flatnonzero(places == i))
            found[data.buckets[i]][name] = (chosen, weights[name] * float(areas[i] / areas.sum()))
    return {
        f"{bucket}.": _Mixed(prepared, data, documents, row_length=bucket + 1, seed=seed, key=str(bucket))
        for bucket, documents in found.items()
        if any(weight for _, weight in documents.values())
    }


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
        yield _batch([rows] * size, size, sequence_length, part=part, num_parts=num_parts)
        taken += size


def _batch(streams: Iterable[Stream], num_rows: int, sequence_length: int, *, part: int, num_parts: int) -> Batch:
    """One row from each of `num_rows` streams, in order: those at places that are `part` modulo `num_parts`, the others are passed over."""
    taken: list[Row] = []
    for i, stream in enumerate(streams):
        if i % num_parts == part:
            taken.append(stream.read())
        else:
            stream.skip()
    rows = np.empty((len(taken), sequence_length + 1), np.int64)
    if taken:
        # Every token is copied once, straight from the files to where it stays.
        np.concatenate([run for row in taken for run in row.ids], out=rows.reshape(-1), casting="same_kind")
    labels = rows[:, 1:]
    if padded := [(i, row.padding) for i, row in enumerate(taken) if row.padding]:
        labels = labels.copy()
        for i, padding in padded:
            labels[i, -padding:] = IGNORED
    sizes = [(*row.sizes, row.padding) for row in taken]
    return Batch(inputs=torch.from_numpy(rows[:, :-1]), labels=torch.from_numpy(labels), sizes=sizes)
