"""A rank's part of a tensor whose whole is spread over ranks: boxes of the global tensor, for saving and for loading."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of a part of a tensor."""


class Pieces:
    """Boxes of a tensor of global `shape`: each has offsets and a tensor of its sizes, which loading fills in place."""

    def __init__(self, shape: Sequence[int], boxes: Sequence[tuple[tuple[int, ...], Tensor]], *, dtype: torch.dtype) -> None:
        self.shape, self.dtype = torch.Size(shape), dtype
        self.boxes = {offsets: tensor for offsets, tensor in boxes if tensor.numel()}


class Later:
    """A tensor that is not in memory: a box of it is made, or read, when it is written."""

    def __init__(self, shape: Sequence[int], *, dtype: torch.dtype, read: Callable[[Box], Tensor]) -> None:
        self.shape, self.dtype, self.read = torch.Size(shape), dtype, read


def box_at(index: Sequence[int], shape: Sequence[int]) -> Box:
    """The box that `tensor[index]` is of a tensor of `shape`."""
    rest = tuple(shape[len(index) :])
    return (*index, *(0 for _ in rest)), (*(1 for _ in index), *rest)


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def boxes_here(value: Tensor | Pieces) -> Mapping[tuple[int, ...], Tensor]:
    """What is here of a tensor, by offsets: a plain tensor is one box."""
    if isinstance(value, Pieces):
        return value.boxes
    return {(0,) * value.ndim: value} if value.numel() else {}


def tensors_of(state: Mapping[str, Any]) -> dict[str, Tensor | Pieces]:
    """What of a state is no plain value."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor | Pieces)}


def values_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """What of a state is a plain value."""
    return {name: value for name, value in state.items() if not isinstance(value, Tensor | Pieces)}


def meet(one: Box, two: Box) -> Box | None:
    """The box that two boxes of one tensor share, or None."""
    begins = tuple(map(max, one[0], two[0]))
    sizes = tuple(min(a + n, b + m) - begin for a, n, b, m, begin in zip(*one, *two, begins, strict=True))
    return (begins, sizes) if all(size > 0 for size in sizes) else None


def within(box: Box, offsets: tuple[int, ...], tensor: Tensor) -> Tensor:
    """The view of a box, in the coordinates of the whole, of a tensor that begins at `offsets`."""
    return tensor[tuple(slice(a - begin, a - begin + size) for a, size, begin in zip(*box, offsets, strict=True))]


def run_of_boxes(shape: Sequence[int], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The elements `begin` to `end` of a tensor, row by row, as boxes (offsets, sizes) in the same order: at most 2 dims - 1 of them."""
    if not shape:
        if begin < end:
            yield (), ()
        return
    row = math.prod(shape[1:])
    if begin >= end or not row:
        return
    first, last = -(-begin // row), end // row  # whole rows
    if first > last:  # within one row
        yield from _in_row(shape, begin // row, begin % row, begin % row + end - begin)
        return
    yield from _in_row(shape, first - 1, begin % row, row) if begin % row else ()
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _in_row(shape, last, 0, end % row)


def _in_row(shape: Sequence[int], row: int, begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    return (((row, *offsets), (1, *sizes)) for offsets, sizes in run_of_boxes(shape[1:], begin, end))
