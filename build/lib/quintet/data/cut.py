"""Where a long text can be cut so that the tokens of its pieces, one after another, are the tokens of the whole.

A byte-level BPE merges only within pre-tokens, so a cut between two pre-tokens changes nothing. Between an ASCII letter and an ASCII
character that is none there is such a boundary for the pre-tokenizers named here. Their patterns take letters in runs, at most with one
character before them and none behind: the match that holds the letter ends with it, in the whole text as in the piece, and the next match
begins behind it. No pattern looks back; the one that looks ahead, `\\s+(?!\\S)`, matches spaces, and a piece ends with a letter. Unicode
normalization keeps ASCII characters apart from what precedes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

V3_SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",  # noqa: RUF001 -- the ranges of CJK ideographs and kana
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*"
    "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
"""DeepSeek-V3's pre-tokenizer: numbers in threes, runs of CJK, then words with one leading space or punctuation mark, punctuation with
the line breaks after it, and runs of spaces that leave the last one to the next word, which keeps indentation in one token."""

_WORDS = (
    V3_SPLITS[2],
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",  # Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",  # Qwen
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
)
"""Patterns that make the boundary."""
_NEUTRAL = (*V3_SPLITS[:2], r"\p{N}", r"\p{N}+", r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))")
"""Patterns that match neither letters nor across the boundary."""
_BOUNDARY = re.compile(r"[A-Za-z](?=[\x00-@\[-`{-\x7f])")


def is_certain(spec: dict[str, Any]) -> bool:
    """Whether the boundary is one for the tokenizer.json `spec`, whose control tokens are under names that no text holds."""
    makes_boundary = False
    for part in _parts(spec.get("pre_tokenizer")):
        match part:
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} if pattern in _WORDS + _NEUTRAL:
                makes_boundary |= pattern in _WORDS
            case {"type": "ByteLevel", "add_prefix_space": False}:
                makes_boundary |= part.get("use_regex", True)
            case {"type": "Digits"}:
                pass
            case _:
                return False
    return makes_boundary and not any(_reaches_across(token) for token in spec.get("added_tokens") or [])


def pieces(text: str, size: int) -> Iterator[str]:
    """The text in pieces of `size` characters or, up to the next boundary, more; all of them together are the text."""
    begin = 0
    while len(text) - begin > size and (boundary := _BOUNDARY.search(text, begin + size - 1)):
        yield text[begin : boundary.end()]
        begin = boundary.end()
    yield text[begin:]


def _parts(pre_tokenizer: Any) -> Iterator[Any]:
    if isinstance(pre_tokenizer, dict) and pre_tokenizer.get("type") == "Sequence":
        for part in pre_tokenizer["pretokenizers"]:
            yield from _parts(part)
    else:
        yield pre_tokenizer


def _reaches_across(token: dict[str, Any]) -> bool:
    """Whether an added token holds the boundary in its name, or depends on what stands beside it."""
    return bool(_BOUNDARY.search(token["content"])) or any(token.get(flag) for flag in ("single_word", "lstrip", "rstrip"))
