"""A rank's part of a tensor whose whole is spread over ranks: boxes of the global tensor, for saving and for loading.

DCP's planners ask such an object for what it writes and what it wants (the protocol of torch.distributed._checkpointable); boxes that
several ranks hold are written once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class Pieces:
    """Boxes of a tensor of global `shape`: each has offsets and a tensor of its sizes, which loading fills in place."""

    def __init__(self, shape: Sequence[int], boxes: Sequence[tuple[tuple[int, ...], Tensor]], *, dtype: torch.dtype) -> None:
        self.shape, self.dtype = torch.Size(shape), dtype
        self.boxes = {offsets: tensor for offsets, tensor in boxes if tensor.numel()}

    def __create_write_items__(self, fqn: str, object: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=tensor.shape),
                    properties=TensorProperties(dtype=self.dtype),
                    size=self.shape,
                ),
            )
            for offsets, tensor in self.boxes.items()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=tensor.shape) for offsets, tensor in self.boxes.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.boxes[tuple(index.offset)]


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
