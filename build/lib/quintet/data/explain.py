"""Which rules a document passes, and why: every rule's value beside its limits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from quintet.data import clean, contamination, language, rules
from quintet.data.sources import Document, Reader, list_files
from quintet.data.texts import Texts
from quintet.data.tokenizer import Tokenizer
from quintet.errors import DataError, did_you_mean
from quintet.spec.quality import Quality
from quintet.spec.run import Data, Source


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One rule's view of a document."""

    rule: str
    """Name of the rule."""
    meaning: str
    """What it measures."""
    value: float
    """What it measured."""
    low: float
    """Smallest value that is kept."""
    high: float
    """Largest value that is kept."""

    @property
    def passes(self) -> bool:
        """Whether the value lies within the limits."""
        return self.low <= self.value <= self.high


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What the rules say about a document."""

    origin: str
    """Where it came from."""
    source: str
    """Whose rules were asked."""
    edits: tuple[str, ...]
    """What cleaning changed."""
    findings: tuple[Finding, ...]
    """Every rule, in the order in which they give the reason."""
    without: str
    """Which rules could not be asked, and why; empty if all were."""

    @property
    def reason(self) -> str | None:
        """The first rule that drops the document; None: it is kept."""
        return next((finding.rule for finding in self.findings if not finding.passes), None)


def explain(data: Data, place: str, *, source: str | None = None, tokenizer: Tokenizer | None = None) -> Explanation:
    """Put one document through the rules of `source` (default: the first).

    `place` is a file, `file:line` of jsonl, `file:row n` of parquet, or `file:record n` of WARC, as messages name it. Without a
    `tokenizer`, rules that look at tokens are left out. Raises DataError if there is no such source or document, or it cannot be read.
    """
    names = {each.name: each for each in data.sources}
    chosen = names.get(source) if source else data.sources[0]
    if chosen is None:
        raise DataError(f"there is no source {source!r}{did_you_mean(str(source), names)}; sources are {', '.join(names)}")
    document = _find(data, chosen, place)
    quality = data.quality or Quality()
    edits = []
    text = document.text
    for edit in clean.edits_of(quality, chosen.domain):
        changed = edit(text)
        if changed != text:
            edits.append(edit.__name__.replace("_", " "))
        text = changed
    texts = Texts([text.encode()])
    asked = (*rules.rules_of(quality, chosen.domain), *language.rules_of(quality, chosen.domain), *contamination.rules_of(quality))
    findings = [_finding(rule, float(rule.measure(texts)[0])) for rule in asked]
    token_rules = rules.token_rules_of(quality, chosen.domain)
    if tokenizer and text:
        (ids,) = tokenizer.encode_batch([text])
        findings += [_finding(rule, float(rule.measure(ids, np.array([len(ids)]))[0])) for rule in token_rules]
    left = ", ".join(rule.name for rule in token_rules) if not tokenizer else ""
    without = f"{left}: there is no tokenizer yet; run quintet prepare first, or name one in data.tokenizer" if left else ""
    return Explanation(origin=document.origin, source=chosen.name, edits=tuple(edits), findings=tuple(findings), without=without)


def _finding(rule: rules.Rule | rules.TokenRule, value: float) -> Finding:
    return Finding(rule=rule.name, meaning=rule.meaning, value=value, low=rule.low, high=rule.high)


def _find(data: Data, source: Source, place: str) -> Document:
    match = re.fullmatch(r"(.+?)(?::(?:row |record )?\d+)?", place, re.DOTALL)
    assert match
    path = place if Path(place).exists() else match[1]
    files = list_files(Source(name=source.name, paths=(path,), domain=source.domain, weight=1.0)).files
    reader = Reader(files, text_key=source.text_key, max_document_bytes=data.max_document_bytes, strict=False)
    if path == place:
        documents = list(islice(reader, 2))
        if len(documents) > 1:
            raise DataError(
                f"{place} holds many documents; name one: {place}:LINE, or {place}:row NUMBER for parquet, {place}:record NUMBER for WARC"
            )
        found: Iterator[Document] = iter(documents)
    else:
        found = (document for document in reader if document.origin == place)
    document = next(found, None)
    if document is None:
        skipped = next((f": {reason} ({detail})" for origin, reason, detail in reader.skips.quarantine if origin == place), "")
        raise DataError(
            f"{place} is no document that can be read{skipped}; documents are FILE, FILE:LINE, 'FILE:row NUMBER' or 'FILE:record NUMBER'"
        )
    return document
