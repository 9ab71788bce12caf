"""A long text is cut only where the tokens of its pieces are surely the tokens of the whole."""
# ruff: noqa: RUF001 -- characters that look like others are the point

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quintet.data import cut
from quintet.data import part as module
from quintet.data import tokenizer as tokenizer_module
from quintet.data.prepare import prepare
from quintet.data.tokenizer import Ids, Tokenizer, train_bpe
from quintet.errors import DataError
from quintet.spec.run import Data
from tests.data.corpus import some_texts, source, write_texts

Spec = dict[str, Any]
# What meets at a boundary, and what patterns and normalizers treat specially.
ASCII = [*"aZ1'_ .(\n\t\r-\x01", "'s", "'LL", "  ", "\r\n"]
ATOMS = [*ASCII, "é", "e\u0301", "\u0301", "一", "ひ", "١", "\u00a0", "\u2028", "ſ", "🙂", "İ", "ﬁ"]
texts = st.lists(st.one_of(st.sampled_from(ATOMS), st.text(max_size=3), st.sampled_from(some_texts(4))), max_size=30).map("".join)


def with_pre_tokenizer(tokenizer: Tokenizer, *patterns: str, normalizer: str | None = None, gpt2: bool = False) -> Spec:
    """The tokenizer.json with other words."""
    spec: Spec = json.loads(tokenizer._text)
    splits = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} for pattern in patterns]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": gpt2}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*splits, level]}
    spec["normalizer"] = normalizer and {"type": normalizer}
    return spec


SPECS = {
    "V3": lambda t: with_pre_tokenizer(t, *cut.V3_SPLITS),
    "Llama 3": lambda t: with_pre_tokenizer(t, cut._WORDS[1]),
    "Qwen": lambda t: with_pre_tokenizer(t, cut._WORDS[2], normalizer="NFC"),
    "GPT-2": lambda t: with_pre_tokenizer(t, gpt2=True),
    "GPT-2 in full": lambda t: with_pre_tokenizer(t, cut._WORDS[3], normalizer="NFKD"),
}


@pytest.fixture(scope="module", params=SPECS)
def known(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer(json.dumps(SPECS[request.param](tokenizer)), origin=request.param)


@given(text=texts, size=st.integers(1, 12))
@settings(max_examples=200)
def test_the_pieces_are_the_text_and_their_tokens_the_texts_tokens(known: Tokenizer, text: str, size: int) -> None:
    pieces = known.pieces(text, size)
    assert "".join(pieces) == text
    for encode in (known.encode_batch, lambda texts: tokenizer_module._encode_reference(known._reference, texts)):
        whole = encode([text])[0]
        assert np.array_equal(np.concatenate(encode(pieces)), whole)
        if known._fast is None:
            break


def test_ordinary_text_comes_in_bounded_pieces(known: Tokenizer) -> None:
    text = " ".join(some_texts(200))
    assert max(map(len, known.pieces(text, 100))) < 100 + 20
    assert known.pieces(text, len(text)) == [text]


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec["pre_tokenizer"]["pretokenizers"].insert(
            0, {"type": "Split", "pattern": {"Regex": r"\w+ \w+"}, "behavior": "Isolated", "invert": False}
        ),
        lambda spec: spec["pre_tokenizer"]["pretokenizers"].pop(2),  # no pattern makes the boundary
        lambda spec: spec["pre_tokenizer"]["pretokenizers"][2].update(behavior="MergedWithNext"),
        lambda spec: spec["pre_tokenizer"]["pretokenizers"][2].update(invert=True),
        lambda spec: spec["pre_tokenizer"]["pretokenizers"][3].update(add_prefix_space=True),
        lambda spec: spec["added_tokens"].append({"id": 999, "content": "two words"}),
        lambda spec: spec["added_tokens"].append({"id": 999, "content": "x", "rstrip": True}),
        lambda spec: spec.update(pre_tokenizer=None),
    ],
)
def test_what_is_not_known_to_be_certain_is_not_cut(tokenizer: Tokenizer, change: Any) -> None:
    spec = with_pre_tokenizer(tokenizer, *cut.V3_SPLITS)
    assert cut.is_certain(json.loads(tokenizer._plain))
    spec["added_tokens"] = []
    assert cut.is_certain(spec)
    change(spec)
    assert not cut.is_certain(spec)


def test_a_control_tokens_name_in_the_text_may_be_cut_for_it_is_ordinary_text(tokenizer: Tokenizer) -> None:
    text = "<|eos_token|> x <|fim_begin|>" * 9
    assert len(tokenizer.pieces(text, 2)) > 9
    assert np.array_equal(np.concatenate(tokenizer.encode_batch(tokenizer.pieces(text, 2))), tokenizer.encode_batch([text])[0])


def test_a_long_document_is_encoded_in_several_calls_with_progress_and_gives_the_same_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    tokenizer.save(tmp_path / "t.json")
    long = " ".join(some_texts(40))
    folder = write_texts(tmp_path / "texts", ["a short one", long, "another"])
    data = Data(sources=(source(folder),), directory=str(tmp_path / "one"), tokenizer=str(tmp_path / "t.json"), held_out=0.0)
    one = prepare(data, vocab_size=400, seed=0)
    monkeypatch.setattr(module, "BATCH_BYTES", 500)
    monkeypatch.setattr(module, "PIECE_BYTES", 100)
    moves: list[tuple[int, int]] = []

    class Moves:
        def start(self, name: str, num_bytes: int) -> None:
            moves.append((0, -num_bytes))

        def advance(self, name: str, num_documents: int, num_bytes: int) -> None:
            moves.append((num_documents, num_bytes))

    other = prepare(replace(data, directory=str(tmp_path / "other")), vocab_size=400, seed=0, progress=Moves())
    assert other.fingerprint == one.fingerprint
    assert len(moves) > len(long) // 700 and max(size for _, size in moves) < 2000
    assert (sum(count for count, _ in moves), sum(size for _, size in moves)) == (3, 0)


def test_a_tokenizer_trained_on_pieces_is_the_one_trained_on_the_whole() -> None:
    long = " ".join(some_texts(100))
    assert train_bpe(cut.pieces(long, 50), 500).fingerprint == train_bpe([long], 500).fingerprint


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own answer to SIGINT, which a shell's background jobs have switched off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_is_heard_between_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "t.json")
    folder = write_texts(tmp_path / "texts", [" ".join(some_texts(40))])
    data = Data(sources=(source(folder),), directory=str(tmp_path / "prepared"), tokenizer=str(tmp_path / "t.json"), held_out=0.0)
    monkeypatch.setattr(module, "BATCH_BYTES", 500)
    monkeypatch.setattr(module, "PIECE_BYTES", 100)
    calls: list[int] = []
    encode = Tokenizer.encode_batch

    def interrupted(self: Tokenizer, texts: Sequence[str]) -> list[Ids]:
        calls.append(len(texts))
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return encode(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(data, vocab_size=400, seed=0)
    assert len(calls) == 3
    assert not (tmp_path / "prepared" / "code").exists()


def test_what_cannot_be_cut_is_encoded_whole_and_told(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "_TOLD_CHARS", 1000)
    told: list[str] = []
    mine = Tokenizer(tokenizer._text, origin="mine", on_message=told.append)
    assert mine.pieces("x" * 1000, 10) == ["x" * 1000] and told == []
    assert mine.pieces("x" * 1001 + " y", 10) == ["x" * 1001, " y"]
    assert len(told) == 1 and "which shows no progress and which Ctrl-C waits for" in told[0]


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_is_heard_while_a_tokenizer_is_trained() -> None:
    taken: list[str] = []

    def texts() -> Iterator[str]:
        for i in range(20_000):
            taken.append(f"word {i} " * 20)
            if i == 1000:
                os.kill(os.getpid(), signal.SIGINT)
            if i > 1000:
                time.sleep(0.001)
            yield taken[-1]

    with pytest.raises(KeyboardInterrupt):
        train_bpe(texts(), 500)
    assert len(taken) < 10_000


def test_an_error_in_the_texts_ends_the_training_with_it() -> None:
    def texts() -> Iterator[str]:
        yield "a text"
        raise DataError("the second is broken")

    with pytest.raises(DataError, match="the second is broken"):
        train_bpe(texts(), 500)
