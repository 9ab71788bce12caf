"""Byte-level BPE tokenizers: any Hugging Face tokenizer.json, or one trained here; encoded by gigatoken, checked against tokenizers.

Two libraries, one meaning: Hugging Face `tokenizers` is the reference, gigatoken the fast path that must yield the same ids. It
is checked on a sample when it is first used, and on documents of every source in `prepare`; where it differs or cannot load the
file, the reference encodes, with a notice.

A tokenizer.json is untrusted: structures that can exhaust memory or that are not byte-level BPE are refused before a library
sees them, and what panics inside a library arrives as DataError.
"""
# ruff: noqa: RUF001 -- token names and samples hold characters that look like others on purpose

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import gigatoken
import numpy as np
import orjson
import tokenizers
from blake3 import blake3
from numpy.typing import NDArray
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from quintet.data.cut import V3_SPLITS, is_certain, pieces
from quintet.data.shards import write_file
from quintet.errors import DataError

Ids = NDArray[np.uint32]
EOS, FIM_BEGIN, FIM_HOLE, FIM_END = SPECIAL_TOKENS = ("<|eos_token|>", "<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>")
"""Control tokens of a tokenizer that is trained here; they take the first ids."""

_EOS_NAMES = (EOS, "<｜end▁of▁sentence｜>", "<|endoftext|>", "<|end_of_text|>", "</s>", "[EOS]", "<|im_end|>")
_BOS_NAMES = ("<|bos_token|>", "<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<|startoftext|>", "<s>", "[BOS]")
_FIM_NAMES = (
    (FIM_BEGIN, FIM_HOLE, FIM_END),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)
_CONTROL = re.compile(r"<[^<>\s]+>|\[[A-Z_]+\]")
_MAX_JSON_BYTES = 256 << 20
_MAX_ID = 1 << 24
_TOLD_CHARS = 32 << 20
_BYTE_CHARS = sorted(pre_tokenizers.ByteLevel.alphabet())

_SAMPLE = (
    "",
    " ",
    "def f(x, *, y=0):\n    if x  and\ty:\r\n        return {'a': [1, 22, 333, 4444]}  # don't\n\n\n",
    "The naïve café — “quoted”, 100% of 1,234.5 km²; I'LL, we've; e\u0301 vs é\u00a0\u3000|\u2028 end  ",
    "你好，世界。日本語のテキスト ゠カナ 한국어 Ελληνικά русский עברית العربية हिन्दी 👩\u200d👩\u200d👧🙂 𝔘\x0b\x1c\x85",
    "".join(map(chr, range(1, 0x250))),
    "\n".join(" " * n + "x" for n in range(20)),
)


@dataclass(frozen=True, kw_only=True)
class Fim:
    """Ids of the fill-in-the-middle tokens."""

    begin: int
    """Before the prefix."""
    hole: int
    """Between prefix and suffix."""
    end: int
    """Between suffix and middle."""


class Tokenizer:
    """A byte-level BPE. Control tokens never come out of text: their names inside a document are encoded as ordinary characters."""

    def __init__(self, text: str, *, origin: str, on_message: Callable[[str], None] = lambda message: None) -> None:
        """Read the `text` of a tokenizer.json that came from `origin`; `on_message` gets notices. Raises DataError."""
        self.origin = origin
        self._text = text
        self.on_message = on_message
        """Gets notices, one line each."""
        try:
            self._spec: dict[str, Any] = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{origin} is not a tokenizer.json: {error}; give a Hugging Face tokenizer.json") from None
        with self._contained("loading"):
            ids = _check(self._spec, origin)
            self._reference  # noqa: B018 -- loaded now, for it tells what is wrong with the file
        self.vocab_size: int = max(ids.values()) + 1
        """One more than the largest id."""
        eos = _first(ids, _EOS_NAMES)
        if eos is None:
            raise DataError(f"{origin} has no end-of-document token; add one of {', '.join(_EOS_NAMES)} to its added_tokens")
        self.eos_id: int = eos
        """Ends every document."""
        self.bos_id: int | None = _first(ids, _BOS_NAMES)
        """Begins a document in some tokenizers; training text does not use it."""
        names = next((names for names in _FIM_NAMES if all(name in ids for name in names)), None)
        self.fim: Fim | None = Fim(begin=ids[names[0]], hole=ids[names[1]], end=ids[names[2]]) if names else None
        """Fill-in-the-middle tokens; None: it has none."""
        self.fingerprint: str = blake3(_canonical(self._spec)).hexdigest()
        """blake3 of the canonical JSON, hexadecimal."""

    @classmethod
    def from_file(
        cls,
        path: Path | str,
        *,
        remedy: str = "name a Hugging Face tokenizer.json, or a folder that holds one",
        on_message: Callable[[str], None] = lambda message: None,
    ) -> Tokenizer:
        """Read a tokenizer.json, or the one in a folder.

        Raises DataError if it is missing or too large, with `remedy`, or not a byte-level BPE.
        """
        path = Path(path).expanduser()
        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            if (size := path.stat().st_size) > _MAX_JSON_BYTES:
                raise DataError(f"{path} has {size} bytes, more than the {_MAX_JSON_BYTES} of any tokenizer.json; {remedy}")
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"cannot read the tokenizer {path}: {error.strerror}; {remedy}") from None
        except UnicodeDecodeError as error:
            raise DataError(f"cannot read the tokenizer {path}: {error}; {remedy}") from None
        return cls(text, origin=str(path), on_message=on_message)

    def save(self, path: Path) -> None:
        """Write the tokenizer.json, whole or not at all, unless it is there already. Raises DataError if the disk refuses."""
        if not path.is_file() or path.read_bytes() != self._text.encode():
            write_file(path, self._text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, without control tokens; on all cores."""
        if not texts:
            return []
        with self._contained("encoding"):
            return _encode_fast(self._fast, texts) if self._fast else _encode_reference(self._reference, texts)

    def pieces(self, text: str, size: int) -> list[str]:
        """The text in pieces of about `size` characters whose ids, one after another, are the text's.

        Where no cut is certain a piece is larger; a very large one, which takes long to encode, is told.
        """
        if len(text) <= size:
            return [text]
        found = [*pieces(text, size)] if self._can_cut else [text]
        if (longest := max(map(len, found))) > _TOLD_CHARS:
            self.on_message(
                f"a document has {longest / 1e6:.0f} million characters without a place where its tokens can surely be cut: they are "
                "encoded in one go, which shows no progress and which Ctrl-C waits for"
            )
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, control tokens by name, incomplete UTF-8 replaced."""
        with self._contained("decoding"):
            return str(self._full.decode([int(i) for i in ids], skip_special_tokens=False))

    def check(self, texts: Sequence[str]) -> int:
        """Encode `texts` both ways; the number of texts that differ. From then on the reference encodes, if there is one."""
        if not texts or self._fast is None:
            return 0
        with self._contained("checking"):
            pairs = zip(_encode_fast(self._fast, texts), _encode_reference(self._reference, texts), strict=True)
            num_different = sum(not np.array_equal(fast, reference) for fast, reference in pairs)
        if num_different:
            self.use_reference()
            self._notice(f"gigatoken encodes {num_different} of {len(texts)} documents differently")
        return num_different

    def use_reference(self) -> None:
        """Encode with the reference from now on."""
        self._fast = None

    @property
    def is_fast(self) -> bool:
        """Whether the fast encoder is used."""
        return self._fast is not None

    @cached_property
    def _full(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self._text)

    @cached_property
    def _reference(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self._plain)

    @cached_property
    def _fast(self) -> gigatoken.Tokenizer | None:
        try:
            with self._contained("loading"):
                fast = gigatoken.Tokenizer.from_json(self._plain)
                names = [token["content"] for token in self._spec.get("added_tokens") or []]
                sample = [*_SAMPLE, *names, f"a {' '.join(names)} b"]
                pairs = zip(_encode_fast(fast, sample), _encode_reference(self._reference, sample), strict=True)
                if all(np.array_equal(ids, reference) for ids, reference in pairs):
                    return fast
            self._notice("gigatoken encodes the built-in sample differently")
        except DataError as error:
            self._notice(f"gigatoken cannot be used ({' '.join(str(error.__cause__).split())[:200]})")
        return None

    @cached_property
    def _can_cut(self) -> bool:
        return is_certain(orjson.loads(self._plain))

    @cached_property
    def _plain(self) -> str:
        """The same tokenizer with control tokens under names that no document holds (they contain NUL), and nothing added or cut."""
        spec = dict(self._spec, post_processor=None, truncation=None, padding=None)
        added = spec.get("added_tokens") or []
        hidden = {token["content"]: f"\0{token['id']}\0" for token in added if token.get("special") or _CONTROL.fullmatch(token["content"])}
        spec["added_tokens"] = [dict(token, content=hidden.get(token["content"], token["content"])) for token in added]
        spec["model"] = dict(spec["model"], vocab={hidden.get(name, name): id for name, id in spec["model"]["vocab"].items()})
        return orjson.dumps(spec).decode()

    def _notice(self, why: str) -> None:
        self.on_message(f"{self.origin}: {why}; encoding with Hugging Face tokenizers instead, which is many times slower")

    @contextmanager
    def _contained(self, doing: str) -> Iterator[None]:
        """Whatever the libraries raise as DataError; a Rust panic derives from BaseException alone."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, DataError):
            raise
        except BaseException as error:
            raise DataError(
                f"{self.origin}: {doing} failed: {' '.join(str(error).split())[:300]}; check this tokenizer.json or use another"
            ) from error


def check_trainable(vocab_size: int) -> None:
    """Raise DataError if a vocabulary of this size has no room for the control tokens and all bytes."""
    smallest = len(SPECIAL_TOKENS) + len(_BYTE_CHARS)
    if vocab_size < smallest:
        raise DataError(
            f"model.vocab_size ({vocab_size}) must be at least {smallest} to hold {len(SPECIAL_TOKENS)} control tokens and 256 bytes"
        )


def train_bpe(texts: Iterable[str], vocab_size: int, *, on_message: Callable[[str], None] = lambda message: None) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` tokens: `SPECIAL_TOKENS`, the 256 bytes, then merges seen at least twice.

    The same texts in the same order always give the same tokenizer. Raises DataError if `vocab_size` has no room for bytes.
    """
    check_trainable(vocab_size)
    bpe = tokenizers.Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in V3_SPLITS]
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=_BYTE_CHARS, show_progress=False
    )
    _feed(bpe, texts, trainer)
    return Tokenizer(bpe.to_str(pretty=False), origin="the trained tokenizer", on_message=on_message)


def _feed(bpe: tokenizers.Tokenizer, texts: Iterable[str], trainer: trainers.BpeTrainer) -> None:
    """Train in a thread, so that Ctrl-C is heard here: the library asks for texts from threads of its own, in which no signal arrives."""
    stopped = threading.Event()
    errors: list[BaseException] = []

    def until_stopped() -> Iterator[str]:
        for text in texts:
            if stopped.is_set():
                raise KeyboardInterrupt
            yield text

    def train() -> None:
        try:
            bpe.train_from_iterator(until_stopped(), trainer)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        thread.join()
    except KeyboardInterrupt:
        stopped.set()
        thread.join()
        raise
    if errors:
        raise errors[0]


def _encode_fast(encoder: gigatoken.Tokenizer, texts: Sequence[str]) -> list[Ids]:
    layout = encoder.encode_batch(list(texts)).layout
    offsets = np.asarray(layout.offsets.data).tolist()
    ids = np.asarray(layout.content.data)
    return [ids[begin:end] for begin, end in pairwise(offsets)]


def _encode_reference(encoder: tokenizers.Tokenizer, texts: Sequence[str]) -> list[Ids]:
    return [np.asarray(encoding.ids, np.uint32) for encoding in encoder.encode_batch_fast(list(texts), add_special_tokens=False)]


def _canonical(spec: dict[str, Any]) -> bytes:
    """The JSON with sorted keys and no spaces."""
    try:
        return orjson.dumps(spec, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # a number of more than 64 bits, or half a surrogate pair
        return json.dumps(spec, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(errors="surrogatepass")


def _first(ids: dict[str, int], names: Iterable[str]) -> int | None:
    return next((ids[name] for name in names if name in ids), None)


def _check(spec: object, origin: str) -> dict[str, int]:
    """All tokens with their ids, if `spec` is a byte-level BPE without anything that could harm us; raises DataError."""

    def refuse(what: str) -> DataError:
        return DataError(f"{origin}: {what}; give a Hugging Face tokenizer.json of a byte-level BPE (as DeepSeek, Llama 3, Qwen or GPT-2)")

    if not isinstance(spec, dict) or not isinstance(model := spec.get("model"), dict):
        raise refuse("it has no model")
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or not isinstance(model.get("merges"), list):
        raise refuse(f"its model is {model.get('type')!r} (byte_fallback {model.get('byte_fallback')}), not a byte-level BPE with merges")
    if model.get("dropout"):
        raise refuse(f"its model.dropout ({model['dropout']}) makes encoding random; set it to null")
    # A Replace normalizer can expand a short text without bound, and none of these families has one.
    accepted = {"normalizer": {"NFC", "NFD", "NFKC", "NFKD"}, "pre_tokenizer": {"Split", "ByteLevel", "Digits", "Punctuation"}}
    for name, allowed in accepted.items():
        if unknown := set(_types(spec.get(name))) - allowed:
            raise refuse(f"its {name} uses {', '.join(sorted(unknown))}, and only {', '.join(sorted(allowed))} are accepted")
    if not isinstance(vocab := model.get("vocab"), dict) or not isinstance(added := spec.get("added_tokens") or [], list):
        raise refuse("it has no vocabulary")
    if not all(isinstance(token, dict) and isinstance(token.get("content"), str) for token in added):
        raise refuse("an entry of added_tokens has no content")
    ids = vocab | {token["content"]: token.get("id") for token in added}
    valid = all(type(id) is int and 0 <= id < _MAX_ID for id in ids.values())
    if not valid or len(set(ids.values())) < len(ids) or any(ids[name] != id for name, id in vocab.items()):
        raise refuse(f"its ids are not different whole numbers below {_MAX_ID}, or a token has two")
    if missing := [char for char in _BYTE_CHARS if char not in vocab]:
        raise refuse(f"{len(missing)} of the 256 byte tokens are missing from its vocabulary")
    return ids


def _types(part: object) -> Iterator[str]:
    """The types of a normalizer or pre-tokenizer, sequences opened."""
    if isinstance(part, dict):
        inner = [item for key in ("normalizers", "pretokenizers") if isinstance(part.get(key), list) for item in part[key]]
        if part.get("type") == "Sequence":
            for item in inner:
                yield from _types(item)
        else:
            yield str(part.get("type"))
