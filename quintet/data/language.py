"""Which language a document is in, by py3langid (Lui and Baldwin 2012), which the extra `language` installs."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np

from quintet.data.rules import Rule
from quintet.data.texts import Texts, Values
from quintet.errors import DataError, did_you_mean, install_line
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
    rank = _ranker(languages)
    wanted = frozenset(languages)
    samples = (raw[:_SAMPLED_BYTES].decode(errors="ignore") for raw in texts.raws)
    return np.array([sum(share for language, share in rank(sample) if language in wanted) for sample in samples], float)


@lru_cache(maxsize=1)
def _ranker(languages: tuple[str, ...]) -> Callable[[str], list[tuple[str, float]]]:
    """Text -> every language with its share, which together are 1."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise DataError(f"data.quality.languages needs py3langid; install it: {install_line('language')}") from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    if unknown := sorted(set(languages) - set(identifier.labels)):
        near = did_you_mean(unknown[0], identifier.labels)
        raise DataError(f"data.quality.languages names {', '.join(unknown)}{near}; known are {', '.join(sorted(identifier.labels))}")
    rank: Callable[[str], list[tuple[str, float]]] = identifier.rank
    return rank
