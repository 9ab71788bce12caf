"""The quality rules: each one measures every document of a batch, and keeps those whose value lies within its limits.

A rule is a name, a pure function from texts (or from token ids) to one value per document, and two limits from the recipe.
"""
# ruff: noqa: RUF001 -- punctuation of other scripts is the point

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quintet.data import repetition
from quintet.data.texts import Ints, Texts, Values, hash_spans, mix, ratio
from quintet.spec.quality import C4, Basic, Code, FineWeb, Gopher, Quality
from quintet.spec.run import Domain

VERSION = 1
"""Raised when a rule decides otherwise with the same limits."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One reason to drop a document."""

    name: str
    """`set.what`."""
    measure: Callable[[Texts], Values]
    """One value per document; its docstring says what it is."""
    low: float = -math.inf
    """Smallest value that is kept."""
    high: float = math.inf
    """Largest value that is kept."""

    @property
    def meaning(self) -> str:
        """What is measured, in a line."""
        return _told(self.measure)


@dataclass(frozen=True, kw_only=True)
class TokenRule:
    """A reason to drop a document that needs its tokens."""

    name: str
    """`set.what`."""
    measure: Callable[[NDArray[Any], Ints], Values]
    """ids of all documents [T], their lengths [N] -> one value per document."""
    low: float = -math.inf
    """Smallest value that is kept."""
    high: float = math.inf
    """Largest value that is kept."""

    @property
    def meaning(self) -> str:
        """What is measured, in a line."""
        return _told(self.measure)


def _told(measure: Callable[..., Values]) -> str:
    function = measure.func if isinstance(measure, partial) else measure
    return str(function.__doc__).strip().splitlines()[0].rstrip(".")


# Words.


def num_words(texts: Texts) -> Values:
    """Words."""
    return texts.words.counts.astype(float)


def mean_word(texts: Texts) -> Values:
    """Mean length of a word in characters."""
    return ratio(texts.sums(texts.word_chars, texts.words), texts.words.counts)


def unique_words(texts: Texts) -> Values:
    """Share of different words among the words."""
    owner = texts.words.owner
    keys = texts.word_hashes ^ mix(owner.astype(np.uint64))
    order = np.argsort(keys)
    new = np.concatenate([[True], np.diff(keys[order]) != 0])[: len(keys)]
    return ratio(np.bincount(owner[order[new]], minlength=len(texts)), texts.words.counts)


def hashes_per_word(texts: Texts) -> Values:
    """'#' per word."""
    return ratio(np.array([raw.count(b"#") for raw in texts.raws]), texts.words.counts)


def ellipses_per_word(texts: Texts) -> Values:
    """Ellipses ('...' or '…') per word."""
    return ratio(np.array([raw.count(b"...") + raw.count("…".encode()) for raw in texts.raws]), texts.words.counts)


def alphabetic_words(texts: Texts) -> Values:
    """Share of words with a letter."""
    total = np.concatenate([[0], np.cumsum(_LETTERS[texts.data], dtype=np.int32)])
    return ratio(texts.sums(total[texts.words.end] > total[texts.words.begin], texts.words), texts.words.counts)


def stop_words(texts: Texts) -> Values:
    """Different ones of the, be, to, of, and, that, have, with."""
    short = np.flatnonzero(texts.words.end - texts.words.begin <= 4)
    hashes, owner = texts.word_hashes[short], texts.words.owner[short]
    found = [np.bincount(owner[hashes == stop], minlength=len(texts)) > 0 for stop in _STOP_HASHES]
    return np.sum(found, axis=0).astype(float)


# Lines.


def num_lines(texts: Texts) -> Values:
    """Lines that are not blank."""
    return texts.lines.counts.astype(float)


def mean_line(texts: Texts) -> Values:
    """Mean length of a line in characters, blank ones left out."""
    lines = texts.lines
    return ratio(texts.sums(texts.num_chars(lines.begin, lines.end), lines), lines.counts)


def longest_line(texts: Texts) -> Values:
    """Longest line in characters."""
    longest = np.zeros(len(texts), np.int64)
    np.maximum.at(longest, texts.lines.owner, texts.num_chars(texts.lines.begin, texts.lines.end))
    return longest.astype(float)


def comment_share(texts: Texts) -> Values:
    """Share of comment lines among the lines that are not blank."""
    lines = texts.lines
    first, second = texts.data[lines.begin], texts.data[lines.begin + 1]
    # '#include' and '#define' are no comments: behind '#' a letter is taken for a directive.
    comment = (first == ord("#")) & ~_ASCII_LETTERS[second]
    comment |= (first == ord("/")) & ((second == ord("/")) | (second == ord("*")))
    comment |= (first == ord("*")) & ((second <= 32) | (second == ord("/")) | (second == ord("*")))
    comment |= (first == ord("-")) & (second == ord("-"))
    comment |= ((first == ord("%")) | (first == ord(";"))) & ((second <= 32) | (second == first))
    return ratio(texts.sums(comment, lines), lines.counts)


def bullet_lines(texts: Texts) -> Values:
    """Share of lines that begin with a bullet ('-' or '•')."""
    lines, data = texts.lines, texts.data
    bullet = (data[lines.begin] == ord("-")) | _has(data, lines.begin, "•")
    return ratio(texts.sums(bullet, lines), lines.counts)


def ellipsis_lines(texts: Texts) -> Values:
    """Share of lines that end with an ellipsis."""
    lines, data = texts.lines, texts.data
    ends = _has(data, lines.end - 3, "...") | _has(data, lines.end - 3, "…")
    return ratio(texts.sums(ends & (lines.end - lines.begin >= 3), lines), lines.counts)


def ended_lines(texts: Texts) -> Values:
    """Share of lines that end with punctuation."""
    return ratio(texts.sums(_is_ended(texts, texts.lines.end), texts.lines), texts.lines.counts)


def short_lines(texts: Texts, most: int) -> Values:
    """Share of short lines."""
    lines = texts.lines
    return ratio(texts.sums(texts.num_chars(lines.begin, lines.end) <= most, lines), lines.counts)


def newlines_per_word(texts: Texts) -> Values:
    """Line feeds per word."""
    return ratio(np.array([raw.count(b"\n") for raw in texts.raws]), texts.words.counts)


def num_sentences(texts: Texts) -> Values:
    """Sentences: words that end with punctuation."""
    return texts.sums(_is_ended(texts, texts.words.end), texts.words).astype(float)


# Repetition.


def duplicate_lines(texts: Texts) -> Values:
    """Share of lines that came before."""
    return repetition.duplicate_share(texts, texts.lines)


def duplicate_line_chars(texts: Texts) -> Values:
    """Share of characters in lines that came before."""
    return repetition.duplicate_chars(texts, texts.lines)


def duplicate_paragraphs(texts: Texts) -> Values:
    """Share of paragraphs that came before."""
    return repetition.duplicate_share(texts, texts.paragraphs)


def duplicate_paragraph_chars(texts: Texts) -> Values:
    """Share of characters in paragraphs that came before."""
    return repetition.duplicate_chars(texts, texts.paragraphs)


# Signs of what is not prose, or not written by hand.


def curly_brackets(texts: Texts) -> Values:
    """'{' in the text."""
    return np.array([raw.count(b"{") for raw in texts.raws], float)


def lorem_ipsum(texts: Texts) -> Values:
    """Occurrences of 'lorem ipsum'."""
    return np.array([raw.lower().count(b"lorem ipsum") for raw in texts.raws], float)


def generated_marks(texts: Texts) -> Values:
    """Marks such as 'auto-generated' or 'do not edit' in the first 1,000 bytes."""
    heads = [raw[:1000].lower() for raw in texts.raws]
    return np.array([sum(map(head.count, _GENERATED)) for head in heads], float)


def alphanumeric(texts: Texts) -> Values:
    """Share of letters and digits among the bytes."""
    return ratio(_total(texts, _ALPHANUMERIC[texts.data]), np.diff(texts.begin))


def whitespace(texts: Texts) -> Values:
    """Share of white space among the bytes."""
    return ratio(_total(texts, texts.data <= 32), np.diff(texts.begin))


# Tokens.


def num_tokens(ids: NDArray[Any], lengths: Ints) -> Values:
    """Tokens."""
    return lengths.astype(float)


def unique_tokens(ids: NDArray[Any], lengths: Ints) -> Values:
    """Different tokens."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    return _num_different(owner.astype(np.uint64) << np.uint64(32) | ids.astype(np.uint64), owner, len(lengths))


def token_repetition(ids: NDArray[Any], lengths: Ints) -> Values:
    """Share of the token 8-grams that came before."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    count = max(len(ids) - _REPEATED + 1, 0)
    wide = ids.astype(np.uint64) + np.uint64(1)
    keys = wide[:count].copy()
    for i in range(1, _REPEATED):
        keys *= np.uint64(0x9E3779B97F4A7C15)
        keys += wide[i : i + count]
    inside = owner[:count] == owner[_REPEATED - 1 :] if count else np.empty(0, bool)
    owner = owner[:count][inside]
    counts = np.maximum(lengths - _REPEATED + 1, 0)
    return ratio(counts - _num_different(mix(keys[inside] + mix(owner.astype(np.uint64))), owner, len(lengths)), counts)


def rules_of(quality: Quality, domain: Domain) -> tuple[Rule, ...]:
    """The rules for a source of `domain` that look at text, in the order in which they give the reason."""
    sets = quality.code if domain == "code" else quality.prose
    found = [rule for name in sets for rule in _BY_SET[name](quality, domain)]
    return tuple(rule for rule in found if rule.name not in quality.without)


def token_rules_of(quality: Quality, domain: Domain) -> tuple[TokenRule, ...]:
    """The rules for a source of `domain` that look at tokens."""
    b = quality.basic
    found = (
        TokenRule(name="basic.tokens", measure=num_tokens, low=b.min_tokens, high=b.max_tokens),
        TokenRule(name="basic.unique_tokens", measure=unique_tokens, low=b.min_unique_tokens),
        TokenRule(name="basic.repetition", measure=token_repetition, high=b.max_repetition),
    )
    sets = quality.code if domain == "code" else quality.prose
    return tuple(rule for rule in found if "basic" in sets and rule.name not in quality.without)


def _basic(quality: Quality, domain: Domain) -> Iterator[Rule]:
    b: Basic = quality.basic
    if domain == "code":
        yield Rule(name="basic.code_lines", measure=num_lines, low=b.min_code_lines)
        yield Rule(name="basic.comments", measure=comment_share, high=b.max_comment_share)
        yield Rule(name="basic.mean_line", measure=mean_line, low=b.min_mean_line, high=b.max_mean_line)
    else:
        yield Rule(name="basic.words", measure=num_words, low=b.min_words)
        yield Rule(name="basic.mean_word", measure=mean_word, low=b.min_mean_word, high=b.max_mean_word)
        yield Rule(name="basic.unique_words", measure=unique_words, low=b.min_unique_words)


def _gopher(quality: Quality, domain: Domain) -> Iterator[Rule]:
    g: Gopher = quality.gopher
    yield Rule(name="gopher.words", measure=num_words, low=g.min_words, high=g.max_words)
    yield Rule(name="gopher.mean_word", measure=mean_word, low=g.min_mean_word, high=g.max_mean_word)
    yield Rule(name="gopher.hashes", measure=hashes_per_word, high=g.max_hashes)
    yield Rule(name="gopher.ellipses", measure=ellipses_per_word, high=g.max_ellipses)
    yield Rule(name="gopher.bullet_lines", measure=bullet_lines, high=g.max_bullet_lines)
    yield Rule(name="gopher.ellipsis_lines", measure=ellipsis_lines, high=g.max_ellipsis_lines)
    yield Rule(name="gopher.alphabetic_words", measure=alphabetic_words, low=g.min_alphabetic_words)
    yield Rule(name="gopher.stop_words", measure=stop_words, low=g.min_stop_words)
    yield Rule(name="gopher.duplicate_lines", measure=duplicate_lines, high=g.max_duplicate_lines)
    yield Rule(name="gopher.duplicate_paragraphs", measure=duplicate_paragraphs, high=g.max_duplicate_paragraphs)
    yield Rule(name="gopher.duplicate_line_chars", measure=duplicate_line_chars, high=g.max_duplicate_line_chars)
    yield Rule(name="gopher.duplicate_paragraph_chars", measure=duplicate_paragraph_chars, high=g.max_duplicate_paragraph_chars)
    for n, share in zip(repetition.TOP, g.max_top_ngram, strict=True):
        yield Rule(name=f"gopher.top_{n}gram", measure=partial(repetition.top_ngram_share, n=n), high=share)
    for n, share in zip(repetition.DUPLICATE, g.max_duplicate_ngrams, strict=True):
        yield Rule(name=f"gopher.duplicate_{n}grams", measure=partial(repetition.duplicate_ngram_share, n=n), high=share)


def _c4(quality: Quality, domain: Domain) -> Iterator[Rule]:
    c: C4 = quality.c4
    yield Rule(name="c4.sentences", measure=num_sentences, low=c.min_sentences)
    yield Rule(name="c4.curly_brackets", measure=curly_brackets, high=c.max_curly_brackets)
    yield Rule(name="c4.lorem_ipsum", measure=lorem_ipsum, high=c.max_lorem_ipsum)


def _fineweb(quality: Quality, domain: Domain) -> Iterator[Rule]:
    f: FineWeb = quality.fineweb
    yield Rule(name="fineweb.ended_lines", measure=ended_lines, low=f.min_ended_lines)
    yield Rule(name="fineweb.short_lines", measure=partial(short_lines, most=f.short_line), high=f.max_short_lines)
    yield Rule(name="fineweb.duplicate_line_chars", measure=duplicate_line_chars, high=f.max_duplicate_line_chars)
    yield Rule(name="fineweb.newlines", measure=newlines_per_word, high=f.max_newlines)


def _code(quality: Quality, domain: Domain) -> Iterator[Rule]:
    c: Code = quality.files
    yield Rule(name="code.longest_line", measure=longest_line, high=c.max_line)
    yield Rule(name="code.mean_line", measure=mean_line, high=c.max_mean_line)
    yield Rule(name="code.alphanumeric", measure=alphanumeric, low=c.min_alphanumeric)
    yield Rule(name="code.whitespace", measure=whitespace, low=c.min_whitespace)
    yield Rule(name="code.generated", measure=generated_marks, high=c.max_generated_marks)


_BY_SET: dict[str, Callable[[Quality, Domain], Iterator[Rule]]] = {
    "basic": _basic,
    "gopher": _gopher,
    "c4": _c4,
    "fineweb": _fineweb,
    "code": _code,
}

_REPEATED = 8
_GENERATED = (
    *(b"auto-generated", b"autogenerated", b"automatically generated", b"generated automatically"),
    *(b"this file is generated", b"this file was generated", b"do not edit"),
)
_STOPS = ("the", "be", "to", "of", "and", "that", "have", "with")


def _table(chars: bytes, *, others: bool = False) -> NDArray[np.bool_]:
    """Byte -> whether it is one of `chars`; `others`: and of those that no ASCII character has."""
    table = np.zeros(256, bool)
    table[list(chars)] = True
    table[128:] = others
    return table


_ASCII_LETTERS = _table(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_LETTERS = _ASCII_LETTERS | _table(b"", others=True)
_ALPHANUMERIC = _LETTERS | _table(b"0123456789")
_ENDS = _table(b".!?")
_CLOSING = _table(b"\"')]")
_WIDE_ENDS = ("。", "！", "？", "…", "”", "’", "।", "．", "»")


def _one(word: str) -> np.uint64:
    data = np.frombuffer(word.encode().ljust(16, b"\0"), np.uint8)
    return np.uint64(hash_spans(data, np.array([0]), np.array([len(word)]))[0])


_STOP_HASHES = [_one(word) for word in _STOPS]


def _is_ended(texts: Texts, end: Ints) -> NDArray[np.bool_]:
    """Whether what stands before `end` is the punctuation of a sentence's end, or a closing mark (quote or bracket) behind one."""
    last, before = texts.data[end - 1], texts.data[end - 2]
    ended: NDArray[np.bool_] = _ENDS[last] | _CLOSING[last] & _ENDS[before] | (last == ord('"'))
    if int(last.max(initial=0)) >= 128:
        for mark in _WIDE_ENDS:
            size = len(mark.encode())
            ended |= _has(texts.data, end - size, mark)
    return ended


def _has(data: NDArray[np.uint8], begin: Ints, text: str) -> NDArray[np.bool_]:
    """Whether `text` stands at each position."""
    found = np.ones(len(begin), bool)
    for i, byte in enumerate(text.encode()):
        found &= data[np.maximum(begin, 0) + i] == byte
    return found


def _total(texts: Texts, marked: NDArray[np.bool_]) -> Ints:
    """Document -> its marked bytes."""
    return np.add.reduceat(marked[: texts.begin[-1]], texts.begin[:-1], dtype=np.int64)


def _num_different(keys: NDArray[np.uint64], owner: Ints, count: int) -> Values:
    """Document -> how many different ones of its keys there are; no two documents share a key.

    A hash table for all keys at once: each writes its place into a slot and reads the slot back. Who reads a place that holds an equal key
    is done, and one of those counts; the others, whose slot another key won, go on with another hash. (Sorting takes twice as long.)
    """
    found = np.zeros(count, np.int64)
    bits = max(len(keys).bit_length() + 1, 4)
    table = np.empty(1 << bits, np.int64)
    factor = 0x9E3779B97F4A7C15
    while len(keys):
        slots = keys * np.uint64(factor) >> np.uint64(64 - bits)
        places = np.arange(len(keys))
        table[slots] = places
        winner = table[slots]
        found += np.bincount(owner[winner == places], minlength=count)
        others = keys[winner] != keys
        keys, owner = keys[others], owner[others]
        factor = factor * 0xD6E8FEB86659FD93 % (1 << 64) | 1
    return found.astype(float)
