"""Rules that look beyond the document: overlap with evaluation texts, and language."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from quintet.data import contamination, language
from quintet.data.prepare import prepare
from quintet.data.sources import list_files
from quintet.data.texts import Texts
from quintet.data.tokenizer import Tokenizer
from quintet.errors import DataError
from quintet.spec.quality import Dedup, Quality
from quintet.spec.run import Data
from tests.data.corpus import source, write_texts

QUESTION = "Which of the seven rivers that rise in the old hills reaches the sea first, and why?"
OTHER = "Nobody ever asked which of the seven rivers that rise in the hills is the longest of them all in summer."


def judged(quality: Quality, *texts: str) -> list[float]:
    (rule,) = contamination.rules_of(quality)
    return rule.measure(Texts([text.encode() for text in texts])).tolist()


def test_thirteen_words_in_a_row_of_an_evaluation_text_are_found_whatever_their_case_and_punctuation(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": QUESTION}) + "\n" + json.dumps({"text": "Short one."}) + "\n")
    quality = Quality(decontaminate=(str(tmp_path / "test.jsonl"),))
    found = judged(quality, f"Preface. {QUESTION.upper()} Appendix.", OTHER, "short ONE", "a short one")
    assert found[0] == len(QUESTION.split()) - 12 and found[1:] == [0, 1, 0]
    assert judged(replace(quality, decontaminate_ngram=8), OTHER)[0] > 0
    assert contamination.rules_of(Quality()) == () and contamination.digest(Quality()) == ""
    before = contamination.digest(quality)
    (tmp_path / "test.jsonl").write_text('{"text": "another"}\n')
    assert contamination.digest(quality) != before


def test_evaluation_texts_that_are_missing_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        contamination.digest(Quality(decontaminate=(str(tmp_path / "nothing"),)))


def test_prose_in_another_language_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    english = "The cat sat on the mat and looked at the people who were walking by the house."
    german = "Die Katze saß auf der Matte und sah den Leuten zu, die an dem Haus vorbeigingen."
    (rule,) = language.rules_of(Quality(languages=("en",)), "prose")
    values = rule.measure(Texts([english.encode(), german.encode()])).tolist()
    assert values[0] > rule.low == 0.65 and values[1] < 0.1
    assert language.rules_of(Quality(languages=("en",)), "code") == () and language.rules_of(Quality(), "prose") == ()
    with pytest.raises(DataError, match=r"names xx.*known are"):
        language.confidence(Texts([b"x"]), ("xx",))


def test_files_of_a_remote_store_are_listed_read_and_told_apart_without_reading_them_twice(tmp_path: Path, tokenizer: Tokenizer) -> None:
    store = fsspec.filesystem("memory")
    store.pipe({f"/crawl/{i:03}.jsonl": json.dumps({"text": f"text number {i}"}).encode() + b"\n" for i in range(8)})
    store.pipe("/crawl/picture.png", b"x")
    remote = source("memory://crawl")
    listing = list_files(remote)
    assert [file.path for file in listing.files][:2] == ["memory:///crawl/000.jsonl", "memory:///crawl/001.jsonl"]
    assert (len(listing.files), listing.num_not_text) == (8, 1)
    assert len(list_files(source("memory://crawl/00[12].jsonl")).files) == 2
    tokenizer.save(tmp_path / "t.json")
    data = Data(sources=(remote,), directory=str(tmp_path / "p"), tokenizer=str(tmp_path / "t.json"), dedup=Dedup())
    first = prepare(data, vocab_size=400, seed=0)
    assert first.sources["code"].statistics.read == 8
    assert prepare(data, vocab_size=400, seed=0).sources["code"].statistics.reused
    store.pipe("/crawl/003.jsonl", b'{"text": "new"}\n')
    assert not prepare(data, vocab_size=400, seed=0, on_other="replace").sources["code"].statistics.reused
    store.rm("/crawl", recursive=True)


@pytest.mark.parametrize("url, message", [("nosuch://x/y", "cannot be reached"), ("memory://nowhere", "holds no text")])
def test_a_store_that_cannot_be_reached_is_an_error_with_a_remedy(url: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list_files(source(url))


def test_one_bad_file_in_many_never_stops_the_run_and_never_vanishes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "t.json")
    folder = write_texts(tmp_path / "texts", [f"text {i}" for i in range(300)])
    (folder / "0123.py").write_bytes(b"\x00")
    data = Data(sources=(source(folder),), directory=str(tmp_path / "p"), tokenizer=str(tmp_path / "t.json"))
    statistics = prepare(data, vocab_size=400, seed=0).sources["code"].statistics
    assert statistics.skipped == {"nul_bytes": 1} and statistics.documents + statistics.held_out_documents == 299
    with pytest.raises(DataError, match=r"0123\.py: nul_bytes"):
        prepare(replace(data, strict=True), vocab_size=400, seed=0)


def test_a_bomb_is_refused_before_it_fills_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip

    from quintet.data import sources

    monkeypatch.setattr(sources, "_BOMB_BYTES", 1 << 20)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(bytes(20_000_000)))
    reader = sources.Reader(list_files(source(tmp_path)).files, text_key="text", max_document_bytes=1000, strict=False)
    assert list(reader) == [] and dict(reader.skips.counts) == {"bomb": 1}
