"""Duplicates: fingerprints that find them as the theory says, clusters that keep one, across sources and against what is there."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quintet.data import dedup as module
from quintet.data import minhash, origin
from quintet.data.dedup import Decision, Fingerprints, decide, join
from quintet.data.prepare import Prepared, prepare
from quintet.data.texts import Texts
from quintet.data.tokenizer import Tokenizer
from quintet.errors import DataError, SpecError
from quintet.spec.quality import Dedup
from quintet.spec.run import Data
from tests.data.corpus import source, write_texts

DEDUP = Dedup()


def words(rng: random.Random, count: int) -> list[str]:
    return [f"w{rng.randrange(10**6)}" for _ in range(count)]


def pair_with_similarity(rng: random.Random, size: int, similarity: float) -> tuple[str, str, float]:
    """Two texts of about `size` words that share a beginning, and the Jaccard similarity of their 5-grams."""
    shared = round(2 * size * similarity / (1 + similarity))
    base = words(rng, shared)
    texts = [[*base, *words(rng, size - shared)] for _ in range(2)]
    grams = [{tuple(text[i : i + 5]) for i in range(len(text) - 4)} for text in texts]
    return " ".join(texts[0]), " ".join(texts[1]), len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def bands(*texts: str) -> np.ndarray:
    return minhash.bands(Texts([text.encode() for text in texts]), ngram=5, bands=14, rows=8)


@pytest.mark.parametrize("similarity", [0.3, 0.6, 0.7, 0.8, 0.9, 0.97])
def test_near_duplicates_are_found_as_often_as_the_lsh_curve_says(similarity: float) -> None:
    rng = random.Random(round(similarity * 100))
    pairs = [pair_with_similarity(rng, 200, similarity) for _ in range(200)]
    keys = bands(*(text for a, b, _ in pairs for text in (a, b)))
    found = (keys[::2] == keys[1::2]).any(axis=1)
    expected = np.array([1 - (1 - s**8) ** 14 for *_, s in pairs])
    # Four standard errors of 200 draws, and what bins that borrow from each other add.
    assert abs(found.mean() - expected.mean()) <= 4 * np.sqrt((expected * (1 - expected)).mean() / 200) + 0.015


@pytest.mark.parametrize("size", [12, 40, 150])
def test_bins_agree_as_often_as_documents_are_similar_even_where_most_are_empty(size: int) -> None:
    rng = random.Random(size)
    agree, similar = [], []
    for _ in range(300):
        a, b, similarity = pair_with_similarity(rng, size, 0.8)
        hashes, owner = minhash.shingles(Texts([a.encode(), b.encode()]), 5)
        bins = minhash.signatures(hashes, owner, 2, num_bins=112)
        agree.append(float((bins[0] == bins[1]).mean()))
        similar.append(similarity)
    assert abs(np.mean(agree) - np.mean(similar)) < 0.03


PIECES = ["Foo,", "foo", "bar(x)", "日本語", "é", "x_y", "42"]


@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=9).map(" ".join), min_size=1, max_size=5))
@settings(max_examples=80, deadline=None)
def test_shingles_are_the_word_ngrams_of_each_document_and_depend_on_no_other(texts: list[str]) -> None:
    batch = Texts([text.encode() for text in texts])
    hashes, owner = minhash.shingles(batch, 3)
    for i, text in enumerate(texts):
        alone, _ = minhash.shingles(Texts([text.encode()]), 3)
        assert sorted(hashes[owner == i].tolist()) == sorted(alone.tolist())
        folded = text.lower().replace(",", " ").replace("(", " ").replace(")", " ").replace("日本語", " 日 本 語 ").split()
        assert len(alone) == (max(len(folded) - 2, 1) if folded else 0)


def test_case_punctuation_and_spaces_do_not_tell_documents_apart_and_words_do() -> None:
    keys = bands("One, two; THREE four five six", "one two\n three   four, five (six)", "one two three four five seven")
    assert (keys[0] == keys[1]).all() and not (keys[0] == keys[2]).any()


def test_documents_without_a_word_match_none() -> None:
    keys = bands("...", "!!!", "words are here and there now")
    hashes, owner = minhash.shingles(Texts([b"...", b"!!!"]), 5)
    assert len(hashes) == len(owner) == 0 and not (keys[0] == keys[2]).any()


def test_exact_fingerprints_see_past_white_space_alone() -> None:
    found = minhash.exact([b"def f():\n    x", b"def f():\r\n\tx\n", b"def g():\n    x", "def f():\u00a0x".encode()])
    assert (found[0] == found[1]).all() and len({tuple(row) for row in found.tolist()}) == 3
    assert minhash.exact([]).shape == (0, 2)


def graphs(size: int) -> st.SearchStrategy[tuple[int, list[tuple[int, int]]]]:
    node = st.integers(0, size - 1)
    return st.tuples(st.just(size), st.lists(st.tuples(node, node), max_size=50))


@given(st.integers(1, 40).flatmap(graphs))
def test_components_are_those_of_a_slow_search(case: tuple[int, list[tuple[int, int]]]) -> None:
    size, edges = case
    labels = list(range(size))
    for _ in range(size):
        for a, b in edges:
            labels[a] = labels[b] = min(labels[a], labels[b])
    parent = np.arange(size)
    for a, b in edges:
        join(parent, iter([(np.array([a]), np.array([b]))]))
    assert parent.tolist() == labels
    together = np.arange(size)
    join(together, iter([tuple(np.array(edges, int).reshape(-1, 2).T)]))  # type: ignore[list-item]
    assert together.tolist() == labels


def part(folder: Path, texts: Sequence[str]) -> Fingerprints:
    """A part's fingerprints on disk."""
    folder.mkdir(parents=True)
    raws = [text.encode() for text in texts]
    np.save(folder / "sizes.npy", np.array([len(raw) for raw in raws], np.uint32))
    np.save(folder / "exact.npy", minhash.exact(raws))
    np.save(folder / "bands.npy", minhash.bands(Texts(raws), ngram=5, bands=14, rows=8).T)
    lines = "".join(f"{folder.name}:{i}\n" for i in range(len(raws)))
    import zstandard

    (folder / "origins.zst").write_bytes(zstandard.compress(lines.encode()))
    return Fingerprints(folder)


ONE = " ".join(words(random.Random(1), 300))
LIKE_ONE = ONE + " and a longer end"
OTHER = " ".join(words(random.Random(2), 300))


def kept(decision: Decision) -> list[list[bool]]:
    return [mask.tolist() for mask in decision.kept]


@pytest.mark.parametrize(
    "prefer, expected",
    [("source", [[True, False], [False, True]]), ("longest", [[False, False], [True, True]]), ("first", [[True, False], [False, True]])],
)
def test_one_of_each_cluster_is_kept_by_the_stated_preference(tmp_path: Path, prefer: str, expected: list[list[bool]]) -> None:
    parts = [("a", part(tmp_path / "a", [ONE, ONE + "\n"])), ("b", part(tmp_path / "b", [LIKE_ONE, OTHER]))]
    decision = decide(replace(DEDUP, prefer=prefer), parts)  # type: ignore[arg-type]
    if prefer == "source":
        expected = [[False, True], [False, True]]  # of the first source the longest, which has one line feed more
    assert kept(decision) == expected
    assert decision.duplicates["a"].exact + decision.duplicates["b"].exact == 1
    assert decision.duplicates["a"].near + decision.duplicates["b"].near == 1
    dropped = {pair.dropped: pair.kept for name in "ab" for pair in decision.duplicates[name].pairs}
    assert set(dropped.values()) <= {"a:0", "a:1", "b:0"} and len(dropped) == 2


def test_exact_alone_and_near_alone(tmp_path: Path) -> None:
    parts = [("a", part(tmp_path / "a", [ONE, ONE, LIKE_ONE, OTHER]))]
    assert kept(decide(replace(DEDUP, near=False), parts)) == [[True, False, True, True]]
    assert kept(decide(replace(DEDUP, exact=False), parts)) == [[False, False, True, True]]
    with pytest.raises(SpecError, match="both off"):
        Dedup(exact=False, near=False)


def test_what_is_known_already_is_not_kept_again(tmp_path: Path) -> None:
    known = part(tmp_path / "known", [ONE, "something that nobody looks for at all"])
    new = [("a", part(tmp_path / "a", [LIKE_ONE, OTHER]))]
    assert kept(decide(DEDUP, new, [known])) == [[False, True]]
    assert kept(decide(DEDUP, new, [Fingerprints(tmp_path / "known", chosen=np.array([1]))])) == [[True, True]]


def test_the_decision_does_not_depend_on_how_keys_are_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(3)
    texts = [text for _ in range(40) for text in pair_with_similarity(rng, 60, 0.9)[:2]]
    parts = [("a", part(tmp_path / "a", texts[:50])), ("b", part(tmp_path / "b", texts[50:]))]
    one = kept(decide(DEDUP, parts))
    monkeypatch.setattr(module, "GROUPED", 7)
    (scratch := tmp_path / "scratch").mkdir()
    assert kept(decide(DEDUP, parts, scratch=scratch)) == one and 30 < sum(map(sum, one)) < 80
    assert not list(scratch.iterdir()), "the files of keys are gone"
    monkeypatch.setattr(module, "_MOST_FILES", 3)
    assert kept(decide(DEDUP, parts)) == one


def test_a_disk_without_room_for_the_keys_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [("a", part(tmp_path / "a", [ONE, LIKE_ONE, OTHER]))]
    monkeypatch.setattr(module, "GROUPED", 1)
    with pytest.raises(DataError, match="cannot write prepared data under"):
        decide(DEDUP, parts, scratch=tmp_path / "nowhere")


def recipe(tmp_path: Path, texts: dict[str, list[str]], **more: object) -> Data:
    sources = tuple(source(write_texts(tmp_path / name, found), name=name) for name, found in texts.items())
    return Data(sources=sources, directory=str(tmp_path / "prepared"), tokenizer=str(tmp_path / "t.json"), dedup=DEDUP, **more)  # type: ignore[arg-type]


def documents(prepared: Prepared, name: str) -> set[str]:
    splits = (prepared.sources[name].train, prepared.sources[name].held_out)
    return {prepared.tokenizer.decode(s.document(i)[:-1].tolist()) for s in splits for i in range(s.num_documents)}


def test_prepared_data_holds_one_of_each_cluster_over_all_sources_and_splits(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "t.json")
    prepared = prepare(recipe(tmp_path, {"a": [ONE, OTHER], "b": [LIKE_ONE, "short"]}, held_out=0.3), vocab_size=400, seed=0)
    assert documents(prepared, "a") == {ONE, OTHER} and documents(prepared, "b") == {"short"}
    statistics = prepared.sources["b"].statistics
    assert (statistics.exact_duplicates, statistics.near_duplicates, statistics.read) == (0, 1, 2)
    assert statistics.duplicate_pairs[0].kept.endswith("a/0000.py")


def test_a_new_source_redoes_no_part_and_a_later_directory_keeps_what_is_new(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "t.json")
    first = recipe(tmp_path, {"a": [ONE, "one more"]}, held_out=0.0)
    prepare(first, vocab_size=400, seed=0)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "prepared/a.parts").glob("*/tokens.bin")}
    both = recipe(tmp_path, {"b": [LIKE_ONE, OTHER], "a": [ONE, "one more"]}, held_out=0.0)
    prepared = prepare(both, vocab_size=400, seed=0, on_other="replace")
    assert documents(prepared, "b") == {LIKE_ONE, OTHER} and documents(prepared, "a") == {"one more"}
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "prepared/a.parts").glob("*/tokens.bin")}
    later = replace(
        recipe(tmp_path, {"c": [ONE, "new words"]}, held_out=0.0),
        directory=str(tmp_path / "later"),
        dedup=replace(DEDUP, against=(both.directory,)),
    )
    assert documents(prepare(later, vocab_size=400, seed=0), "c") == {"new words"}
    with pytest.raises(DataError, match="no fingerprints of this recipe's kind"):
        other = replace(DEDUP, ngram=3, against=(both.directory,))
        prepare(replace(later, directory=str(tmp_path / "x"), dedup=other), vocab_size=400, seed=0)
    with pytest.raises(DataError, match="holds no prepared data"):
        prepare(replace(later, directory=str(tmp_path / "x"), dedup=replace(DEDUP, against=("nowhere",))), vocab_size=400, seed=0)


def test_a_changed_file_redoes_its_own_part_alone(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origin, "PART_BYTES", 3000)
    tokenizer.save(tmp_path / "t.json")
    rng = random.Random(5)
    texts = {"a": [" ".join(words(rng, 100)) for _ in range(30)]}
    data = recipe(tmp_path, texts)
    prepare(data, vocab_size=400, seed=0)
    before = {path.name for path in (tmp_path / "prepared/a.parts").iterdir()}
    (tmp_path / "a/0013.py").write_text(" ".join(words(rng, 101)))
    changed = prepare(data, vocab_size=400, seed=0, on_other="replace")
    after = {path.name for path in (tmp_path / "prepared/a.parts").iterdir()}
    assert len(before) > 4 and 1 <= len(after - before) <= 2 and len(after & before) >= len(before) - 2
    fresh = prepare(replace(data, directory=str(tmp_path / "fresh")), vocab_size=400, seed=0)
    assert fresh.fingerprint == changed.fingerprint
