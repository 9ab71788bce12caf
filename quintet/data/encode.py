"""From the documents of one source to its two shards: read, encode, split off held-out documents, count."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import numpy as np

from quintet.data.shards import Shard, ShardWriter, token_dtype
from quintet.data.sources import Document, Listing, Reader
from quintet.data.tokenizer import Ids, Tokenizer
from quintet.errors import DataError
from quintet.spec.run import Data, Source

BATCH_BYTES = 4 << 20
"""Text that is encoded at a time, in characters."""
PIECE_BYTES = 1 << 20
"""Longer documents are encoded in pieces, in characters."""
_BATCH_DOCUMENTS = 4096
_CHECKED_BYTES = 256 << 10
_PERCENTILES = (1, 10, 50, 90, 99, 100)


class Progress(Protocol):
    """Shown by whoever can draw."""

    def start(self, name: str, num_bytes: int) -> None:
        """Work on `name` (a source, or "tokenizer") begins; `num_bytes` of stored text lie before it."""

    def advance(self, name: str, num_documents: int, num_bytes: int) -> None:
        """So many more documents and stored bytes are done."""


class NoProgress:
    """Shows nothing."""

    def start(self, name: str, num_bytes: int) -> None:
        pass

    def advance(self, name: str, num_documents: int, num_bytes: int) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What became of one source."""

    documents: int
    """Documents for training."""
    held_out_documents: int
    """Documents kept for evaluation."""
    tokens: int
    """Token ids for training, end-of-document included."""
    held_out_tokens: int
    """Token ids for evaluation."""
    num_bytes: int
    """UTF-8 bytes of all documents."""
    length_percentiles: Mapping[int, int]
    """Percentile -> tokens of a document, over all documents."""
    unique_tokens: int
    """Different ids that occur."""
    skipped: Mapping[str, int]
    """Reason -> documents left out (see `sources.REMEDIES`)."""
    skipped_examples: Mapping[str, tuple[str, ...]]
    """Reason -> the first places."""
    seconds: float
    """Time that reading, encoding and writing took."""
    reused: bool = False
    """Nothing had changed, so the work was done before."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens of both splits per second of work."""
        return (self.tokens + self.held_out_tokens) / max(self.seconds, 1e-9)


def tokenize(data: Data, source: Source, listing: Listing, folder: Path, tokenizer: Tokenizer, progress: Progress) -> Statistics:
    """Write the two shards of `source` into `folder`. Raises DataError if no document is left for training."""
    began = time.perf_counter()
    reader = Reader(listing.files, text_key=source.text_key, max_document_bytes=data.max_document_bytes, strict=data.strict)
    if listing.num_not_text:
        reader.skips.add("not_text", source.name, count=listing.num_not_text)
    dtype = token_dtype(tokenizer.vocab_size)
    seen = np.zeros(tokenizer.vocab_size, bool)
    with ShardWriter(folder / "train", dtype=dtype) as train, ShardWriter(folder / "held_out", dtype=dtype) as held_out:
        split = _Split(train, held_out, share=data.held_out)
        read = 0
        for i, batch in enumerate(batches(reader)):
            if i == 0:
                tokenizer.check(_first_bytes([document.text for document in batch], _CHECKED_BYTES))
            encoded = _encode(tokenizer, batch, progress=progress, name=source.name, num_bytes=reader.bytes_read - read)
            seen[np.concatenate(encoded)] = True
            split.add(batch, encoded)
            progress.advance(source.name, len(batch), 0)
            read = reader.bytes_read
        split.close()
        for writer in (train, held_out):
            writer.finish(tokenizer=tokenizer.fingerprint)
    skips = reader.skips
    if not train.num_documents:
        skipped = ", ".join(f"{count} {reason}" for reason, count in skips.counts.items()) or "nothing"
        raise DataError(
            f"source {source.name!r} has no document to train on ({len(listing.files)} files, {held_out.num_documents} documents held out, "
            f"skipped: {skipped}); add text, correct the source, or lower data.held_out ({data.held_out})"
        )
    lengths = np.concatenate([Shard(folder / name).lengths() for name in ("train", "held_out")])
    percentiles = np.percentile(lengths, _PERCENTILES, method="nearest").astype(int)
    return Statistics(
        documents=train.num_documents,
        held_out_documents=held_out.num_documents,
        tokens=train.num_tokens,
        held_out_tokens=held_out.num_tokens,
        num_bytes=train.num_bytes + held_out.num_bytes,
        length_percentiles=dict(zip(_PERCENTILES, percentiles.tolist(), strict=True)),
        unique_tokens=int(seen.sum()),
        skipped={str(reason): count for reason, count in skips.counts.items()},
        skipped_examples={str(reason): tuple(examples) for reason, examples in skips.examples.items()},
        seconds=time.perf_counter() - began,
    )


def _encode(tokenizer: Tokenizer, documents: list[Document], *, progress: Progress, name: str, num_bytes: int) -> list[Ids]:
    """The ids of each document, end-of-document included, in calls of about BATCH_BYTES characters, between which Ctrl-C is heard.

    Meanwhile the progress of `name` moves by `num_bytes`, which is what was read for these documents.
    """
    pieces = [(i, piece) for i, document in enumerate(documents) for piece in tokenizer.pieces(document.text, PIECE_BYTES)]
    ends = np.cumsum([len(piece) for _, piece in pieces])
    eos = np.array([tokenizer.eos_id], np.uint32)
    parts: list[list[Ids]] = [[] for _ in documents]
    begin = told = 0
    while begin < len(pieces):
        end = int(np.searchsorted(ends, BATCH_BYTES + (ends[begin - 1] if begin else 0))) + 1
        group = pieces[begin:end]
        for (i, _), ids in zip(group, tokenizer.encode_batch([piece for _, piece in group]), strict=True):
            parts[i].append(ids)
        begin = end
        now = num_bytes * int(ends[min(end, len(ends)) - 1]) // int(ends[-1])
        progress.advance(name, 0, now - told)
        told = now
    return [np.concatenate([*ids, eos]) for ids in parts]


def batches(reader: Reader) -> Iterator[list[Document]]:
    """The reader's documents in lists of about BATCH_BYTES characters."""
    batch: list[Document] = []
    size = 0
    for document in reader:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _first_bytes(texts: list[str], limit: int) -> list[str]:
    """Leading texts of about `limit` characters together, each of at most that many; at least one."""
    texts = [text[:limit] for text in texts]
    count = int(np.searchsorted(np.cumsum([len(text) for text in texts]), limit)) + 1
    return texts[:count]


class _Split:
    """Sends documents to training or held-out by their own hash.

    If no hash falls below `share` (a small source), the document with the smallest one is held out after all, provided that another
    is left for training: until the first is held out, the smallest so far waits here.
    """

    def __init__(self, train: ShardWriter, held_out: ShardWriter, *, share: float) -> None:
        self.train = train
        self.held_out = held_out
        self.share = share
        self.waiting: tuple[Document, Ids] | None = None

    def add(self, documents: list[Document], encoded: list[Ids]) -> None:
        """Write the documents of one batch."""
        pairs = list(zip(documents, encoded, strict=True))
        held_out = [pair for pair in pairs if is_held_out(pair[0], self.share)]
        train = [pair for pair in pairs if not is_held_out(pair[0], self.share)]
        if self.waiting:
            train.insert(0, self.waiting)
            self.waiting = None
        self._write(self.held_out, held_out)
        if self.share > 0 and not self.held_out.num_documents and train:
            self.waiting = train.pop(min(range(len(train)), key=lambda i: _rank(train[i][0])))
        self._write(self.train, train)

    def close(self) -> None:
        """Write the document that still waits."""
        if self.waiting:
            self._write(self.held_out if self.train.num_documents else self.train, [self.waiting])
            self.waiting = None

    @staticmethod
    def _write(writer: ShardWriter, pairs: list[tuple[Document, Ids]]) -> None:
        writer.append([ids for _, ids in pairs], num_bytes=sum(len(document.text.encode()) for document, _ in pairs))


def is_held_out(document: Document, share: float) -> bool:
    """Whether the document's hash falls into the held-out share."""
    return Fraction(_rank(document), 1 << 64) < Fraction(share)


def _rank(document: Document) -> int:
    return int.from_bytes(document.identity[:8], "big")
