"""Blocks of elements as fewer bytes and back, losing no bit: the codec "planes", and bf16 as the rounding of fp32.

The bytes of a float differ in kind: exponents of neighbours are alike, mantissas are noise. "planes" separates them. Of fp32 numbers with
the bits s eeeeeeee mmmmmmm llllllllllllllll (bf16 lacks the last 16), a block's stored form is

    length of each plane's stored form (4 bytes, little-endian, each)  |  plane 0: the bytes eeeeeeee of all elements
    |  plane 1: the bytes smmmmmmm  |  plane 2 (fp32 only): the low 16 bits, little-endian

A plane whose length is that of its elements is stored as it is, any other as one zstd frame. A sample's entropy decides whether zstd is
tried. It is told to look for long matches only, in few places, for what is to be gained is Huffman coding of exponents: on normal numbers
that is more than twice as fast as its level 1, and smaller (benchmarks/checkpoint.py).
"""

from __future__ import annotations

import math
import threading

import numpy as np
import zstandard
from numpy.typing import NDArray

from quintet.checkpoint.manifest import PLANES
from quintet.errors import CheckpointError

Bytes = NDArray[np.uint8]

_LARGEST_ENTROPY = 7.75
"""Bits per byte of a plane's sample above which it is stored as it is."""
_SAMPLE = 4096
_LEAST_GAIN = 1 / 64
_PARAMETERS = zstandard.ZstdCompressionParameters(
    window_log=18, hash_log=6, chain_log=6, search_log=1, min_match=7, strategy=zstandard.STRATEGY_FAST
)
_PER_THREAD = threading.local()


def encode(block: Bytes, dtype: str) -> list[Bytes]:
    """The bytes of a block's elements -> its stored form, in parts. dtype: one of `PLANES`."""
    planes = _split(block, dtype)
    stored = [_squeezed(plane) for plane in planes]
    lengths = np.array([part.size for part in stored], dtype="<u4").view(np.uint8)
    return [lengths, *stored]


def decode(stored: Bytes, numel: int, dtype: str, out: Bytes | None = None) -> Bytes:
    """A stored form -> the bytes of its `numel` elements, in `out` if given. Raises CheckpointError for a form that `encode` does not
    make."""
    sizes = [numel, numel, 2 * numel][: PLANES[dtype]]
    head = 4 * len(sizes)
    lengths = stored[:head].view("<u4").tolist() if stored.size >= head else []
    if head + sum(lengths) != stored.size or len(lengths) != len(sizes) or any(n > most for n, most in zip(lengths, sizes, strict=True)):
        raise CheckpointError("a block's planes do not have the lengths that it says; use another checkpoint")
    ends = np.cumsum([head, *lengths]).tolist()
    planes = [_spread(stored[a:b], size) for a, b, size in zip(ends, ends[1:], sizes, strict=False)]
    return _merge(planes, dtype, out)


def rounded(block: Bytes) -> Bytes:
    """The bytes of fp32 numbers -> those of the nearest bf16 numbers, ties to even: bits x become (x + 0x7fff + bit 16 of x) >> 16, modulo
    2^32. (It is a formula of bits, so that it is one on every machine; of a NaN it may make anything, which is compared like all else.)"""
    bits = block.view("<u4")
    result = bits >> 16
    result &= 1
    result += 0x7FFF
    result += bits
    return result.view("<u2")[1::2].copy().view(np.uint8)


def _split(block: Bytes, dtype: str) -> list[Bytes]:
    bits = block.view("<u4" if dtype == "float32" else "<u2")
    first = 16 if dtype == "float32" else 0

    def byte(shift: int) -> Bytes:
        plane = np.empty(bits.size, np.uint8)
        np.right_shift(bits, shift, out=plane, casting="unsafe")
        return plane

    exponents, mantissas, signs = byte(first + 7), byte(first), byte(first + 8)
    mantissas &= 0x7F
    signs &= 0x80
    mantissas |= signs
    return [exponents, mantissas, *([block.view("<u2")[::2].copy().view(np.uint8)] if first else [])]


def _merge(planes: list[Bytes], dtype: str, out: Bytes | None) -> Bytes:
    high, rest = planes[0].astype("<u2"), planes[1].astype("<u2")
    high <<= 7
    high |= rest & 0x7F
    rest &= 0x80
    rest <<= 8
    if dtype != "float32":
        words = np.empty(high.size, "<u2") if out is None else out.view("<u2")
        np.bitwise_or(high, rest, out=words)
        return words.view(np.uint8)
    words = np.empty(2 * high.size, "<u2") if out is None else out.view("<u2")
    np.bitwise_or(high, rest, out=words[1::2])
    words[::2] = planes[2].view("<u2")
    return words.view(np.uint8)


def _entropy(plane: Bytes) -> float:
    """Bits per byte of a sample."""
    sample = plane[:: max(plane.size // _SAMPLE, 1) | 1]  # an odd stride: both bytes of a word
    counts = np.bincount(sample)
    share = counts[counts > 0] / sample.size
    return -float(share @ np.log2(share))


def _squeezed(plane: Bytes) -> Bytes:
    if _entropy(plane) > _LARGEST_ENTROPY:
        return plane
    if not hasattr(_PER_THREAD, "compressor"):
        _PER_THREAD.compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
    frame: Bytes = np.frombuffer(_PER_THREAD.compressor.compress(plane), np.uint8)
    return frame if frame.size < math.floor(plane.size * (1 - _LEAST_GAIN)) else plane


def _spread(stored: Bytes, size: int) -> Bytes:
    if stored.size == size:
        return stored
    if not hasattr(_PER_THREAD, "decompressor"):
        _PER_THREAD.decompressor = zstandard.ZstdDecompressor()
    try:
        if zstandard.get_frame_parameters(stored.data).content_size != size:  # before memory is asked for
            raise CheckpointError("a block's plane says another size than its elements have; use another checkpoint")
        plane: Bytes = np.frombuffer(_PER_THREAD.decompressor.decompress(stored, allow_extra_data=False), np.uint8)
    except zstandard.ZstdError as error:
        raise CheckpointError(f"a block's plane is no zstd frame: {error}; use another checkpoint") from None
    if plane.size != size:
        raise CheckpointError("a block's plane has another size than its elements; use another checkpoint")
    return plane
