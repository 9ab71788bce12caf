"""Text that is changed before it is judged: whole lines taken out, or private details replaced; two lines never become one.

Every function takes a document and returns it changed or as it was.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator

from quintet.spec.quality import Quality
from quintet.spec.run import Domain

VERSION = 1
"""Raised when the same text would be changed otherwise."""

EMAIL, IP, KEY = "email@example.com", "192.0.2.1", "<key>"
"""What private details become; 192.0.2.1 is an address for documentation (RFC 5737)."""

Edit = Callable[[str], str]

_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_COMMENT_LINE = re.compile(r"\s*(?:#|//|/\*|\*|--|;|%|<!--|-->|\(\*|\"\"\"|''')")
_OPENS = {"/*": "*/", "<!--": "-->", "(*": "*)", '"""': '"""', "'''": "'''"}
_LICENSE = re.compile(r"copyright|licen[sc]e|all rights reserved|spdx-", re.IGNORECASE)
_FIRST_LINE = re.compile(r"#!|<\?|\s*#.*coding[:=]")

_POLICY = re.compile("terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies|all rights reserved", re.IGNORECASE)
_SENTENCE_END = (".", "?", "!", '"', "'", "”", "’", "…")  # noqa: RUF001 -- closing quotes

_EMAIL = re.compile(r"\b[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){0,8}\.[A-Za-z]{2,24}\b")
_IP = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.])")
_KEY = re.compile(
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"  # Amazon
    r"|\bgh[pousr]_[A-Za-z0-9]{36}\b|\bgithub_pat_[A-Za-z0-9_]{82}\b"  # GitHub
    r"|\bsk-[A-Za-z0-9_-]{32,}\b|\bxox[abprs]-[A-Za-z0-9-]{10,}\b|\bAIza[0-9A-Za-z_-]{35}\b"  # OpenAI, Slack, Google
    r"|(?<=-----BEGIN PRIVATE KEY-----\n)[A-Za-z0-9+/=\n]+(?=\n-----END)"
    r"|(?<=-----BEGIN RSA PRIVATE KEY-----\n)[A-Za-z0-9+/=\n]+(?=\n-----END)"
    r"|(?<=-----BEGIN OPENSSH PRIVATE KEY-----\n)[A-Za-z0-9+/=\n]+(?=\n-----END)"
)


def edits_of(quality: Quality, domain: Domain) -> tuple[Edit, ...]:
    """What a source of `domain` is put through, in order."""

    def found() -> Iterator[Edit]:
        if domain == "code" and "code" in quality.code and quality.files.strip_license:
            yield without_license
        if domain == "prose" and "c4" in quality.prose and quality.c4.clean_lines:
            yield without_noise_lines
        if quality.scrub:
            yield scrubbed

    return tuple(found())


def lines_of(text: str) -> list[str]:
    """The lines with their line feeds; other separators stay within them, so that taking a line out brings no two of them together."""
    return _LINE.findall(text)


def without_license(text: str) -> str:
    """Without the comment that the file begins with, if it speaks of copyright or licence; a shebang or coding line before it stays."""
    lines = lines_of(text)
    begin = 0
    while begin < len(lines) and (not lines[begin].strip() or _FIRST_LINE.match(lines[begin])):
        begin += 1
    end, closing = begin, None
    while end < len(lines) and (closing or _COMMENT_LINE.match(lines[end])):
        line = lines[end].strip()
        if closing is None:
            opened = next((mark for mark in _OPENS if line.startswith(mark)), None)
            closing, line = (_OPENS[opened], line[len(opened) :]) if opened else (None, "")
        if closing and closing in line:
            closing = None
        end += 1
    if closing or not _LICENSE.search("".join(lines[begin:end])):  # A comment that never closes is none.
        return text
    while end < len(lines) and not lines[end].strip():
        end += 1
    return "".join(lines[:begin] + lines[end:])


def without_noise_lines(text: str) -> str:
    """Without lines of fewer than 3 words, without a sentence's end, of JavaScript or of a policy notice (C4, 2.2); blank ones stay."""

    def is_kept(line: str) -> bool:
        words = line.split()
        if not words:
            return True
        ended = line.rstrip().endswith(_SENTENCE_END) and not line.rstrip().endswith("...")
        return ended and len(words) >= 3 and "javascript" not in line.lower() and not _POLICY.search(line)

    return "".join(line for line in lines_of(text) if is_kept(line))


def scrubbed(text: str) -> str:
    """With placeholders for e-mail addresses, public IP addresses, and keys of known form."""
    if "@" in text:
        text = _EMAIL.sub(EMAIL, text)
    return _KEY.sub(_key, _IP.sub(_ip, text))


def _key(match: re.Match[str]) -> str:
    return KEY + "\n" * match[0].count("\n")


def _ip(match: re.Match[str]) -> str:
    """Version numbers such as 1.2.3.4 are public addresses too; better a version too many than a person."""
    try:
        return IP if ipaddress.IPv4Address(match[0]).is_global else match[0]
    except ipaddress.AddressValueError:
        return match[0]
