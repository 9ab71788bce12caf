"""Who writes what: each box of each tensor is written by one of the ranks that hold it, so that all write about as many bytes.

The ranks tell each other what they hold once; every rank then computes the same plan. A tensor that is expected to be the rounding of
another (bf16 weights, of their fp32 master) is cut into the same boxes as that one and goes with it: who holds both compares them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quintet.checkpoint.agreement import Company
from quintet.checkpoint.manifest import ITEM_SIZE
from quintet.checkpoint.pieces import Box, Pieces, boxes_here, dtype_name, meet, tensors_of
from quintet.errors import CheckpointError


@dataclass(frozen=True)
class Item:
    """A box of a tensor, and the name of the tensor of which the same box is expected to be its rounding."""

    name: str
    box: Box
    twin: str | None = None


@dataclass(frozen=True)
class Whole:
    """What all ranks must agree on of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    rounded_from: str | None


@dataclass(frozen=True)
class Plan:
    """What this rank writes, in order, and every tensor of the checkpoint."""

    items: tuple[Item, ...]
    tensors: Mapping[str, Whole]


def make_plan(state: Mapping[str, Any], rounded: Mapping[str, str], company: Company) -> Plan:
    """The plan of a state; all ranks call it together. rounded: name of a bf16 tensor -> of the fp32 one that it rounds.

    Raises CheckpointError on all ranks where they disagree about a tensor.
    """
    told = company.share(lambda: (_wholes(state, rounded), held_items(state, rounded)))
    tensors: dict[str, Whole] = {}
    for rank, (wholes, _) in enumerate(told):
        for name, whole in wholes.items():
            if tensors.setdefault(name, whole) != whole:
                raise CheckpointError(f"tensor {name!r} is {whole} on rank {rank}, but {tensors[name]} on another; give all the same")
    mine = assign([items for _, items in told], {name: ITEM_SIZE[whole.dtype] for name, whole in tensors.items()})[company.rank]
    return Plan(tuple(mine), tensors)


def _wholes(state: Mapping[str, Any], rounded: Mapping[str, str]) -> dict[str, Whole]:
    # Of a tensor of which nothing is anywhere nothing is saved, except that it has no elements.
    return {
        name: Whole(dtype_name(value.dtype), tuple(value.shape), rounded.get(name))
        for name, value in tensors_of(state).items()
        if boxes_here(value) or (not isinstance(value, Pieces) and not math.prod(value.shape))
    }


def held_items(state: Mapping[str, Any], rounded: Mapping[str, str]) -> list[Item]:
    """What a rank could write."""
    tensors = tensors_of(state)
    twin_of = {source: name for name, source in rounded.items()}
    items: list[Item] = []
    for name, value in tensors.items():
        if name in rounded:
            continue
        for offsets, tensor in boxes_here(value).items():
            box = (offsets, tuple(tensor.shape))
            twin = twin_of.get(name)
            assert twin is None or _holds(tensors[twin], box), (name, twin, box)
            items.append(Item(name, box, twin))
    return items


def _holds(value: Any, box: Box) -> bool:
    return any(meet((offsets, tuple(tensor.shape)), box) == box for offsets, tensor in boxes_here(value).items())


def assign(held: Sequence[Sequence[Item]], item_sizes: Mapping[str, int]) -> list[list[Item]]:
    """What each rank writes of what each rank holds: every item once, the largest first to the holder that has least so far, in the order
    of the rank's own list."""
    holders: dict[Item, list[int]] = {}
    for rank, items in enumerate(held):
        for item in items:
            holders.setdefault(item, []).append(rank)
    load, chosen = [0] * len(held), [set[Item]() for _ in held]
    sizes = {item: math.prod(item.box[1]) * item_sizes[item.name] for item in holders}
    for item in sorted(holders, key=lambda item: (len(holders[item]) > 1, -sizes[item])):
        rank = min(holders[item], key=lambda rank: load[rank])
        load[rank] += sizes[item]
        chosen[rank].add(item)
    return [[item for item in items if item in mine] for items, mine in zip(held, chosen, strict=True)]
