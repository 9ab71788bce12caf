"""Documents that hold evaluation texts: an overlap of n words in a row (GPT-3, arXiv 2005.14165, appendix C)."""

from __future__ import annotations

from functools import lru_cache, partial

import numpy as np

from quintet.data.digest import digest_of
from quintet.data.minhash import shingles
from quintet.data.rules import Rule
from quintet.data.sources import Listing, Reader, list_files
from quintet.data.texts import Hashes, Texts, Values
from quintet.errors import DataError
from quintet.spec.quality import Quality
from quintet.spec.run import Source

_EVALUATION_BYTES = 100_000_000


def rules_of(quality: Quality) -> tuple[Rule, ...]:
    """The rule that drops overlaps with `quality.decontaminate`, if there is any."""
    if not quality.decontaminate:
        return ()
    measure = partial(overlaps, known=quality.decontaminate, ngram=quality.decontaminate_ngram)
    return (Rule(name="evaluation.overlap", measure=measure, high=0),)


def overlaps(texts: Texts, known: tuple[str, ...], ngram: int) -> Values:
    """Runs of words that stand in an evaluation text too."""
    hashes, owner = shingles(texts, ngram)
    evaluated = _evaluated(known, ngram)
    place = np.minimum(np.searchsorted(evaluated, hashes), len(evaluated) - 1)
    return np.bincount(owner[evaluated[place] == hashes], minlength=len(texts)).astype(float)


def digest(quality: Quality) -> str:
    """Hash of the evaluation texts; empty without any. Raises DataError for a path that does not exist."""
    return digest_of(_listing(quality.decontaminate).files) if quality.decontaminate else ""


def _listing(paths: tuple[str, ...]) -> Listing:
    return list_files(Source(name="evaluation", paths=paths, domain="prose", weight=1.0))


@lru_cache(maxsize=1)
def _evaluated(paths: tuple[str, ...], ngram: int) -> Hashes:
    """The n-grams of all evaluation texts, sorted."""
    reader = Reader(_listing(paths).files, text_key="text", max_document_bytes=_EVALUATION_BYTES, strict=True)
    found = [np.unique(shingles(Texts([document.text.encode()]), ngram)[0]) for document in reader]
    if not found:
        raise DataError(f"quality.decontaminate ({', '.join(paths)}) holds no text; correct the paths")
    return np.unique(np.concatenate(found))
