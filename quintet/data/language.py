"""Which language a document is in, by lingua, which the extra `language` installs."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import numpy as np

from quintet.data.rules import Rule
from quintet.data.texts import Texts, Values
from quintet.errors import DataError
from quintet.spec.quality import Quality
from quintet.spec.run import Domain

_SAMPLED_BYTES = 1000


def rules_of(quality: Quality, domain: Domain) -> tuple[Rule, ...]:
    """The rule that keeps prose in `quality.languages`, if any is named."""
    if not quality.languages or domain == "code":
        return ()
    measure = partial(confidence, languages=quality.languages)
    return (Rule(name="language.confidence", measure=measure, low=quality.min_language),)


def confidence(texts: Texts, languages: tuple[str, ...]) -> Values:
    """Confidence that the first 1,000 bytes are in one of the languages, all languages compared."""
    detector, wanted = _detector(languages)
    samples = [raw[:_SAMPLED_BYTES].decode(errors="ignore") for raw in texts.raws]
    found = detector.compute_language_confidence_values_in_parallel(samples)
    return np.array([sum(each.value for each in values if each.language in wanted) for values in found], float)


@lru_cache(maxsize=1)
def _detector(languages: tuple[str, ...]) -> tuple[Any, frozenset[Any]]:
    try:
        import lingua
    except ImportError:
        raise DataError("data.quality.languages needs lingua; install it: pip install 'quintet[language]'") from None
    known = {language.iso_code_639_1.name.lower(): language for language in lingua.Language.all()}
    if unknown := sorted(set(languages) - known.keys()):
        raise DataError(f"data.quality.languages names {', '.join(unknown)}; known codes are {', '.join(sorted(known))}")
    detector = lingua.LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode().build()
    return detector, frozenset(known[code] for code in languages)
