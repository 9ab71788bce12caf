"""Runs of a tensor's elements as boxes, and pieces of tensors whose parts lie anywhere."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quintet.checkpoint.load import load, read_manifest
from quintet.checkpoint.pieces import Pieces, run_of_boxes
from quintet.checkpoint.save import save
from quintet.errors import CheckpointError

SHAPES = st.lists(st.integers(1, 4), max_size=4).map(tuple)


@st.composite
def runs(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    """A shape, and the begin and end of some of its elements, row by row."""
    shape = draw(SHAPES)
    begin, end = sorted(draw(st.tuples(*[st.integers(0, math.prod(shape))] * 2)))
    return shape, begin, end


@given(runs())
def test_boxes_hold_the_elements_of_a_run_in_their_order_and_no_others(run: tuple[tuple[int, ...], int, int]) -> None:
    shape, begin, end = run
    numbers = torch.arange(math.prod(shape)).view(shape)
    found: list[int] = []
    boxes = list(run_of_boxes(shape, begin, end))
    for offsets, sizes in boxes:
        assert len(offsets) == len(sizes) == len(shape) and all(sizes)
        found += numbers[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))].flatten().tolist()
    assert found == list(range(begin, end))
    assert len(boxes) <= max(2 * len(shape) - 1, 1)


def test_a_run_by_hand() -> None:
    """Of 4 rows of 3: the last of row 0, rows 1 and 2 whole, the first two of row 3."""
    assert list(run_of_boxes((4, 3), 2, 11)) == [((0, 2), (1, 1)), ((1, 0), (2, 3)), ((3, 0), (1, 2))]
    assert list(run_of_boxes((4, 3), 4, 5)) == [((1, 1), (1, 1))]
    assert list(run_of_boxes((4, 3), 5, 5)) == []
    assert list(run_of_boxes((), 0, 1)) == [((), ())]


def cut(tensor: torch.Tensor, borders: list[int]) -> Pieces:
    """All of a tensor in boxes that end at the borders."""
    boxes = []
    for begin, end in zip([0, *borders], [*borders, tensor.numel()], strict=True):
        for offsets, sizes in run_of_boxes(tensor.shape, begin, end):
            place = tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))
            boxes.append((offsets, tensor[place].clone()))
    return Pieces(tensor.shape, boxes, dtype=tensor.dtype)


def test_pieces_of_one_cut_fill_those_of_another(tmp_path: Path) -> None:
    whole = torch.randn(5, 3, 2)
    save({"w": cut(whole, [1, 7, 20]), "v": whole[0]}, tmp_path, step=1)
    target = cut(torch.zeros(5, 3, 2), [2, 3, 28])
    load({"w": target, "v": torch.zeros(3, 2)}, tmp_path / "step-00000001")
    plain = torch.zeros(5, 3, 2)
    load({"w": plain, "v": cut(torch.zeros(3, 2), [5])}, tmp_path / "step-00000001")
    assert torch.equal(plain, whole)
    for offsets, tensor in target.boxes.items():
        place = tuple(slice(a, a + n) for a, n in zip(offsets, tensor.shape, strict=True))
        assert torch.equal(tensor, whole[place])


def test_pieces_of_another_shape_or_dtype_are_refused(tmp_path: Path) -> None:
    save({"w": cut(torch.zeros(4, 3), [5])}, tmp_path, step=1)
    for other in (torch.zeros(3, 4), torch.zeros(4, 3, dtype=torch.bfloat16)):
        with pytest.raises(CheckpointError, match="another shape or dtype: w"):
            load({"w": cut(other, [5])}, tmp_path / "step-00000001")


def test_a_tensor_of_which_nothing_is_here_writes_and_reads_nothing(tmp_path: Path) -> None:
    save({"w": torch.ones(2), "none": Pieces((0, 3), [], dtype=torch.float32)}, tmp_path, step=1)
    saved = read_manifest(tmp_path / "step-00000001").tensors
    assert saved["w"].pieces and "none" not in saved
    target = Pieces((2,), [], dtype=torch.float32)
    load({"w": target}, tmp_path / "step-00000001")
    assert target.boxes == {}
