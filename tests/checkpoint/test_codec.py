"""Coding loses no bit: every bf16 there is, the strangest fp32, random bytes; what does not shrink is left as it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from quintet.checkpoint.codec import Bytes, decode, encode, rounded
from quintet.checkpoint.manifest import BLOCK, PLANES
from quintet.errors import CheckpointError


def stored(block: Bytes, dtype: str) -> Bytes:
    return np.concatenate(encode(block, dtype))


def comes_back(block: Bytes, dtype: str) -> bool:
    size = {"float32": 4, "bfloat16": 2}[dtype]
    return bool(np.array_equal(decode(stored(block, dtype), block.size // size, dtype), block))


def test_every_bf16_comes_back() -> None:
    everything = np.arange(1 << 16, dtype="<u2")
    assert comes_back(everything.view(np.uint8), "bfloat16")
    assert comes_back(np.random.default_rng(0).permutation(everything).view(np.uint8), "bfloat16")


def test_every_sign_and_exponent_of_fp32_with_zero_denormal_infinite_and_nan_payloads_comes_back() -> None:
    heads = np.arange(1 << 16, dtype="<u4") << 16
    tails = np.array([0, 1, 0x7FFF, 0x8000, 0xFFFF], "<u4")
    everything = (heads[:, None] | tails).reshape(-1)
    for block in np.array_split(everything, -(-everything.size // BLOCK)):
        assert comes_back(block.view(np.uint8), "float32")


@given(st.sampled_from(sorted(PLANES)), st.integers(1, 600), st.randoms(use_true_random=False), st.sampled_from([1, 2, 256]))
def test_any_bytes_come_back(dtype: str, numel: int, chance: object, kinds: int) -> None:
    size = {"float32": 4, "bfloat16": 2}[dtype]
    block = np.array([chance.randrange(kinds) for _ in range(numel * size)], np.uint8)  # type: ignore[attr-defined]
    assert comes_back(block, dtype)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 0.84), (torch.bfloat16, 0.69)])
def test_normal_numbers_shrink_by_their_exponents(dtype: torch.dtype, most: float, generator: torch.Generator) -> None:
    block = torch.randn(BLOCK, generator=generator).mul(0.02).to(dtype).view(torch.uint8).numpy()
    assert stored(block, str(dtype).removeprefix("torch.")).size < most * block.size


def test_zeros_shrink_to_nothing_and_noise_is_left_as_it_is() -> None:
    assert stored(np.zeros(4 * BLOCK, np.uint8), "float32").size < 200
    noise = np.frombuffer(np.random.default_rng(0).bytes(4 * BLOCK), np.uint8)
    assert stored(noise, "float32").size == noise.size + 12
    assert comes_back(noise, "float32")


def test_rounding_is_torchs_and_keeps_signs_of_zero_and_infinity(generator: torch.Generator) -> None:
    bits = torch.randint(-(2**31), 2**31, (BLOCK,), generator=generator, dtype=torch.int64).to(torch.int32)
    values = torch.cat((bits.view(torch.float32), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-45, -1e-45, 3.4e38])))
    values = values[~values.isnan()]
    expected = values.bfloat16().view(torch.uint8).numpy()
    assert np.array_equal(rounded(values.view(torch.uint8).numpy()), expected)


def test_rounding_by_hand() -> None:
    """Ties go to the even neighbour: 1 + 2^-8 lies between 1 and 1 + 2^-7, 1 + 3 * 2^-8 between 1 + 2^-7 and 1 + 2^-6."""
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20], "<f4")
    assert rounded(values.view(np.uint8)).view("<u2").tolist() == [0x3F80, 0x3F80, 0x3F82, 0x3F81]


def frame(size: int) -> Bytes:
    return np.frombuffer(zstandard.ZstdCompressor().compress(bytes(size)), np.uint8)


def form(*planes: Bytes) -> Bytes:
    return np.concatenate([np.array([plane.size for plane in planes], "<u4").view(np.uint8), *planes])


RAW = np.zeros(1000, np.uint8)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (RAW[:3], "planes do not have the lengths"),
        (form(RAW, RAW)[:-1], "planes do not have the lengths"),
        (form(RAW, RAW, RAW), "planes do not have the lengths"),
        (form(RAW, np.zeros(1001, np.uint8)), "planes do not have the lengths"),
        (form(RAW, RAW[:50]), "no zstd frame"),
        (form(RAW, frame(999)), "says another size"),
        (form(RAW, frame(1 << 30)[:900]), "says another size"),  # a bomb: no memory is asked for
        (form(RAW, frame(1000)[:-1]), "no zstd frame"),
        (form(RAW, np.concatenate((frame(1000), frame(1000)))), "no zstd frame"),
    ],
)
def test_a_form_that_was_made_to_deceive_is_refused(block: Bytes, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        decode(block, 1000, "bfloat16")
