"""Quality rules: every vectorised measure against a slow reading of its definition, and limits that decide."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quintet.data import repetition, rules
from quintet.data.texts import Texts, Values
from quintet.errors import SpecError
from quintet.spec.quality import C4, RULE_SETS, Basic, Gopher, Quality

WORDS = ["the", "of", "a", "naïve", "日本", "x" * 9, "x" * 70, "y" * 70, *"end. why? … ... # - • { 42 be // *".split()]
documents = st.lists(
    st.lists(st.sampled_from([*WORDS, "\n", "\n\n", " ", "\t", "  \n"]), max_size=40).map(" ".join), min_size=1, max_size=6
).map(lambda texts: [text if text.strip() else "word" for text in texts])


def measured(measure: Callable[[Texts], Values], *texts: str) -> list[float]:
    return measure(Texts([text.encode() for text in texts])).tolist()


def lines_of(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


def paragraphs_of(text: str) -> list[str]:
    found: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip():
            found[-1].append(line)
        else:
            found.append([])
    return ["\n".join(lines).strip() for lines in found if lines]


def came_before(items: Sequence[str]) -> list[bool]:
    """Whether each one's words stood in an earlier one."""
    keys = [tuple(item.split()) for item in items]
    return [key in keys[:i] for i, key in enumerate(keys)]


def share(part: float, whole: float) -> float:
    return part / max(whole, 1)


def ends(text: str) -> bool:
    return text.endswith((".", "!", "?", '"', "…"))


def slow_top(text: str, n: int) -> float:
    words = text.split()
    counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    best = max(((count, count * sum(map(len, gram))) for gram, count in counts.items() if count > 1), default=(0, 0))
    return share(best[1], sum(map(len, words)))


def slow_duplicate(text: str, n: int) -> float:
    words, seen, covered = text.split(), set(), set()
    for i in range(len(words) - n + 1):
        gram = tuple(words[i : i + n])
        if gram in seen:
            covered |= set(range(i, i + n))
        seen.add(gram)
    return share(sum(len(words[i]) for i in covered), sum(map(len, words)))


SLOW: dict[Callable[[Texts], Values], Callable[[str], float]] = {
    rules.num_words: lambda t: len(t.split()),
    rules.mean_word: lambda t: share(sum(map(len, t.split())), len(t.split())),
    rules.unique_words: lambda t: share(len(set(t.split())), len(t.split())),
    rules.hashes_per_word: lambda t: share(t.count("#"), len(t.split())),
    rules.ellipses_per_word: lambda t: share(t.count("...") + t.count("…"), len(t.split())),
    rules.alphabetic_words: lambda t: share(sum(any(c.isalpha() or ord(c) > 127 for c in w) for w in t.split()), len(t.split())),
    rules.stop_words: lambda t: len({"the", "be", "to", "of", "and", "that", "have", "with"} & set(t.split())),
    rules.num_lines: lambda t: len(lines_of(t)),
    rules.mean_line: lambda t: share(sum(map(len, lines_of(t))), len(lines_of(t))),
    rules.longest_line: lambda t: max(map(len, lines_of(t))),
    rules.bullet_lines: lambda t: share(sum(line.startswith(("-", "•")) for line in lines_of(t)), len(lines_of(t))),
    rules.ellipsis_lines: lambda t: share(sum(line.endswith(("...", "…")) for line in lines_of(t)), len(lines_of(t))),
    rules.ended_lines: lambda t: share(sum(map(ends, lines_of(t))), len(lines_of(t))),
    rules.num_sentences: lambda t: sum(map(ends, t.split())),
    rules.newlines_per_word: lambda t: share(t.count("\n"), len(t.split())),
    rules.duplicate_lines: lambda t: share(sum(came_before(lines_of(t))), len(lines_of(t))),
    rules.duplicate_line_chars: lambda t: share(
        sum(len(line) for line, before in zip(lines_of(t), came_before(lines_of(t)), strict=True) if before), sum(map(len, lines_of(t)))
    ),
    rules.duplicate_paragraphs: lambda t: share(sum(came_before(paragraphs_of(t))), len(paragraphs_of(t))),
    rules.curly_brackets: lambda t: t.count("{"),
}


@given(documents)
@settings(max_examples=150, deadline=None)
def test_every_measure_is_what_its_definition_says_for_all_documents_of_a_batch(texts: list[str]) -> None:
    batch = Texts([text.encode() for text in texts])
    for measure, slow in SLOW.items():
        assert measure(batch).tolist() == pytest.approx([slow(text) for text in texts]), measure.__name__


@given(st.lists(st.lists(st.sampled_from("a bb ccc".split()), min_size=1, max_size=60).map(" ".join), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_repeated_ngrams_are_what_the_slow_search_finds(texts: list[str]) -> None:
    batch = Texts([text.encode() for text in texts])
    for n in repetition.DUPLICATE:
        assert repetition.duplicate_ngram_share(batch, n).tolist() == pytest.approx([slow_duplicate(text, n) for text in texts])
    for n in repetition.TOP:
        assert repetition.top_ngram_share(batch, n).tolist() == pytest.approx([slow_top(text, n) for text in texts])


@given(st.lists(st.lists(st.integers(0, 3), max_size=40), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_token_measures_are_what_the_slow_search_finds(documents: list[list[int]]) -> None:
    ids = np.array([token for document in documents for token in document], np.uint32)
    lengths = np.array([len(document) for document in documents])
    assert rules.num_tokens(ids, lengths).tolist() == lengths.tolist()
    assert rules.unique_tokens(ids, lengths).tolist() == [len(set(document)) for document in documents]
    grams = [[tuple(document[i : i + 8]) for i in range(len(document) - 7)] for document in documents]
    assert rules.token_repetition(ids, lengths).tolist() == pytest.approx([share(len(g) - len(set(g)), len(g)) for g in grams])


def test_a_measure_does_not_depend_on_the_documents_beside_it() -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=30)).encode() for _ in range(20)]
    for rule in rules.rules_of(Quality(), "prose"):
        together, alone = rule.measure(Texts(texts)), [float(rule.measure(Texts([text]))[0]) for text in texts]
        assert together.tolist() == pytest.approx(alone), rule.name


@pytest.mark.parametrize(
    "line, expected",
    [("# note", 1), ("#!/bin/sh", 1), ("#include <x>", 0), ("// note", 1), ("/* note", 1), (" * note", 1), ("*p = 3", 0), ("-- note", 1),
     ("-x", 0), ("% note", 1), ("%d", 0), (";; note", 1), ("x = 1  # note", 0)],
)  # fmt: skip
def test_comments_are_told_by_how_a_line_begins(line: str, expected: int) -> None:
    assert measured(rules.comment_share, line) == [expected]


def test_marks_of_generated_files_are_found_in_the_head_alone() -> None:
    texts = ["// AUTO-GENERATED, do not edit\nx", "# this file was generated", "x\n" * 600 + "# auto-generated", "generate it"]
    assert measured(rules.generated_marks, *texts) == [2, 1, 0, 0]


def test_shares_of_bytes_are_of_the_document_alone() -> None:
    assert measured(rules.whitespace, "ab\n", "abc d\n\n") == pytest.approx([1 / 3, 3 / 7])
    assert measured(rules.alphanumeric, "a+1\n", "+++\n") == pytest.approx([0.5, 0])
    assert measured(rules.lorem_ipsum, "Lorem IPSUM dolor", "ipsum lorem") == [1, 0]


def published(domain: str) -> dict[str, tuple[float, float]]:
    return {rule.name: (rule.low, rule.high) for rule in rules.rules_of(Quality(), domain)}  # type: ignore[arg-type]


def test_the_defaults_are_the_published_ones() -> None:
    prose, code = published("prose"), published("code")
    assert prose["gopher.words"] == (50, 100_000) and prose["gopher.mean_word"] == (3, 10) and prose["gopher.stop_words"][0] == 2
    assert [prose[f"gopher.duplicate_{n}grams"][1] for n in range(5, 11)] == [0.15, 0.14, 0.13, 0.12, 0.11, 0.10]
    assert [prose[f"gopher.top_{n}gram"][1] for n in range(2, 5)] == [0.20, 0.18, 0.16]
    assert prose["fineweb.ended_lines"][0] == 0.12 and prose["fineweb.duplicate_line_chars"][1] == 0.01
    assert prose["fineweb.short_lines"][1] == 0.67 and prose["fineweb.newlines"][1] == 0.3
    assert prose["c4.sentences"][0] == 5 and prose["basic.unique_words"][0] == 0.3 and prose["basic.mean_word"] == (3, 15)
    assert code["basic.code_lines"][0] == 5 and code["basic.comments"][1] == 0.7 and code["basic.mean_line"] == (10, 200)
    assert code["code.longest_line"][1] == 1000 and code["code.mean_line"][1] == 100 and code["code.alphanumeric"][0] == 0.25
    tokens = {rule.name: (rule.low, rule.high) for rule in rules.token_rules_of(Quality(), "code")}
    assert tokens["basic.tokens"] == (50, 100_000) and tokens["basic.unique_tokens"] == (10, math.inf)


def test_sets_and_single_rules_can_be_left_out_and_thresholds_changed() -> None:
    quality = Quality(prose=("gopher", "c4"), without=("c4.curly_brackets",), gopher=Gopher(min_words=7))
    found = {rule.name: rule for rule in rules.rules_of(quality, "prose")}
    assert {name.partition(".")[0] for name in found} == {"gopher", "c4"} and "c4.curly_brackets" not in found
    assert found["gopher.words"].low == 7
    assert rules.token_rules_of(quality, "prose") == () and len(rules.token_rules_of(replace(quality, prose=("basic",)), "prose")) == 3


def test_every_rule_says_what_it_measures_in_one_line() -> None:
    for domain in ("code", "prose"):
        for rule in rules.rules_of(Quality(code=RULE_SETS, prose=RULE_SETS), domain):  # type: ignore[arg-type]
            assert 3 < len(rule.meaning) < 100 and "\n" not in rule.meaning


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Basic(min_tokens=9, max_tokens=3), r"min_tokens \(9\) must be at most max_tokens \(3\)"),
        (lambda: Basic(min_words=-1), r"min_words \(-1\) must not be negative"),
        (lambda: Quality(without=("gophr.words",)), "did you mean 'gopher'"),
        (lambda: Quality(code=("c4",), c4=C4(clean_lines=True)), "takes lines out of prose"),
        (lambda: Gopher(max_top_ngram=(0.1,)), "must have 3 shares"),
    ],
)
def test_limits_that_make_no_sense_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()
