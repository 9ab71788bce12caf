"""One training run, whole: the frozen tree that a recipe file yields and that every floor above reads."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from quintet.errors import SpecError, did_you_mean
from quintet.spec.curve import Curve, Place
from quintet.spec.layout import Layout
from quintet.spec.legal import require_legal
from quintet.spec.model import Model
from quintet.spec.quality import Dedup, Quality

Domain = Literal["code", "prose"]
Precision = Literal["bf16", "fp32"]
Recompute = Literal["none", "selective", "full"]
_MOST_THREADS = 4096
_MOST_SEQUENCES = 10**9
_LONGEST_NAME = 200
"""Bytes, as file systems allow 255, of which a temporary directory's name takes some."""


def _positive(section: object, *names: str) -> None:
    for name in names:
        if not 0 < getattr(section, name) < math.inf:
            raise SpecError(f"{name} ({getattr(section, name)}) must be larger than 0 and finite")


def _refuse_blank(name: str, directory: str, *, such_as: str) -> None:
    if not directory.strip() or "\0" in directory:
        raise SpecError(f"{name} ({directory!r}) names no folder; name one, such as {such_as}")


def _share(section: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(section, name) <= 1:
            raise SpecError(f"{name} ({getattr(section, name)}) must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A body of text of one domain."""

    name: str
    """Name in statistics and in evaluation; letters, digits, '-' and '_'."""
    paths: tuple[str, ...]
    """Files, folders, globs and URLs (.py .md .txt ... as text, .jsonl[.gz|.zst], .parquet, .warc[.gz]), or 'python:stdlib' (the running
    interpreter's library) or 'python:docs' (its docstrings and documentation topics)."""
    domain: Domain
    """Code takes part in fill-in-the-middle; evaluation is reported per domain."""
    weight: float
    """Share of the training tokens, relative to the other sources' weights."""
    text_key: str = "text"
    """Field or column that holds the text, in jsonl and parquet."""
    epochs: int | None = None
    """Most times that its documents are seen; then the other sources share its place. Absent: as often as its weight asks for."""

    def __post_init__(self) -> None:
        if not self.name or not all(c.isalnum() or c in "-_" for c in self.name):
            raise SpecError(f"source name {self.name!r} may hold only letters, digits, '-' and '_'")
        if not self.paths:
            raise SpecError(f"source {self.name!r} has no paths; name at least one file, folder or glob")
        _positive(self, "weight")
        if self.epochs is not None:
            _positive(self, "epochs")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the text comes from and how it becomes token sequences."""

    sources: tuple[Source, ...]
    """Bodies of text, mixed by weight."""
    directory: str
    """Folder of the prepared token shards."""
    tokenizer: str | None = None
    """A Hugging Face tokenizer.json; absent: a byte-level BPE of model.vocab_size is trained on the sources."""
    held_out: float = 0.01
    """Share of the documents kept for evaluation; a document's own hash decides."""
    fim_rate: float = 0.1
    """Share of the code documents rearranged as prefix, suffix, middle (V3 4.1)."""
    document_mask: bool = False
    """Keep attention inside each document of a packed sequence; V3 pre-training lets it cross."""
    buckets: tuple[int, ...] = ()
    """Lengths of rows, ascending, such as 128 to 10240: every batch has one of them, and a document a row of its own; absent: documents
    are packed into rows of the phase's sequence_length."""
    strict: bool = False
    """Stop at the first unreadable document instead of counting and skipping it."""
    max_document_bytes: int = 10_000_000
    """Longer documents are skipped and counted, in bytes."""
    quality: Quality | None = None
    """Rules that documents must pass; absent: every document that can be read is kept."""
    dedup: Dedup | None = None
    """How duplicates are found; absent: they are kept."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise SpecError("data.sources is empty; add a [[data.sources]] table with name, paths, domain and weight")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise SpecError(f"source names must differ, got {names}")
        _refuse_blank("directory", self.directory, such_as="prepared/mine")
        _share(self, "held_out", "fim_rate")
        _positive(self, "max_document_bytes")
        if any(a >= b for a, b in zip((0, *self.buckets), self.buckets, strict=False)):
            raise SpecError(f"buckets {list(self.buckets)} must be lengths in tokens, larger than 0 and ascending")

    @property
    def folder(self) -> Path:
        """`directory`, with a ~ at its beginning resolved."""
        return Path(os.path.expanduser(self.directory))

    def weights(self, mixture: Mapping[str, float], *, phase: str = "") -> tuple[float, ...]:
        """The weight of every source where `mixture` replaces some. Raises SpecError for an unknown source, or if nothing is left."""
        names = [source.name for source in self.sources]
        if unknown := sorted(set(mixture) - set(names)):
            near = did_you_mean(unknown[0], names)
            raise SpecError(f"phase {phase!r}, mixture: there is no source {unknown[0]!r}{near}; sources are {', '.join(names)}")
        found = tuple(mixture.get(source.name, source.weight) for source in self.sources)
        if not any(found):
            raise SpecError(f"phase {phase!r}, mixture: every source has the weight 0; give one of {', '.join(names)} a larger one")
        return found


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW (arXiv 1711.05101) and clipping, as V3 4.2."""

    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms, biases and other vectors are not decayed."""
    clip_norm: float = 1.0
    """Largest global gradient norm."""
    moments: Precision = "fp32"
    """Type that both moments are kept in; bf16 halves them, as V3 does (3.3.2)."""

    def __post_init__(self) -> None:
        _positive(self, "eps", "clip_norm")
        _share(self, "beta1", "beta2")
        if not 0 <= self.weight_decay < math.inf:
            raise SpecError(f"weight_decay ({self.weight_decay}) must be finite and not negative")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One stretch of training at one sequence length; the curves read as in `spec.curve`."""

    name: str
    """Name in logs."""
    length: str
    """How long it lasts: '600 steps' or '14.8T tokens'."""
    sequence_length: int
    """Tokens of one training sequence."""
    batch: tuple[str, ...]
    """Curve of the global batch, in sequences."""
    learning_rate: tuple[str, ...]
    """Curve of the learning rate."""
    mtp_weight: tuple[str, ...] = ("0.3",)
    """Curve of the weight of the MTP losses' mean (lambda); while it is 0 the modules cost nothing."""
    bias_speed: tuple[str, ...] = ("0.001",)
    """Curve of the router bias update speed (gamma)."""
    yarn: bool = True
    """Whether model.yarn, where there is one, holds in this phase already; false: the rotary embedding is as before the extension."""
    mixture: tuple[str, ...] = ()
    """Weights of sources in this phase, such as 'code 40'; a source that is not named keeps its own, and 0 leaves it out."""

    def __post_init__(self) -> None:
        _positive(self, "sequence_length")
        if Place.parse(self.length).unit == "share" or Place.parse(self.length).value < 1:
            raise SpecError(f"phase {self.name!r}: length {self.length!r} must be at least '1 steps' or '1 tokens'")
        for name in ("batch", "learning_rate", "mtp_weight", "bias_speed"):
            try:
                curve = Curve.parse(getattr(self, name))
            except SpecError as error:
                raise SpecError(f"phase {self.name!r}, {name}: {error}") from None
            if min(min(s.start, s.end) for s in curve.segments) < 0:
                raise SpecError(f"phase {self.name!r}, {name} goes below 0")
        batches = [size for s in Curve.parse(self.batch).segments for size in (s.start, s.end)]
        if not 1 <= min(batches) <= max(batches) <= _MOST_SEQUENCES:
            raise SpecError(f"phase {self.name!r}, batch {list(self.batch)} must lie between 1 and {_MOST_SEQUENCES} sequences")
        if len(self.weights) < len(self.mixture):
            raise SpecError(f"phase {self.name!r}, mixture {list(self.mixture)} names a source twice")

    @property
    def weights(self) -> dict[str, float]:
        """The mixture, by source. Raises SpecError for an entry that is not a name and a weight."""
        found = {}
        for entry in self.mixture:
            name, _, weight = entry.rpartition(" ")
            try:
                found[name.strip()] = float(weight)
            except ValueError:
                found[name.strip()] = math.nan
            if not name.strip() or not 0 <= found[name.strip()] < math.inf:
                rule = "must be a source's name and a weight of 0 or more, such as 'code 40'"
                raise SpecError(f"phase {self.name!r}, mixture: {entry!r} {rule}")
        return found


@dataclass(frozen=True, kw_only=True)
class Train:
    """How a step is computed."""

    steps: int | None = None
    """Length of the whole run in optimizer steps, replacing the phases' own lengths; several phases keep their proportion."""
    micro_batch: int = 1
    """Sequences of one forward and backward; gradients accumulate up to the phase's global batch."""
    precision: Precision = "bf16"
    """bf16: bf16 weights and activations under fp32 master weights; fp32: everything fp32."""
    recompute: Recompute = "none"
    """What backward computes again instead of keeping: nothing; norms and MLA up-projections (V3 3.2.3); whole blocks."""
    balance_weight: float = 1e-4
    """Weight of the sequence-wise balance loss (alpha, V3 2.1.2)."""
    loss_chunk: int = 1024
    """Tokens whose logits exist at one time in the loss."""
    compile: bool = True
    """Fuse element-wise operations with torch.compile; needs a C++ compiler on CPU and falls back to eager without one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where it is present."""
    num_threads: int | None = None
    """CPU threads of each rank; absent: all cores, shared out among the ranks of a machine."""
    adaptive: bool = False
    """At each checkpoint, by how long the pipeline's stages took: cut them anew where the slowest would gain 5 % or more, else try
    micro-batches of half or double the size where a step could."""
    rank_timeout: float = 600.0
    """Seconds that a rank waits in a collective before it gives the others up."""
    arrival_timeout: float | None = None
    """Seconds that ranks wait at the start, from one's arrival to the next; absent: 20 where all are started on one node, else 60."""

    def __post_init__(self) -> None:
        _positive(self, "micro_batch", "loss_chunk", "rank_timeout")
        if not 0 <= self.balance_weight < math.inf:
            raise SpecError(f"balance_weight ({self.balance_weight}) must be finite and not negative")
        for name in ("steps", "arrival_timeout"):
            if getattr(self, name) is not None:
                _positive(self, name)
        if self.num_threads is not None:
            _positive(self, "num_threads")
            if self.num_threads > _MOST_THREADS:  # OpenMP ends the process where it cannot start them
                raise SpecError(f"num_threads ({self.num_threads}) must be at most {_MOST_THREADS}; leave it out to use all cores")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Loss on held-out documents, per domain."""

    every: int | None = None
    """Steps between evaluations; absent: only at the end."""
    num_sequences: int = 64
    """Held-out sequences per source, the same ones each time."""

    def __post_init__(self) -> None:
        _positive(self, "num_sequences")
        if self.every is not None:
            _positive(self, "every")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When a run is saved and what is kept."""

    every: int | None = None
    """Steps between checkpoints; absent: only at the end and on a signal."""
    directory: str | None = None
    """Where checkpoints go, in a folder with the run's name: a folder, or a URL that fsspec knows, such as s3://bucket/checkpoints (which
    needs quintet[s3]). Absent: in the run's directory."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int | None = None
    """Also keep each checkpoint whose step is a multiple of this."""
    keep_best: int = 0
    """Also keep so many with the lowest held-out loss, among those of steps that were evaluated."""
    codec: Literal["planes", "raw"] = "planes"
    """planes: floats coded without loss into about 5/6 of their bytes (fp32) or 2/3 (bf16); raw: as they are, for slow processors
    before fast disks."""
    full_every: int = 1
    """1: each checkpoint holds all. n: of n in a row only the first does; the others refer to it for each part that is the same there, such
    as frozen weights, and it stays as long as one of them does."""
    background: bool = True
    """Write while training goes on; it takes host memory for a copy of what each rank writes."""
    tolerated_failures: int = 1
    """Background saves that may fail one after the other before the run ends; each is told at once."""

    def __post_init__(self) -> None:
        _positive(self, "keep_last", "full_every")
        if self.directory is not None and not self.directory.rpartition("://")[2].strip("/ "):
            raise SpecError(f"directory ({self.directory!r}) names no folder; name one, such as s3://bucket/checkpoints, or leave it out")
        for name in ("keep_best", "tolerated_failures"):
            if getattr(self, name) < 0:
                raise SpecError(f"{name} ({getattr(self, name)}) must not be negative")
        for name in ("every", "keep_every"):
            if getattr(self, name) is not None:
                _positive(self, name)


@dataclass(frozen=True, kw_only=True)
class Monitor:
    """What is shown and written while a run goes on; metrics.jsonl is always written."""

    live: bool = True
    """Redraw a live view in the terminal; without a terminal, plain lines are printed."""
    tensorboard: bool = True
    """Write TensorBoard files under the run directory."""
    every: int = 1
    """Steps between records."""
    prompts: tuple[str, ...] = ("def ", "import ", "class ")
    """Texts that the trained model continues in the report."""
    sample_tokens: int = 120
    """Tokens of each sample."""

    def __post_init__(self) -> None:
        _positive(self, "every", "sample_tokens")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run."""

    name: str
    """Name of the run and of its directory under `directory`."""
    model: Model
    """What the model is."""
    data: Data
    """Text, tokenizer and packing."""
    phases: tuple[Phase, ...]
    """The curriculum, in order."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """AdamW and clipping."""
    train: Train = field(default_factory=Train)
    """How a step is computed."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    """Held-out loss."""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    """Saving and retention."""
    monitor: Monitor = field(default_factory=Monitor)
    """What is shown and written."""
    layout: Layout = field(default_factory=Layout)
    """Degrees of parallelism."""
    directory: str = "runs"
    """Folder that holds the run's directory."""
    seed: int = 0
    """Seed of the weights and of the data order."""

    def __post_init__(self) -> None:
        if not self.name or not all(c.isalnum() or c in "-_." for c in self.name) or self.name.startswith("."):
            raise SpecError(f"name {self.name!r} may hold only letters, digits, '-', '_' and '.', and not begin with '.'")
        if (length := len(self.name.encode())) > _LONGEST_NAME:
            raise SpecError(f"name {self.name[:20]!r}... ({length} bytes) must have at most {_LONGEST_NAME}: it is a directory's name, too")
        _refuse_blank("directory", self.directory, such_as="runs")
        if not self.phases:
            raise SpecError("phases is empty; add a [[phases]] table with name, length, sequence_length, batch and learning_rate")
        for phase in self.phases:
            if phase.sequence_length > self.model.max_context:
                raise SpecError(
                    f"phase {phase.name!r}: sequence_length ({phase.sequence_length}) must be at most model.max_context "
                    f"({self.model.max_context}); raise max_context (and extend it with model.yarn) or shorten the sequence"
                )
            if not phase.yarn and self.model.yarn is None:
                raise SpecError(f"phase {phase.name!r}: yarn is false, but the model has none; leave it out, or add a [model.yarn] table")
            if phase.sequence_length > (longest := self.model_in(phase).max_context):
                raise SpecError(
                    f"phase {phase.name!r}: sequence_length ({phase.sequence_length}) must be at most model.yarn.original_context "
                    f"({longest}) where yarn is false; leave yarn out of the phase, or shorten the sequence"
                )
        for phase in self.phases:
            self.data.weights(phase.weights, phase=phase.name)
            if self.data.buckets and self.data.buckets[-1] > phase.sequence_length:
                raise SpecError(
                    f"phase {phase.name!r}: the largest of data.buckets ({self.data.buckets[-1]}) must be at most sequence_length "
                    f"({phase.sequence_length}); leave it out, or lengthen the sequence"
                )
        require_legal(self.layout, self.model, (*self.data.buckets, *(phase.sequence_length for phase in self.phases)))
        if not 0 <= self.seed < 2**63:
            raise SpecError(f"seed ({self.seed}) must lie between 0 and 2^63 - 1")

    @property
    def folder(self) -> Path:
        """Where the run lives: in `directory`, with a ~ at its beginning resolved, under its name."""
        return Path(os.path.expanduser(self.directory)) / self.name

    def model_in(self, phase: Phase) -> Model:
        """The model as it is in a phase: before its context is extended it has no YaRN, and the original context."""
        yarn = self.model.yarn
        if phase.yarn or yarn is None:
            return self.model
        return replace(self.model, yarn=None, max_context=min(self.model.max_context, yarn.original_context))
