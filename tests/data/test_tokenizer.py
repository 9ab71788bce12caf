"""The tokenizer: the reference's ids, everything round trips, no text becomes a control token, bad files are refused."""
# ruff: noqa: RUF001 -- DeepSeek's token names hold full-width bars

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from quintet.data.tokenizer import SPECIAL_TOKENS, Fim, Tokenizer, train_bpe
from quintet.errors import DataError
from tests.data.corpus import some_texts

Spec = dict[str, Any]
PIECES = [
    *SPECIAL_TOKENS,
    "  ",
    "\n    ",
    "\r\n",
    "\t",
    "x",
    "Def",
    "é",
    "e\u0301",
    "12345",
    "_a",
    ".b(",
    "一",
    "ひ",
    "\u3000",
    "\u2028",
    "🙂\u200d",
    "'s",
    "\x85",
]


@pytest.fixture(scope="module")
def deepseek(tokenizer: Tokenizer) -> Spec:
    """A tokenizer.json laid out as DeepSeek-V3's: full-width names, FIM not marked special, added ids after the vocabulary, BOS added."""
    spec: Spec = json.loads(tokenizer._text)
    for name in SPECIAL_TOKENS:
        del spec["model"]["vocab"][name]
    names = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>", "<think>"]
    spec["model"]["vocab"] = {name: i for i, name in enumerate(sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].__getitem__))}
    first = len(spec["model"]["vocab"])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    spec["added_tokens"] = [{"id": first + i, "content": name, "special": i < 2, **flags} for i, name in enumerate(names)]
    bos = {"SpecialToken": {"id": names[0], "type_id": 0}}
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {names[0]: {"id": names[0], "ids": [first], "tokens": [names[0]]}},
    }
    return spec


def load(spec: Spec, on_message: Callable[[str], None] = lambda message: None) -> Tokenizer:
    return Tokenizer(json.dumps(spec), origin="test.json", on_message=on_message)


def test_training_gives_the_control_tokens_all_bytes_and_merges(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size <= 400 and tokenizer.eos_id == 0 and tokenizer.bos_id is None
    assert tokenizer.fim == Fim(begin=1, hole=2, end=3)
    text = "".join(map(chr, range(1, 0xD800))) + "🙂"
    assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text
    assert tokenizer.decode([0, 1, 2, 3]) == "".join(SPECIAL_TOKENS)


def test_indentation_takes_one_token() -> None:
    tokenizer = train_bpe(["    if x:\n        return y\n" * 9], 400)
    ids = tokenizer.encode_batch(["\n        return"])[0]
    assert [tokenizer.decode([i]) for i in ids] == ["\n", "       ", " return"]


def test_training_twice_gives_the_same_tokenizer_also_in_another_process(tokenizer: Tokenizer) -> None:
    script = (
        "from tests.data.corpus import some_texts; from quintet.data.tokenizer import train_bpe\n"
        "print(train_bpe([*some_texts(200), 'def f(x):\\n    if x:\\n        return [x]\\n' * 5], 400).fingerprint)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == tokenizer.fingerprint


def test_a_vocabulary_without_room_for_bytes_is_refused() -> None:
    with pytest.raises(DataError, match=r"vocab_size \(259\) must be at least 260"):
        train_bpe(["x"], 259)


def test_gigatoken_is_used_and_equals_the_reference_on_every_character(tokenizer: Tokenizer) -> None:
    assert tokenizer._fast is not None
    texts = [f"a{chr(c)}b {chr(c)}{chr(c)}1\n{chr(c)}." for c in range(1, 0x3100)] + some_texts(50)
    assert tokenizer.check(texts) == 0


@given(st.lists(st.one_of(st.text(max_size=8), st.sampled_from(PIECES)), max_size=12).map("".join))
def test_any_text_round_trips_and_never_becomes_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_batch([text])[0]
    assert tokenizer.decode(ids) == text and tokenizer.check([text]) == 0
    assert not set(ids.tolist()) & {0, 1, 2, 3}


def test_a_deepseek_tokenizer_is_recognised_and_its_names_in_text_stay_text(deepseek: Spec) -> None:
    messages: list[str] = []
    tokenizer = load(deepseek, messages.append)
    first = len(deepseek["model"]["vocab"])
    assert (tokenizer.bos_id, tokenizer.eos_id) == (first, first + 1)
    assert tokenizer.fim == Fim(begin=first + 3, hole=first + 2, end=first + 4)
    text = "x <｜end▁of▁sentence｜> <think>y<｜fim▁hole｜>"
    ids = tokenizer.encode_batch([text, "def self"])
    assert max(ids[0]) < first and tokenizer.decode(ids[0]) == text
    whole = tokenizers.Tokenizer.from_str(json.dumps(deepseek))
    assert ids[1].tolist() == whole.encode("def self", add_special_tokens=False).ids
    assert tokenizer._fast is not None and messages == []


def test_added_whitespace_tokens_stay_in_use(tokenizer: Tokenizer) -> None:
    spec = json.loads(tokenizer._text)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    spec["added_tokens"].append({"id": tokenizer.vocab_size, "content": " " * 9, **flags})
    ids = load(spec).encode_batch(["a" + " " * 9 + "b"])[0]
    assert tokenizer.vocab_size in ids


def test_a_pretokenizer_that_gigatoken_does_not_know_falls_back_with_a_notice(tokenizer: Tokenizer) -> None:
    spec = json.loads(tokenizer._text)
    spec["pre_tokenizer"]["pretokenizers"] = [
        {"type": "Split", "pattern": {"Regex": "[aeiou]+"}, "behavior": "Isolated", "invert": False},
        spec["pre_tokenizer"]["pretokenizers"][-1],
    ]
    messages: list[str] = []
    other = load(spec, messages.append)
    assert other.decode(other.encode_batch(["audio input"])[0]) == "audio input"
    assert len(messages) == 1 and "gigatoken cannot be used" in messages[0] and "Hugging Face" in messages[0]


def test_when_gigatoken_differs_the_reference_takes_over_with_a_notice(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    mine = Tokenizer(tokenizer._text, origin="mine", on_message=messages.append)
    expected = mine.encode_batch(["alpha beta"])[0]
    monkeypatch.setattr("quintet.data.tokenizer._encode_fast", lambda encoder, texts: [np.zeros(1, np.uint32) for _ in texts])
    assert mine.check(["alpha beta", "gamma"]) == 2
    assert np.array_equal(mine.encode_batch(["alpha beta"])[0], expected)
    assert len(messages) == 1 and "2 of 2 documents" in messages[0]


def test_the_fingerprint_is_of_the_content_not_of_the_layout(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    assert Tokenizer.from_file(tmp_path).fingerprint == tokenizer.fingerprint
    path.write_text(json.dumps(json.loads(path.read_text()), indent=3))
    assert Tokenizer.from_file(path).fingerprint == tokenizer.fingerprint
    spec = json.loads(path.read_text())
    spec["model"]["merges"].pop()
    assert load(spec).fingerprint != tokenizer.fingerprint


def change(*keys: str, to: object) -> Callable[[Spec], None]:
    def apply(spec: Spec) -> None:
        for key in keys[:-1]:
            spec = spec[key]
        spec[keys[-1]] = to

    return apply


HARMFUL: dict[str, tuple[Callable[[Spec], None], str]] = {
    "word piece": (change("model", "type", to="WordPiece"), "not a byte-level BPE"),
    "sentence piece": (change("model", "byte_fallback", to=True), "not a byte-level BPE"),
    "no model": (change("model", to=None), "no model"),
    "random": (change("model", "dropout", to=0.1), "random"),
    "text bomb": (change("normalizer", to={"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 9}), "Replace"),
    "huge id": (change("model", "vocab", "<|eos_token|>", to=1 << 40), "ids"),
    "same ids": (change("model", "vocab", "!", to=9), "ids"),
    "no eos": (lambda spec: (spec["added_tokens"].pop(0), spec["model"]["vocab"].pop("<|eos_token|>"))[0], "end-of-document"),
    "missing byte": (lambda spec: spec["model"]["vocab"].pop("!"), "1 of the 256 byte"),
    "unknown merge": (change("model", "merges", to=[["zz", "qq"]]), "loading failed"),
    "odd added token": (change("added_tokens", to=[7]), "added_tokens"),
    "odd vocabulary": (change("model", "vocab", to=[1]), "no vocabulary"),
    "odd text": (change("pre_tokenizer", to="ByteLevel"), "loading failed"),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_a_harmful_or_unsuitable_tokenizer_json_is_a_data_error(tokenizer: Tokenizer, name: str) -> None:
    apply, message = HARMFUL[name]
    spec = copy.deepcopy(json.loads(tokenizer._text))
    apply(spec)
    with pytest.raises(DataError, match=message):
        load(spec)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"null", b"[" * 100_000, b"NaN"])
def test_a_file_that_is_no_tokenizer_is_a_data_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        Tokenizer.from_file(tmp_path)
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        Tokenizer.from_file(tmp_path / "none.json")


def test_a_pattern_that_explodes_is_a_data_error_and_not_a_panic(tokenizer: Tokenizer) -> None:
    spec = json.loads(tokenizer._text)
    split = {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False}
    spec["pre_tokenizer"]["pretokenizers"].insert(0, split)
    with pytest.raises(DataError, match=r"test\.json: encoding failed"):
        load(spec).encode_batch(["a" * 5000 + "d"])
