"""Prepare: what it makes, what it does not do twice, what it says when something is wrong."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from quintet.data import origin, part
from quintet.data import prepare as module
from quintet.data.prepare import Prepared, open_prepared, prepare
from quintet.data.tokenizer import Tokenizer
from quintet.errors import DataError
from quintet.spec.quality import Dedup, Quality
from quintet.spec.run import Data, Source
from tests.data.corpus import some_texts, source, write_texts


def recipe(tmp_path: Path, *, count: int = 30, held_out: float = 0.1, tokenizer: str | None = None) -> Data:
    folder = write_texts(tmp_path / "texts", some_texts(count))
    return Data(sources=(source(folder),), directory=str(tmp_path / "prepared"), held_out=held_out, tokenizer=tokenizer)


class Recorder:
    """Progress that remembers."""

    def __init__(self) -> None:
        self.started: dict[str, int] = {}
        self.documents: dict[str, int] = {}
        self.bytes: dict[str, int] = {}

    def start(self, name: str, num_bytes: int) -> None:
        self.started[name] = num_bytes

    def advance(self, name: str, num_documents: int, num_bytes: int) -> None:
        self.documents[name] = self.documents.get(name, 0) + num_documents
        self.bytes[name] = self.bytes.get(name, 0) + num_bytes


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_every_document_is_in_one_split_ends_in_eos_and_decodes_to_its_text(tmp_path: Path) -> None:
    prepared = prepare(recipe(tmp_path), vocab_size=400, seed=0)
    part, tokenizer = prepared.sources["code"], prepared.tokenizer
    texts = []
    for shard in (part.train, part.held_out):
        for i in range(shard.num_documents):
            ids = shard.document(i).tolist()
            assert ids[-1] == tokenizer.eos_id and tokenizer.eos_id not in ids[:-1]
            texts.append(tokenizer.decode(ids[:-1]))
    assert sorted(texts) == sorted(some_texts(30))
    assert part.held_out.num_documents > 0


def test_statistics_are_counted_from_the_documents(tmp_path: Path) -> None:
    data = recipe(tmp_path)
    (tmp_path / "texts/bad.py").write_bytes(b"\0")
    (tmp_path / "texts/picture.png").write_bytes(b"\0")
    progress = Recorder()
    part = prepare(data, vocab_size=400, seed=0, progress=progress).sources["code"]
    lengths = np.concatenate([part.train.lengths(), part.held_out.lengths()])
    ids = {token for split in (part.train, part.held_out) for i in range(split.num_documents) for token in split.document(i).tolist()}
    stats = part.statistics
    assert (stats.documents, stats.held_out_documents) == (part.train.num_documents, part.held_out.num_documents)
    assert stats.documents + stats.held_out_documents == 30
    assert stats.tokens + stats.held_out_tokens == lengths.sum()
    assert stats.num_bytes == sum(len(text.encode()) for text in some_texts(30)) == part.train.meta.num_bytes + part.held_out.meta.num_bytes
    assert stats.unique_tokens == len(ids)
    assert stats.length_percentiles[100] == lengths.max() and stats.length_percentiles[50] in lengths
    assert stats.skipped == {"not_text": 1, "nul_bytes": 1}
    assert stats.skipped_examples["nul_bytes"][0].startswith(str(tmp_path / "texts/bad.py"))
    assert stats.tokens_per_second > 0 and not stats.reused
    assert progress.documents["code"] == 30 and progress.started["code"] == stats.num_bytes + 1
    assert progress.documents["tokenizer"] == 30


def test_a_second_prepare_changes_nothing_and_a_changed_file_is_noticed(tmp_path: Path) -> None:
    tokenizer_file = tmp_path / "tokenizer.json"
    data = recipe(tmp_path)
    prepare(data, vocab_size=400, seed=0).tokenizer.save(tokenizer_file)
    before = snapshot(tmp_path / "prepared")
    again = prepare(data, vocab_size=400, seed=0)
    assert again.sources["code"].statistics.reused and snapshot(tmp_path / "prepared") == before
    fixed = replace(data, tokenizer=str(tokenizer_file))
    assert prepare(fixed, vocab_size=400, seed=0).sources["code"].statistics.reused
    (tmp_path / "texts/0000.py").write_text("something new")
    changed = prepare(fixed, vocab_size=400, seed=0, on_other="replace")
    assert not changed.sources["code"].statistics.reused and changed.fingerprint != again.fingerprint
    assert prepare(fixed, vocab_size=400, seed=0).fingerprint == changed.fingerprint


def test_only_the_source_that_changed_is_done_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "t.json")
    sources = tuple(source(write_texts(tmp_path / name, some_texts(9, seed=ord(name))), name=name) for name in "ab")
    data = Data(sources=sources, directory=str(tmp_path / "prepared"), tokenizer=str(tmp_path / "t.json"))
    prepare(data, vocab_size=400, seed=0)
    (tmp_path / "b/0000.py").write_text("something new")
    again = prepare(data, vocab_size=400, seed=0, on_other="replace")
    assert [part.statistics.reused for part in again.sources.values()] == [True, False]


def test_preparing_twice_from_nothing_gives_the_same_bytes(tmp_path: Path) -> None:
    first = prepare(recipe(tmp_path), vocab_size=400, seed=0)
    second = prepare(replace(recipe(tmp_path), directory=str(tmp_path / "other")), vocab_size=400, seed=5)
    assert first.fingerprint == second.fingerprint


def test_a_document_stays_in_its_split_when_others_come(tmp_path: Path) -> None:
    def held_out(count: int) -> set[str]:
        prepared = prepare(recipe(tmp_path, count=count), vocab_size=400, seed=0, on_other="replace")
        shard = prepared.sources["code"].held_out
        return {prepared.tokenizer.decode(shard.document(i)[:-1].tolist()) for i in range(shard.num_documents)}

    few, many = held_out(40), held_out(80)
    assert few <= many and 0 < len(few) < len(many) < 25


@pytest.mark.parametrize("count, held_out, expected", [(1, 0.01, 0), (2, 0.01, 1), (30, 1e-9, 1), (30, 0.0, 0)])
def test_one_document_is_held_out_where_possible(tmp_path: Path, count: int, held_out: float, expected: int) -> None:
    part = prepare(recipe(tmp_path, count=count, held_out=held_out), vocab_size=400, seed=0).sources["code"]
    assert (part.held_out.num_documents, part.train.num_documents) == (expected, count - expected)


def test_the_document_held_out_at_last_does_not_depend_on_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = recipe(tmp_path, held_out=1e-9)
    one = prepare(data, vocab_size=400, seed=0)
    monkeypatch.setattr(part, "_BATCH_DOCUMENTS", 7)
    other = prepare(replace(data, directory=str(tmp_path / "other")), vocab_size=400, seed=0)
    texts = [p.tokenizer.decode(p.sources["code"].held_out.document(0)[:-1].tolist()) for p in (one, other)]
    assert texts[0] == texts[1] and other.sources["code"].held_out.num_documents == 1


def test_large_corpora_train_the_tokenizer_on_a_seeded_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRAINING_BYTES", 2000)
    monkeypatch.setattr(part, "BATCH_BYTES", 500)
    progress = Recorder()
    first = prepare(recipe(tmp_path), vocab_size=400, seed=0, progress=progress)
    assert 0 < progress.documents["tokenizer"] < 30
    assert prepare(recipe(tmp_path), vocab_size=400, seed=0).tokenizer.fingerprint == first.tokenizer.fingerprint
    assert prepare(recipe(tmp_path), vocab_size=400, seed=1, on_other="replace").tokenizer.fingerprint != first.tokenizer.fingerprint


def test_data_of_a_relative_folder_that_is_not_there_says_from_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"here holds no prepared data \(working folder {tmp_path}; a run's data is looked for"):
        open_prepared(replace(recipe(tmp_path), directory="here"), 400)


def test_opening_what_is_not_prepared_says_what_to_run(tmp_path: Path) -> None:
    data = recipe(tmp_path)
    with pytest.raises(DataError, match=r"holds no prepared data; run: quintet prepare mine/recipe\.toml"):
        open_prepared(data, 400, recipe=Path("mine/recipe.toml"))
    prepared = prepare(data, vocab_size=400, seed=0)
    assert open_prepared(data, 400).fingerprint == prepared.fingerprint
    extra = replace(data, sources=(*data.sources, source(tmp_path / "texts", name="more")))
    with pytest.raises(DataError, match=r"'more' is not prepared in .*run: quintet prepare RECIPE"):
        open_prepared(extra, 400)
    with pytest.raises(DataError, match="prepared from other paths or settings"):
        open_prepared(replace(data, held_out=0.5), 400)


def test_a_tokenizer_that_does_not_match_the_shards_is_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = recipe(tmp_path)
    prepare(data, vocab_size=400, seed=0)
    tokenizer.save(tmp_path / "other.json")
    with pytest.raises(DataError, match=r"is not the one that .* was prepared with.*quintet prepare"):
        open_prepared(replace(data, tokenizer=str(tmp_path / "other.json")), 400)
    tokenizer.save(tmp_path / "prepared/tokenizer.json")
    with pytest.raises(DataError, match="was made by tokenizer"):
        open_prepared(data, 400)


def test_a_vocabulary_larger_than_the_models_is_an_error_with_a_remedy(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "t.json")
    data = recipe(tmp_path, tokenizer=str(tmp_path / "t.json"))
    message = rf"{tokenizer.vocab_size} tokens, more than model.vocab_size \(300\); set model.vocab_size to at least {tokenizer.vocab_size}"
    with pytest.raises(DataError, match=message):
        prepare(data, vocab_size=300, seed=0)
    prepare(data, vocab_size=400, seed=0)
    with pytest.raises(DataError, match=message):
        open_prepared(data, 300)


def test_shards_damaged_since_are_made_again(tmp_path: Path) -> None:
    data = recipe(tmp_path)
    good = prepare(data, vocab_size=400, seed=0).fingerprint
    (path,) = (tmp_path / "prepared/code.parts").glob("*/tokens.bin")
    content = bytearray(path.read_bytes())
    content[5] ^= 7
    path.write_bytes(content)
    again = prepare(data, vocab_size=400, seed=0)
    assert not again.sources["code"].statistics.reused and again.fingerprint == good and path.read_bytes() != content


def test_strict_names_the_first_bad_document_even_after_a_lenient_run(tmp_path: Path) -> None:
    data = recipe(tmp_path)
    (tmp_path / "texts/0005.py").write_bytes(b"\xff\xfe")
    assert prepare(data, vocab_size=400, seed=0).sources["code"].statistics.skipped == {"invalid_utf8": 1}
    with pytest.raises(DataError, match=r"0005\.py: invalid_utf8"):
        prepare(replace(data, strict=True), vocab_size=400, seed=0)


def test_a_source_of_which_nothing_is_left_names_the_reasons(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"broken\n{}\n{}\n")
    data = Data(sources=(source(tmp_path / "x.jsonl"),), directory=str(tmp_path / "prepared"))
    with pytest.raises(DataError, match=r"no document to train on .*skipped: 1 corrupt_json, 2 missing_text"):
        prepare(data, vocab_size=400, seed=0)
    assert not (tmp_path / "prepared/code").exists()


def test_a_full_disk_is_a_data_error_and_nothing_counts_as_done(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "t.json")
    data = recipe(tmp_path, count=200, tokenizer=str(tmp_path / "t.json"))
    size = (tmp_path / "t.json").stat().st_size + 100
    (tmp_path / "texts/big.py").write_text(" ".join(map(str, range(30_000))))
    script = textwrap.dedent(f"""
        import resource, sys
        from quintet.data.prepare import prepare
        from quintet.spec.run import Data, Source
        resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
        source = Source(name="code", paths=({str(tmp_path / "texts")!r},), domain="code", weight=1.0)
        try:
            prepare(Data(sources=(source,), directory={data.directory!r}, tokenizer={data.tokenizer!r}), vocab_size=400, seed=0)
        except Exception as error:
            print(type(error).__name__, error)
    """)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("DataError cannot write prepared data") and "raise the quota or limit" in result.stdout
    assert sorted(path.name for path in (tmp_path / "prepared").iterdir()) == [".lock", "code.parts", "tokenizer.json"]
    assert list((tmp_path / "prepared/code.parts").iterdir()) == []
    assert prepare(data, vocab_size=400, seed=0).sources["code"].statistics.documents > 0


def test_a_disk_error_while_committing_keeps_the_old_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "t.json")
    data = recipe(tmp_path, tokenizer=str(tmp_path / "t.json"))
    before = prepare(data, vocab_size=400, seed=0).fingerprint
    (tmp_path / "texts/0000.py").write_text("something new")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(DataError, match="No space left"):
        patch.setattr(os, "fsync", full)
        prepare(data, vocab_size=400, seed=0, on_other="replace")
    assert open_prepared(data, 400).fingerprint == before


def test_what_a_killed_prepare_left_is_cleared_and_two_at_once_are_refused(tmp_path: Path) -> None:
    data = recipe(tmp_path)
    for name in (".code.999.tmp/train", "code.parts/.0123.999.tmp"):
        left = tmp_path / "prepared" / name
        left.mkdir(parents=True)
        (left / "tokens.bin").write_bytes(b"half")
    (tmp_path / "prepared/.tokenizer.json.999.tmp").write_bytes(b"half")
    prepare(data, vocab_size=400, seed=0)
    names = {path.name for path in (tmp_path / "prepared").iterdir()}
    assert names == {".lock", ".complete", "code", "code.parts", "tokenizer.json", "trained.json"}
    assert not [path for path in (tmp_path / "prepared/code.parts").iterdir() if path.name.startswith(".")]
    with open(tmp_path / "prepared/.lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another quintet prepare works on"):
            prepare(data, vocab_size=400, seed=0)


def test_a_tokenizer_without_fim_tokens_gets_a_notice(tmp_path: Path, tokenizer: Tokenizer) -> None:
    spec = json.loads(tokenizer._text)
    for name in ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"):
        spec["model"]["vocab"][name.upper()] = spec["model"]["vocab"].pop(name)
    spec["added_tokens"] = [
        dict(token, content=token["content"].upper()) if "fim" in token["content"] else token for token in spec["added_tokens"]
    ]
    (tmp_path / "t.json").write_text(json.dumps(spec))
    messages: list[str] = []
    prepared = prepare(recipe(tmp_path, tokenizer=str(tmp_path / "t.json")), vocab_size=400, seed=0, on_message=messages.append)
    assert prepared.tokenizer.fim is None
    assert len(messages) == 1 and "no fill-in-the-middle tokens" in messages[0]


def test_prepare_imports_no_torch() -> None:
    script = "import quintet.data.prepare, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "False\n"


def made_twice(tmp_path: Path, tokenizer: Tokenizer | None = None) -> tuple[Data, Prepared]:
    """A recipe whose data was prepared before its text changed."""
    if tokenizer:
        tokenizer.save(tmp_path / "t.json")
    data = recipe(tmp_path, tokenizer=str(tmp_path / "t.json") if tokenizer else None)
    before = prepare(data, vocab_size=400, seed=0)
    (tmp_path / "texts/0000.py").write_text("something new")
    return data, before


@pytest.mark.parametrize("trained", [True, False])
def test_shards_of_other_text_are_never_replaced_unasked(tmp_path: Path, tokenizer: Tokenizer, trained: bool) -> None:
    data, before = made_twice(tmp_path, None if trained else tokenizer)
    kept = snapshot(tmp_path / "prepared")
    message = r"prepared holds code made from other text .* set data.directory to another folder, or .*: quintet prepare r\.toml --replace"
    with pytest.raises(DataError, match=message):
        prepare(data, vocab_size=400, seed=0, recipe="r.toml")
    assert snapshot(tmp_path / "prepared") == kept
    assert prepare(data, vocab_size=400, seed=0, on_other="replace").fingerprint != before.fingerprint
    assert prepare(data, vocab_size=400, seed=0).sources["code"].statistics.reused


@pytest.mark.parametrize("trained", [True, False])
def test_other_data_can_be_prepared_beside_and_is_found_there_again(tmp_path: Path, tokenizer: Tokenizer, trained: bool) -> None:
    data, before = made_twice(tmp_path, None if trained else tokenizer)
    kept = snapshot(tmp_path / "prepared")
    told: list[str] = []
    beside = prepare(data, vocab_size=400, seed=0, on_other="beside", on_message=told.append)
    assert snapshot(tmp_path / "prepared") == kept
    assert beside.directory.parent == tmp_path and beside.directory.name.startswith("prepared-")
    assert len(told) == 1 and f"this run's data is in {beside.directory}" in told[0]
    again = prepare(data, vocab_size=400, seed=0, on_other="beside")
    assert (again.directory, again.fingerprint) == (beside.directory, beside.fingerprint)
    assert again.sources["code"].statistics.reused
    assert open_prepared(replace(data, directory=str(beside.directory)), 400).fingerprint == beside.fingerprint
    (tmp_path / "texts/0000.py").write_text(some_texts(1)[0])  # the text of before
    assert prepare(data, vocab_size=400, seed=0, on_other="beside").fingerprint == before.fingerprint


def test_the_same_text_in_newer_files_is_no_other_data(tmp_path: Path) -> None:
    data = recipe(tmp_path)
    before = prepare(data, vocab_size=400, seed=0)
    for path in (tmp_path / "texts").iterdir():
        path.touch()
    shards = snapshot(tmp_path / "prepared/code/train")
    again = prepare(data, vocab_size=400, seed=0)
    assert again.sources["code"].statistics.reused and again.fingerprint == before.fingerprint
    assert snapshot(tmp_path / "prepared/code/train") == shards
    with pytest.MonkeyPatch.context() as patch:  # and the next look need not read
        patch.setattr(origin, "digest_of", lambda *arguments: pytest.fail("the text was read again"))
        prepare(data, vocab_size=400, seed=0)


def test_one_more_source_keeps_the_others_where_the_tokenizer_is_given_and_not_where_it_is_trained(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    tokenizer.save(tmp_path / "t.json")
    more = source(write_texts(tmp_path / "more", some_texts(9, seed=5)), name="more")
    given = recipe(tmp_path, tokenizer=str(tmp_path / "t.json"))
    prepare(given, vocab_size=400, seed=0)
    both = prepare(replace(given, sources=(*given.sources, more)), vocab_size=400, seed=0)
    assert [part.statistics.reused for part in both.sources.values()] == [True, False]
    trained = replace(recipe(tmp_path), directory=str(tmp_path / "trained"))
    prepare(trained, vocab_size=400, seed=0)
    with pytest.raises(DataError, match="holds code made from other text or settings or by another tokenizer"):
        prepare(replace(trained, sources=(*trained.sources, more)), vocab_size=400, seed=0)


def test_replacing_the_tokenizer_takes_away_what_another_recipe_made_with_the_old_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = recipe(tmp_path)
    more = source(write_texts(tmp_path / "more", some_texts(9, seed=5)), name="more")
    prepare(replace(data, sources=(*data.sources, more)), vocab_size=400, seed=0)
    with pytest.raises(DataError, match="holds code, more made from"):
        prepare(data, vocab_size=400, seed=0)
    prepare(data, vocab_size=400, seed=0, on_other="replace")
    assert not (tmp_path / "prepared/more").exists()
    assert prepare(data, vocab_size=400, seed=0).sources["code"].statistics.reused


def test_a_lost_tokenizer_is_trained_again_to_the_same_and_the_shards_stay(tmp_path: Path) -> None:
    data = recipe(tmp_path)
    before = prepare(data, vocab_size=400, seed=0)
    (tmp_path / "prepared/tokenizer.json").write_text("{}")
    again = prepare(data, vocab_size=400, seed=0)
    assert again.fingerprint == before.fingerprint and again.sources["code"].statistics.reused


def test_reading_for_fingerprints_is_shown_where_there_is_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SHOWN_BYTES", 1000)
    data = recipe(tmp_path)
    first, second = Recorder(), Recorder()
    prepare(data, vocab_size=400, seed=0, progress=first)
    assert first.bytes["fingerprint of code"] == first.started["fingerprint of code"] == first.started["code"]
    prepare(data, vocab_size=400, seed=0, progress=second)
    assert second.bytes["check of code"] == second.started["check of code"] > 1000


def test_what_was_never_prepared_to_its_end_is_no_ones_and_may_be_replaced(tmp_path: Path) -> None:
    data = recipe(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"txt": "under another key"}\n' * 9)
    broken = replace(data, sources=(*data.sources, source(tmp_path / "x.jsonl", name="more")))
    with pytest.raises(DataError, match="no document to train on"):
        prepare(broken, vocab_size=400, seed=0)
    assert (tmp_path / "prepared/code").exists()
    mended = replace(broken, sources=(*data.sources, source(tmp_path / "x.jsonl", name="more", text_key="txt")))
    assert not prepare(mended, vocab_size=400, seed=0).sources["code"].statistics.reused
    with pytest.raises(DataError, match="on which runs may depend"):
        prepare(data, vocab_size=400, seed=0)


def test_a_recipe_that_names_the_tokenizer_trained_here_takes_nothing_from_the_one_that_trained_it(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.py").write_text(f"def f{i}():\n    return {i} * {i}\n" * 5)
    sources = (Source(name="code", paths=(str(folder),), domain="code", weight=1.0),)
    own = Data(sources=sources, directory=str(tmp_path / "prepared"))
    first = prepare(own, vocab_size=300, seed=0)
    named = Data(sources=sources, directory=own.directory, tokenizer=str(tmp_path / "prepared" / "tokenizer.json"))
    for data in (named, own):
        assert prepare(data, vocab_size=300, seed=0).fingerprint == first.fingerprint


def test_a_prepared_source_says_what_it_was_made_by(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "t.json")
    quality = Quality(code=("basic",), without=("basic.code_lines", "basic.tokens"), scrub=True)
    data = replace(recipe(tmp_path, tokenizer=str(tmp_path / "t.json")), quality=quality, dedup=Dedup())
    prepare(data, vocab_size=400, seed=0)
    told = json.loads((tmp_path / "prepared/code/source.json").read_text())["provenance"]
    assert told["paths"] == [str(tmp_path / "texts")] and told["domain"] == "code" and told["edits"] == ["scrubbed"]
    assert told["rules"]["basic.mean_line"] == [10.0, 200.0] and all(name.startswith("basic.") for name in told["rules"])
    assert told["dedup"]["bands"] == 14 and told["versions"].keys() >= {"rules", "clean", "minhash", "format"}
