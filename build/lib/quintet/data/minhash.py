"""Fingerprints that tell duplicates: an exact one, and MinHash bands that similar documents share.

Exact: 128 bits of blake3 over the document without ASCII white space.

Near: a document is the set of its n-grams of words (lower case, ASCII punctuation taken as white space, every Chinese character, kana or
hangul syllable a word of its own). One-permutation hashing (Li, Owen, Zhang 2012, arXiv 1208.1259) gives each shingle one hash, whose upper
half picks one of bands x rows bins and whose lower half competes for that bin's minimum; an empty bin borrows from another, picked by
a hash of its own number (optimal densification, Shrivastava 2017, arXiv 1703.04664). Two documents agree in a bin with a probability equal
to their Jaccard similarity, as with one permutation per bin, for the price of one hash per shingle. A band is the hash of `rows` bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from quintet.data.texts import Hashes, Ints, Spans, Texts, hash_spans, mix, words_of

VERSION = 1
"""Raised when the same text would have other fingerprints."""
_EMPTY = np.uint32(0xFFFFFFFF)
_ASCII_SPACE = b" \t\n\r\f\v"
_FOLD = bytes(
    ord(chr(i).lower()) if chr(i).isupper() else 32 if i in b"!\"#$%&'()*+,-./:;<=>?@[\\]^`{|}~" else i for i in range(128)
) + bytes(range(128, 256))
_FIRST_WIDE, _LAST_WIDE = 0xE3, 0xED
"""First bytes of the characters from U+3000 to U+DFFF: CJK, kana, hangul."""


def exact(raws: Sequence[bytes]) -> Hashes:
    """128 bits per document: [N, 2]."""
    digests = b"".join([blake3(raw.translate(None, _ASCII_SPACE)).digest(16) for raw in raws])
    return np.frombuffer(digests, "<u8").reshape(-1, 2) if raws else np.empty((0, 2), np.uint64)


def bands(texts: Texts, *, ngram: int, bands: int, rows: int) -> Hashes:
    """The band keys of each document: [N, bands]; documents without a word have keys of their own place, and match none."""
    hashes, owner = shingles(texts, ngram)
    return band_keys(signatures(hashes, owner, len(texts), num_bins=bands * rows), bands)


def shingles(texts: Texts, ngram: int) -> tuple[Hashes, Ints]:
    """The hash of every n-gram of words [S], and the document that each belongs to [S]; a document of fewer words is one shingle."""
    data = np.frombuffer(texts.data.tobytes().translate(_FOLD), np.uint8)
    words = _with_wide_characters(data, words_of(data, texts.begin), texts.begin)
    hashes = hash_spans(data, words.begin, words.end - words.begin)
    count = max(len(hashes) - ngram + 1, 0)
    combined = hashes[:count].copy()
    for i in range(1, ngram):
        combined *= np.uint64(0x9E3779B97F4A7C15)
        combined += hashes[i : i + count]
    owner = words.owner
    inside = owner[:count] == owner[ngram - 1 :] if count else np.empty(0, bool)
    few = (words.counts < ngram) & (words.counts > 0)
    return mix(np.append(combined[inside], _whole(hashes, words, few))), np.append(owner[:count][inside], np.flatnonzero(few))


def _whole(hashes: Hashes, words: Spans, few: NDArray[np.bool_]) -> Hashes:
    """One hash for all words of each document that is marked in `few`."""
    chosen = np.flatnonzero(np.repeat(few, words.counts))
    if not len(chosen):
        return np.empty(0, np.uint64)
    place = (chosen - words.first[words.owner[chosen]]).astype(np.uint64)
    return np.bitwise_xor.reduceat(mix(hashes[chosen] + place), np.flatnonzero(place == 0))


def _with_wide_characters(data: NDArray[np.uint8], words: Spans, begin: Ints) -> Spans:
    """The words, with a new one at each character that is a word of its own."""
    starts_here = (data >= _FIRST_WIDE) & (data <= _LAST_WIDE)
    if not starts_here.any():
        return words
    starts_here[words.begin] = True
    starts = np.flatnonzero(starts_here)
    word = np.searchsorted(words.begin, starts, side="right") - 1
    return Spans(starts, np.minimum(words.end[word], np.append(starts[1:], len(data))), np.searchsorted(starts, begin))


def signatures(hashes: Hashes, owner: Ints, count: int, *, num_bins: int) -> NDArray[np.uint32]:
    """One-permutation MinHash of each document's shingles: [count, num_bins]; all `_EMPTY` where a document has none."""
    bins = ((hashes >> np.uint64(32)) * np.uint64(num_bins) >> np.uint64(32)).astype(np.int64)
    found = np.full(count * num_bins, _EMPTY)
    np.minimum.at(found, owner * num_bins + bins, np.minimum(hashes & np.uint64(0xFFFFFFFF), 0xFFFFFFFE).astype(np.uint32))
    return _densified(found.reshape(count, num_bins))


def _densified(found: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Every empty bin with the value of the first full one among those that its own random sequence visits."""
    num_bins, filled = found.shape[1], found.copy()
    document, bins = np.nonzero((found == _EMPTY) & (found != _EMPTY).any(axis=1, keepdims=True))
    for visit in _visits(num_bins):
        if not len(document):
            break
        value = found[document, visit[bins]]
        filled[document, bins] = value
        document, bins = document[value == _EMPTY], bins[value == _EMPTY]
    return filled


@cache
def _visits(num_bins: int) -> NDArray[np.int64]:
    """The bins that each bin visits, in order: [4 num_bins + num_bins, num_bins]; at last all of them one after another."""
    tries = 4 * num_bins
    numbers = mix(np.arange(tries * num_bins, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)).reshape(tries, num_bins)
    around = (np.arange(num_bins)[:, None] + np.arange(num_bins)[None, :]) % num_bins
    return np.concatenate([(numbers % np.uint64(num_bins)).astype(np.int64), around])


def band_keys(found: NDArray[np.uint32], bands: int) -> Hashes:
    """The hash of each band's bins: [N, bins] -> [N, bands]."""
    rows = found.reshape(len(found), bands, -1)
    keys = np.broadcast_to(np.arange(bands, dtype=np.uint64), rows.shape[:2]).copy()
    for i in range(rows.shape[2]):
        keys = mix(keys * np.uint64(0x9E3779B97F4A7C15) + rows[:, :, i])
    return keys
