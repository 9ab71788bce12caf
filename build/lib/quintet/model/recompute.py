"""Selective recomputation: what autograd would keep is replaced by a recipe that makes it again (V3 3.2.3).

While `recomputed` is open, any operation that saves one of the named tensors (or a view of it) for backward saves the recipe
instead; the first such operation in backward runs the recipe once for all of them. Unlike torch.utils.checkpoint this leaves
alone which operations consume the tensor, so a norm's output is dropped without running the products behind it twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class _View:
    recipe: _Recipe
    index: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Recipe:
    """Makes the tensors again at the first request; lives as long as a saved view of one of them."""

    def __init__(self, make: Callable[[], tuple[Tensor, ...]]) -> None:
        self.make = make
        self.made: tuple[Tensor, ...] | None = None

    def view(self, view: _View) -> Tensor:
        if self.made is None:
            with torch.enable_grad():  # the same (fused) functions as in forward, so the values are the same to the bit
                self.made = tuple(t.detach() for t in self.make())
        return self.made[view.index].as_strided(view.size, view.stride, view.offset)


@contextmanager
def recomputed(tensors: tuple[Tensor, ...], make: Callable[[], tuple[Tensor, ...]], *, active: bool) -> Iterator[None]:
    """Within the block, do not keep `tensors` for backward; `make()` returns equal ones of the same layout."""
    if not active or not torch.is_grad_enabled():
        yield
        return
    recipe = _Recipe(make)
    # Tensors without elements (an empty micro-batch) all lie at address 0: they cannot be told apart, and cost nothing to keep.
    index_of = {t.untyped_storage().data_ptr(): i for i, t in enumerate(tensors) if t.numel()}

    def pack(t: Tensor) -> Tensor | _View:
        index = index_of.get(t.untyped_storage().data_ptr())
        return t if index is None else _View(recipe, index, t.size(), t.stride(), int(t.storage_offset()))

    def unpack(saved: Tensor | _View) -> Tensor:
        return saved.recipe.view(saved) if isinstance(saved, _View) else saved

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
