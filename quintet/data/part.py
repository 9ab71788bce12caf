"""From some files of one source to one part of its shards: read, clean, judge, encode, fingerprint, count.

A part is a shard (see `shards`) with more files beside it, one entry per document:
    ranks.npy       uint64 [N]: the head of the hash that decides between training and held-out
    sizes.npy       uint32 [N]: UTF-8 bytes of the text
    exact.npy       uint64 [N, 2], bands.npy uint64 [bands, N]: fingerprints, where duplicates are looked for
    origins.zst     where each document came from, a line each
and, for the whole part,
    seen.npy        bool [vocabulary], as bits: tokens that occur
    quarantine.jsonl  what could not be read: origin, reason, detail
    part.json       `PartStatistics`

A part depends on its files' content, the recipe and the tokenizer alone, not on where or in which order parts are made.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np
import orjson
import zstandard
from numpy.typing import NDArray

from quintet.data import clean, contamination, language, minhash, rules
from quintet.data.shards import ShardWriter, committed_folder, disk_errors, token_dtype
from quintet.data.sources import Document, File, Reader
from quintet.data.texts import Texts, Values, reuse_memory
from quintet.data.tokenizer import Ids, Tokenizer
from quintet.errors import DataError
from quintet.spec.run import Data, Domain, Source

T = TypeVar("T", bound=Sized)
BATCH_BYTES = 4 << 20
"""Text that is encoded at a time, in characters."""
PIECE_BYTES = 1 << 20
"""Longer documents are encoded in pieces, in characters."""
_BATCH_DOCUMENTS = 4096
GROUP_BYTES = 1 << 18
"""Text that rules and fingerprints look at together, in bytes; the arrays made from it fit into a core's cache."""
_GROUP_TOKENS = 1 << 15
_SAMPLES = 5
_EXCERPT = 400


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
class Sample:
    """A document that a rule dropped, or that was kept."""

    draw: int
    """Hash of the document: those with the smallest are the sample."""
    origin: str
    """Where it came from."""
    value: float | None
    """What the rule measured; None for a document that was kept."""
    limits: tuple[float | None, float | None]
    """The rule's limits."""
    excerpt: str
    """How the text begins."""


@dataclass(frozen=True, kw_only=True)
class PartStatistics:
    """What became of the documents of a part."""

    read: int
    """Documents that could be read."""
    read_bytes: int
    """Their UTF-8 bytes."""
    skipped: dict[str, int]
    """Documents that could not be read, by reason."""
    skipped_examples: dict[str, tuple[str, ...]]
    """The first origins of each reason."""
    changed: int
    """Documents that cleaning changed."""
    emptied: int
    """Documents of which cleaning left nothing."""
    dropped: dict[str, int]
    """Documents by the first rule that they failed, for every rule that was asked."""
    failed: dict[str, int]
    """Documents by every rule that they failed."""
    samples: dict[str, tuple[Sample, ...]]
    """Some dropped documents of each rule, and, under the empty name, some that were kept."""
    seconds: float
    """Time of the work."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A part to be made; all that its content depends on, so that it may be made in another process."""

    data: Data
    """The recipe's section."""
    source: Source
    """The source."""
    files: tuple[File, ...]
    """What is read."""
    target: Path
    """The folder to be made."""
    tokenizer: Path
    """A tokenizer.json."""
    fingerprint: str
    """The tokenizer's."""
    reference: bool
    """Encode with the reference, because the fast encoder was found to differ."""

    @property
    def num_bytes(self) -> int:
        """Stored text to be read."""
        return sum(file.num_bytes for file in self.files)


def make(job: Job, progress: Progress | None = None, on_message: Callable[[str], None] = lambda message: None) -> None:
    """Make the part `job.target`, whole or not at all. Raises DataError for bad documents under data.strict and for a full disk."""
    reuse_memory()
    tokenizer = _tokenizer(job)
    tokenizer.on_message = on_message
    with committed_folder(job.target) as folder:
        _write(job, folder, tokenizer, progress or NoProgress())


_loaded: dict[str, Tokenizer] = {}
"""The tokenizer of this process's parts, by fingerprint; loading one takes a tenth of a second."""


def keep(tokenizer: Tokenizer) -> None:
    """Let parts that this process makes use `tokenizer`, which is loaded already."""
    _loaded.clear()
    _loaded[tokenizer.fingerprint] = tokenizer


def _tokenizer(job: Job) -> Tokenizer:
    if job.fingerprint not in _loaded:
        tokenizer = Tokenizer.from_file(job.tokenizer)
        if tokenizer.fingerprint != job.fingerprint:
            raise DataError(f"{job.tokenizer} changed while data was prepared with it ({job.fingerprint[:12]}); run prepare again")
        keep(tokenizer)
    tokenizer = _loaded[job.fingerprint]
    if job.reference:
        tokenizer.use_reference()
    return tokenizer


def _write(job: Job, folder: Path, tokenizer: Tokenizer, progress: Progress) -> None:
    began = time.perf_counter()
    data, name = job.data, job.source.name
    reader = Reader(job.files, text_key=job.source.text_key, max_document_bytes=data.max_document_bytes, strict=data.strict)
    judge = Judge(data, job.source.domain)
    seen = np.zeros(tokenizer.vocab_size, bool)
    columns = {key: [column] for key, column in _columns(data, [], []).items()}
    origins = zstandard.ZstdCompressor(level=1).compressobj()
    told = 0
    with ShardWriter(folder, dtype=token_dtype(tokenizer.vocab_size)) as writer, disk_errors(folder):
        with open(folder / "origins.zst", "wb") as stream:
            for batch in batches(reader):
                kept, raws = judge.text(batch)
                encoded = _encode(tokenizer, kept, progress=progress, name=name, num_bytes=reader.bytes_read - told)
                kept, raws, encoded = judge.tokens(kept, raws, encoded)
                seen |= np.bincount(writer.append(encoded, end=tokenizer.eos_id, num_bytes=sum(map(len, raws))), minlength=len(seen)) > 0
                for key, column in _columns(data, kept, raws).items():
                    columns[key].append(column)
                stream.write(origins.compress(_lines([document.origin for document in kept]).encode()))
                progress.advance(name, len(batch), 0)
                told = reader.bytes_read
            stream.write(origins.flush())
        for key, parts in columns.items():
            np.save(folder / f"{key}.npy", np.concatenate(parts, axis=1 if key == "bands" else 0))
        np.save(folder / "seen.npy", np.packbits(seen))
        bad = ({"origin": origin, "reason": reason, "detail": detail} for origin, reason, detail in reader.skips.quarantine)
        (folder / "quarantine.jsonl").write_bytes(b"".join(orjson.dumps(entry) + b"\n" for entry in bad))
        writer.finish(tokenizer=tokenizer.fingerprint)
        statistics = judge.statistics(reader, seconds=time.perf_counter() - began)
        (folder / "part.json").write_bytes(msgspec.json.format(msgspec.json.encode(statistics)))


def _lines(texts: Sequence[str]) -> str:
    """Each on a line of its own."""
    joined = "\n".join((*texts, ""))
    return joined if joined.count("\n") == len(texts) else "".join(text.replace("\n", " ") + "\n" for text in texts)


def _columns(data: Data, documents: Sequence[Document], raws: Sequence[bytes]) -> dict[str, NDArray[Any]]:
    """What is kept of each document beside its tokens."""
    columns: dict[str, NDArray[Any]] = {
        "ranks": ranks_of(documents),
        "sizes": np.array([len(raw) for raw in raws], np.uint32),
    }
    if dedup := data.dedup:
        found = [minhash.bands(Texts(group), ngram=dedup.ngram, bands=dedup.bands, rows=dedup.rows) for group in grouped(raws, GROUP_BYTES)]
        columns["exact"] = minhash.exact(raws)
        columns["bands"] = np.concatenate([np.empty((0, dedup.bands), np.uint64), *found]).T
    return columns


def grouped(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """The items in runs that are together at least `size` long, the last one apart."""
    begin = total = 0
    for i, item in enumerate(items):
        total += len(item)
        if total >= size:
            yield items[begin : i + 1]
            begin, total = i + 1, 0
    if begin < len(items):
        yield items[begin:]


class Judge:
    """Puts documents through cleaning and rules, and counts what becomes of them."""

    def __init__(self, data: Data, domain: Domain) -> None:
        quality = data.quality
        self.edits = clean.edits_of(quality, domain) if quality else ()
        self.rules = (
            (*rules.rules_of(quality, domain), *language.rules_of(quality, domain), *contamination.rules_of(quality)) if quality else ()
        )
        self.token_rules = rules.token_rules_of(quality, domain) if quality else ()
        self._read = self._read_bytes = self._changed = self._emptied = 0
        names = [*(rule.name for rule in self.rules), *(rule.name for rule in self.token_rules)]
        self._dropped: Counter[str] = Counter(dict.fromkeys(names, 0))
        self._failed: Counter[str] = Counter(dict.fromkeys(names, 0))
        self._samples: dict[str, list[Sample]] = {}

    def text(self, documents: Sequence[Document]) -> tuple[list[Document], list[bytes]]:
        """Those whose text passes, cleaned, and their UTF-8."""
        self._read += len(documents)
        documents, raws = self._cleaned(documents)
        if not self.rules:
            return documents, raws
        kept: list[bool] = []
        for group in grouped(raws, GROUP_BYTES):
            kept += self._judged(documents[len(kept) : len(kept) + len(group)], group).tolist()
        return [d for d, keep in zip(documents, kept, strict=True) if keep], [r for r, keep in zip(raws, kept, strict=True) if keep]

    def tokens(self, documents: list[Document], raws: list[bytes], encoded: list[Ids]) -> tuple[list[Document], list[bytes], list[Ids]]:
        """Those whose tokens pass; `encoded` is without the end-of-document token."""
        kept = np.ones(len(documents), bool)
        if self.token_rules and documents:
            decided, begin = [], 0
            for group in grouped(encoded, _GROUP_TOKENS):
                end = begin + len(group)
                lengths = np.array([len(ids) for ids in group])
                measured = [(rule, rule.measure(np.concatenate(group), lengths)) for rule in self.token_rules]
                decided.append(self._decided(documents[begin:end], raws[begin:end], measured))
                begin = end
            kept = np.concatenate(decided)
        self._sample_kept(documents, raws, kept)
        if kept.all():
            return documents, raws, encoded
        chosen = np.flatnonzero(kept).tolist()
        return [documents[i] for i in chosen], [raws[i] for i in chosen], [encoded[i] for i in chosen]

    def statistics(self, reader: Reader, *, seconds: float) -> PartStatistics:
        """What became of all documents so far."""
        skips = reader.skips
        return PartStatistics(
            read=self._read,
            read_bytes=self._read_bytes,
            skipped={str(reason): count for reason, count in skips.counts.items()},
            skipped_examples={str(reason): tuple(examples) for reason, examples in skips.examples.items()},
            changed=self._changed,
            emptied=self._emptied,
            dropped=dict(self._dropped),
            failed=dict(self._failed),
            samples={name: tuple(samples) for name, samples in self._samples.items()},
            seconds=seconds,
        )

    def _cleaned(self, documents: Sequence[Document]) -> tuple[list[Document], list[bytes]]:
        kept = [self._edited(document) for document in documents] if self.edits else list(documents)
        self._read_bytes += sum([len(document.raw) for document in kept])
        if self.edits:
            full = [document for document in kept if document.raw.strip()]
            self._emptied += len(kept) - len(full)
            kept = full
        return kept, [document.raw for document in kept]

    def _edited(self, document: Document) -> Document:
        text = document.text
        for edit in self.edits:
            text = edit(text)
        if text == document.text:
            return document
        self._changed += 1
        return msgspec.structs.replace(document, text=text, raw=text.encode())

    def _judged(self, documents: Sequence[Document], raws: Sequence[bytes]) -> NDArray[np.bool_]:
        texts = Texts(raws)
        return self._decided(documents, raws, [(rule, rule.measure(texts)) for rule in self.rules])

    def _decided(
        self, documents: Sequence[Document], raws: Sequence[bytes], measured: Sequence[tuple[rules.Rule | rules.TokenRule, Values]]
    ) -> NDArray[np.bool_]:
        """Whether each document lies within the limits of all rules: [N]."""
        kept = np.ones(len(documents), bool)
        for rule, values in measured:
            fails = ~((values >= rule.low) & (values <= rule.high))
            self._failed[rule.name] += int(fails.sum())
            first = np.flatnonzero(fails & kept)
            self._dropped[rule.name] += len(first)
            for i in first.tolist():
                self._sample(rule.name, documents[i], raws[i], float(values[i]), (rule.low, rule.high))
            kept &= ~fails
        return kept

    def _sample_kept(self, documents: Sequence[Document], raws: Sequence[bytes], kept: NDArray[np.bool_]) -> None:
        if self.rules or self.token_rules:
            for i in np.flatnonzero(kept).tolist():
                self._sample("", documents[i], raws[i], None, (None, None))

    def _sample(self, name: str, document: Document, raw: bytes, value: float | None, limits: tuple[float | None, float | None]) -> None:
        samples = self._samples.setdefault(name, [])
        draw = rank(document)
        if len(samples) < _SAMPLES or draw < samples[-1].draw:
            low, high = (None if limit is None or not np.isfinite(limit) else float(limit) for limit in limits)
            excerpt = raw[:_EXCERPT].decode(errors="ignore")
            samples.append(Sample(draw=draw, origin=document.origin, value=value, limits=(low, high), excerpt=excerpt))
            samples.sort(key=lambda sample: sample.draw)
            del samples[_SAMPLES:]


def _encode(tokenizer: Tokenizer, documents: list[Document], *, progress: Progress, name: str, num_bytes: int) -> list[Ids]:
    """The ids of each document, without the end-of-document token, in calls of about BATCH_BYTES characters, between which Ctrl-C is heard.

    Meanwhile the progress of `name` moves by `num_bytes`, which is what was read for these documents.
    """
    pieces, owners = [document.text for document in documents], list(range(len(documents)))
    if any(len(piece) > PIECE_BYTES for piece in pieces):
        cut = [(i, piece) for i, text in enumerate(pieces) for piece in tokenizer.pieces(text, PIECE_BYTES)]
        owners, pieces = [i for i, _ in cut], [piece for _, piece in cut]
    ends = np.cumsum([len(piece) for piece in pieces])
    encoded: list[Ids] = []
    begin = told = 0
    if not pieces:
        progress.advance(name, 0, num_bytes)
    while begin < len(pieces):
        end = int(np.searchsorted(ends, BATCH_BYTES + (ends[begin - 1] if begin else 0))) + 1
        encoded += tokenizer.encode_batch(pieces[begin:end])
        begin = end
        now = num_bytes * int(ends[min(end, len(ends)) - 1]) // int(ends[-1])
        progress.advance(name, 0, now - told)
        told = now
    if len(encoded) == len(documents):
        return encoded
    first = np.searchsorted(owners, np.arange(len(documents) + 1)).tolist()
    return [np.concatenate(encoded[a:b]) for a, b in itertools.pairwise(first)]


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


def first_bytes(texts: list[str], limit: int) -> list[str]:
    """Leading texts of about `limit` characters together, each of at most that many; at least one."""
    texts = [text[:limit] for text in texts]
    count = int(np.searchsorted(np.cumsum([len(text) for text in texts]), limit)) + 1
    return texts[:count]


def is_held_out(ranks: NDArray[np.uint64], share: float) -> NDArray[np.bool_]:
    """Whether each document's rank falls into the held-out share: [N] -> [N]."""
    limit = math.ceil(Fraction(share) * (1 << 64))
    return np.ones(len(ranks), bool) if limit >= 1 << 64 else ranks < np.uint64(limit)


def ranks_of(documents: Sequence[Document]) -> NDArray[np.uint64]:
    """`rank` of each: [N]."""
    return np.frombuffer(b"".join([document.identity[:8] for document in documents]), ">u8").astype(np.uint64)


def rank(document: Document) -> int:
    """The head of the document's hash, below 2^64."""
    return int.from_bytes(document.identity[:8], "big")
