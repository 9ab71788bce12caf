"""Small states to save, and what they must come back as."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from quintet.checkpoint.manifest import ITEM_SIZE

DTYPES = [getattr(torch, name) for name in ITEM_SIZE]


def small_state(scale: float = 1.0) -> dict[str, Any]:
    """Two tensors and two values."""
    return {
        "layers.0.w": torch.arange(6, dtype=torch.float32).reshape(2, 3) * scale,
        "norm": torch.ones(4, dtype=torch.bfloat16) * scale,
        "steps": 7,
        "loader": {"epoch": 1, "seeds": [1, 2**64]},
    }


def blank(state: dict[str, Any]) -> dict[str, Any]:
    """The same names, shapes and dtypes, every byte of a tensor 1, nothing in the place of a value."""
    return {name: _filled(value) if isinstance(value, Tensor) else None for name, value in state.items()}


def _filled(like: Tensor) -> Tensor:
    size = like.numel() * like.dtype.itemsize
    return torch.ones(size, dtype=torch.uint8).view(like.dtype).reshape(like.shape) if size else torch.empty_like(like)


def same_bits(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and the same bytes, NaNs included."""
    left, right = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, two))
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(left, right)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Tensors of every dtype and of 0 to 4 dims, empty ones among them, with any bytes, contiguous or not."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    count = torch.Size(shape).numel() * dtype.itemsize
    bits = torch.frombuffer(bytearray(draw(st.binary(min_size=count, max_size=count))), dtype=torch.uint8) if count else torch.empty(0)
    if dtype == torch.bool:
        bits = bits % 2
    tensor = bits.to(torch.uint8).view(dtype).reshape(shape)
    if shape and draw(st.booleans()):
        tensor = tensor.transpose(0, -1)
    return tensor


def values() -> st.SearchStrategy[Any]:
    """Everything that JSON gives back as it was."""
    plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
    keys = st.text(max_size=5)
    return st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=6)
