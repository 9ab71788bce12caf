"""What became of the documents of a source, gathered from its parts."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from quintet.data.dedup import Duplicates, Pair
from quintet.data.part import PartStatistics, Sample

_SAMPLES = 5
_EXAMPLES = 3
WARNED_SHARE = 0.1
"""A rule that drops more than this share of a source's documents is warned of."""


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
    """UTF-8 bytes of the text behind both."""
    length_percentiles: dict[int, int]
    """Percentile -> tokens of a document at that percentile."""
    unique_tokens: int
    """Different token ids that occur, in duplicates too."""
    skipped: dict[str, int]
    """Documents that could not be read, by reason."""
    skipped_examples: dict[str, tuple[str, ...]]
    """Where the first ones of each reason are."""
    read: int
    """Documents that could be read."""
    changed: int
    """Documents that cleaning changed."""
    emptied: int
    """Documents of which cleaning left nothing."""
    dropped: dict[str, int]
    """Documents by the first rule that they failed, for every rule that was asked."""
    failed: dict[str, int]
    """Documents by every rule that they failed; of token rules, those that came so far."""
    samples: dict[str, tuple[Sample, ...]]
    """Some dropped documents of each rule, and, under the empty name, some that were kept."""
    exact_duplicates: int
    """Documents dropped as the same as another."""
    near_duplicates: int
    """Documents dropped as similar to another."""
    duplicate_pairs: tuple[Pair, ...]
    """Some of both, beside the one that was kept."""
    seconds: float
    """Time of the work, over all processes."""
    reused: bool = False
    """Nothing had to be done this time."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens of both splits per second of one process's work."""
        return (self.tokens + self.held_out_tokens) / max(self.seconds, 1e-9)

    @property
    def warnings(self) -> dict[str, float]:
        """Rules that dropped more than `WARNED_SHARE` of the documents, with their share."""
        shares = {name: count / max(self.read, 1) for name, count in self.dropped.items()}
        return {name: share for name, share in shares.items() if share > WARNED_SHARE}


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """The counts of a source's parts together."""

    read: int
    """As in `Statistics`, and so the others."""
    changed: int
    emptied: int
    skipped: dict[str, int]
    skipped_examples: dict[str, tuple[str, ...]]
    dropped: dict[str, int]
    failed: dict[str, int]
    samples: dict[str, tuple[Sample, ...]]
    seconds: float


def gather(parts: Sequence[PartStatistics], *, num_not_text: int, name: str) -> Gathered:
    """Add up the parts of source `name`, of which `num_not_text` files were left out by name."""
    skipped = _total(part.skipped for part in parts)
    examples: dict[str, tuple[str, ...]] = {}
    samples: dict[str, list[Sample]] = {}
    for part in parts:
        for reason, found in part.skipped_examples.items():
            examples[reason] = (*examples.get(reason, ()), *found)[:_EXAMPLES]
        for rule, drawn in part.samples.items():
            samples[rule] = heapq.nsmallest(_SAMPLES, [*samples.get(rule, []), *drawn], key=lambda sample: sample.draw)
    if num_not_text:
        skipped, examples = {"not_text": num_not_text} | skipped, {"not_text": (name,)} | examples
    return Gathered(
        read=sum(part.read for part in parts),
        changed=sum(part.changed for part in parts),
        emptied=sum(part.emptied for part in parts),
        skipped=skipped,
        skipped_examples=examples,
        dropped=_total(part.dropped for part in parts),
        failed=_total(part.failed for part in parts),
        samples={rule: tuple(drawn) for rule, drawn in samples.items()},
        seconds=sum(part.seconds for part in parts),
    )


def _total(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in counts:
        total.update(part)
    return dict(total)


NO_DUPLICATES = Duplicates(exact=0, near=0, pairs=())
