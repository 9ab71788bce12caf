"""Which documents are kept: the thresholds of every quality rule with its published default, and how duplicates are found."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from quintet.errors import SpecError, did_you_mean

RuleSet = Literal["basic", "gopher", "c4", "fineweb", "code"]


def _ordered(section: object, *pairs: tuple[str, str]) -> None:
    for low, high in pairs:
        if not getattr(section, low) <= getattr(section, high):
            raise SpecError(f"{low} ({getattr(section, low)}) must be at most {high} ({getattr(section, high)})")


def _not_negative(section: Any) -> None:
    for name in section.__dataclass_fields__:
        value = getattr(section, name)
        if isinstance(value, int | float) and (value < 0 or math.isnan(value)):
            raise SpecError(f"{name} ({value}) must not be negative")


@dataclass(frozen=True, kw_only=True)
class Basic:
    """Length, vocabulary and repetition in tokens; the lines of code; the words of prose."""

    min_tokens: int = 50
    """Fewest tokens."""
    max_tokens: int = 100_000
    """Most tokens."""
    min_unique_tokens: int = 10
    """Fewest different tokens."""
    max_repetition: float = 0.5
    """Largest share of the token 8-grams that came before in the document (no published default)."""
    min_code_lines: int = 5
    """Code: fewest lines that are not blank."""
    max_comment_share: float = 0.7
    """Code: largest share of comment lines among the lines that are not blank."""
    min_mean_line: float = 10.0
    """Code: shortest mean line, in characters, blank lines left out."""
    max_mean_line: float = 200.0
    """Code: longest mean line, in characters, blank lines left out."""
    min_words: int = 20
    """Prose: fewest words."""
    min_mean_word: float = 3.0
    """Prose: shortest mean word, in characters."""
    max_mean_word: float = 15.0
    """Prose: longest mean word, in characters."""
    min_unique_words: float = 0.3
    """Prose: smallest share of different words among the words."""

    def __post_init__(self) -> None:
        _not_negative(self)
        _ordered(self, ("min_tokens", "max_tokens"), ("min_mean_line", "max_mean_line"), ("min_mean_word", "max_mean_word"))


@dataclass(frozen=True, kw_only=True)
class Gopher:
    """Quality and repetition of web text (Rae et al. 2021, arXiv 2112.11446, A.1.1)."""

    min_words: int = 50
    """Fewest words."""
    max_words: int = 100_000
    """Most words."""
    min_mean_word: float = 3.0
    """Shortest mean word, in characters."""
    max_mean_word: float = 10.0
    """Longest mean word, in characters."""
    max_hashes: float = 0.1
    """Most '#' per word."""
    max_ellipses: float = 0.1
    """Most ellipses per word."""
    max_bullet_lines: float = 0.9
    """Largest share of lines that begin with a bullet."""
    max_ellipsis_lines: float = 0.3
    """Largest share of lines that end with an ellipsis."""
    min_alphabetic_words: float = 0.8
    """Smallest share of words with a letter."""
    min_stop_words: int = 2
    """Fewest different ones of: the, be, to, of, and, that, have, with."""
    max_duplicate_lines: float = 0.3
    """Largest share of lines that came before."""
    max_duplicate_paragraphs: float = 0.3
    """Largest share of paragraphs that came before."""
    max_duplicate_line_chars: float = 0.2
    """Largest share of characters in lines that came before."""
    max_duplicate_paragraph_chars: float = 0.2
    """Largest share of characters in paragraphs that came before."""
    max_top_ngram: tuple[float, ...] = (0.20, 0.18, 0.16)
    """Largest share of characters in the most frequent 2-, 3- and 8-gram of words."""
    max_duplicate_ngrams: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)
    """Largest share of characters in 5- to 10-grams of words that came before."""

    def __post_init__(self) -> None:
        _not_negative(self)
        _ordered(self, ("min_words", "max_words"), ("min_mean_word", "max_mean_word"))
        for name, count in (("max_top_ngram", 3), ("max_duplicate_ngrams", 6)):
            if len(getattr(self, name)) != count:
                raise SpecError(f"{name} {getattr(self, name)} must have {count} shares, one per length of n-gram")


@dataclass(frozen=True, kw_only=True)
class C4:
    """Pages that are not prose (Raffel et al. 2020, arXiv 1910.10683, 2.2)."""

    min_sentences: int = 5
    """Fewest sentences."""
    max_curly_brackets: int = 0
    """Most '{', which seldom stand in prose."""
    max_lorem_ipsum: int = 0
    """Most occurrences of 'lorem ipsum'."""
    clean_lines: bool = False
    """Take out lines of fewer than 3 words, without a sentence's end, with 'javascript' or of a policy notice, before any rule looks."""

    def __post_init__(self) -> None:
        _not_negative(self)


@dataclass(frozen=True, kw_only=True)
class FineWeb:
    """What FineWeb added to C4 and Gopher (Penedo et al. 2024, arXiv 2406.17557, 3.6)."""

    min_ended_lines: float = 0.12
    """Smallest share of lines that end with punctuation."""
    max_short_lines: float = 0.67
    """Largest share of short lines."""
    short_line: int = 30
    """Characters of a short line at most."""
    max_duplicate_line_chars: float = 0.01
    """Largest share of characters in lines that came before."""
    max_newlines: float = 0.3
    """Most line feeds per word."""

    def __post_init__(self) -> None:
        _not_negative(self)


@dataclass(frozen=True, kw_only=True)
class Code:
    """Files that nobody wrote by hand (Li et al. 2023, StarCoder, arXiv 2305.06161, 3.2; whitespace and markers are ours)."""

    max_line: int = 1000
    """Longest line, in characters."""
    max_mean_line: float = 100.0
    """Longest mean line, in characters."""
    min_alphanumeric: float = 0.25
    """Smallest share of letters and digits among the bytes."""
    min_whitespace: float = 0.05
    """Smallest share of white space among the bytes; minified files fall below."""
    max_generated_marks: int = 0
    """Most marks such as 'auto-generated' or 'do not edit' in the first 1,000 bytes."""
    strip_license: bool = False
    """Take out a leading comment that speaks of copyright or licence, in whole lines."""

    def __post_init__(self) -> None:
        _not_negative(self)


RULE_SETS = ("basic", "gopher", "c4", "fineweb", "code")


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Which rules decide over documents, with their thresholds; without this section every document that can be read is kept."""

    code: tuple[RuleSet, ...] = ("basic", "code")
    """Sets of rules for sources of code."""
    prose: tuple[RuleSet, ...] = ("basic", "gopher", "c4", "fineweb")
    """Sets of rules for sources of prose."""
    without: tuple[str, ...] = ()
    """Single rules that are left out, such as 'c4.curly_brackets'."""
    basic: Basic = field(default_factory=Basic)
    """Thresholds of the rules basic.*."""
    gopher: Gopher = field(default_factory=Gopher)
    """Thresholds of the rules gopher.*."""
    c4: C4 = field(default_factory=C4)
    """Thresholds of the rules c4.*."""
    fineweb: FineWeb = field(default_factory=FineWeb)
    """Thresholds of the rules fineweb.*."""
    files: Code = field(default_factory=Code)
    """Thresholds of the rules code.*."""
    languages: tuple[str, ...] = ()
    """Languages of prose that are kept, as ISO 639-1 codes such as 'en'; empty: all."""
    min_language: float = 0.65
    """Smallest confidence that prose is in one of `languages` (FineWeb's threshold)."""
    scrub: bool = False
    """Replace e-mail addresses, public IP addresses and keys by placeholders."""
    decontaminate: tuple[str, ...] = ()
    """Files, folders and globs of evaluation texts (text, or jsonl and parquet under 'text'); what overlaps with them is dropped."""
    decontaminate_ngram: int = 13
    """Words of an overlap (GPT-3, arXiv 2005.14165, appendix C)."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_language <= 1:
            raise SpecError(f"min_language ({self.min_language}) must lie between 0 and 1")
        if self.decontaminate_ngram < 1:
            raise SpecError(f"decontaminate_ngram ({self.decontaminate_ngram}) must be at least 1")
        for name in self.without:
            if (group := name.partition(".")[0]) not in RULE_SETS:
                near = did_you_mean(group, RULE_SETS)
                raise SpecError(f"without names {name!r}, whose set is none of {', '.join(RULE_SETS)}{near}")
        if "c4" in self.code and self.c4.clean_lines:
            raise SpecError("c4.clean_lines takes lines out of prose, and quality.code has 'c4'; leave one of them out")


@dataclass(frozen=True, kw_only=True)
class Dedup:
    """How duplicates are found, within sources and across them; one document of each cluster is kept."""

    exact: bool = True
    """Drop documents that are the same but for white space."""
    near: bool = True
    """Drop documents that MinHash finds similar (Broder 1997; shape as FineWeb)."""
    ngram: int = 5
    """Words of a shingle."""
    bands: int = 14
    """Bands; documents that agree in one of them are duplicates."""
    rows: int = 8
    """Hashes of a band: similarity s is found with probability 1 - (1 - s^rows)^bands."""
    prefer: Literal["source", "longest", "first"] = "source"
    """Which document of a cluster is kept: of the source that the recipe names first, and of those the longest; the longest of all;
    or the first in reading order."""
    against: tuple[str, ...] = ()
    """Prepared directories (with the same dedup section) whose documents count as already there."""

    def __post_init__(self) -> None:
        for name in ("ngram", "bands", "rows"):
            if not 1 <= getattr(self, name) <= 1024:
                raise SpecError(f"{name} ({getattr(self, name)}) must lie between 1 and 1024")
        if not (self.exact or self.near):
            raise SpecError("exact and near are both off; leave the section data.dedup out to keep every document")
