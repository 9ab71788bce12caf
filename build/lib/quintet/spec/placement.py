"""Which dim of a parameter lies on which axis: the one table that tensor parallelism, ZeRO, checkpoints and the memory formulas read.

An axis that is not named replicates the parameter: every rank along it holds the same values, and its gradient is the sum over them.

Attention splits by heads: `wq_b` and `wkv_b` (or `wq`) by rows, which stand head by head, and `wo` by columns. The latent
down-projections `wq_a` and `wkv_a` are replicated over tp and work on this rank's share of the tokens: what ranks then exchange are the
latents, 1,536 + 512 + 64 values per token at V3's shape instead of the 7,168 of the hidden state, and no product is done twice. Norms
and routers stand on the same shares of the tokens. Feed-forwards split their inner width; embedding and head split the vocabulary.
Routed experts lie whole on the ranks of ep; with expert_tp each is split like a dense feed-forward too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from quintet.spec.layout import Layout
from quintet.spec.model import Model
from quintet.spec.stage import embedding_at_both_ends

Axis = Literal["tp", "ep", "expert_tp"]

_TABLE: tuple[tuple[str, Mapping[Axis, int]], ...] = (
    (r"(embed|head)\.weight", {"tp": 0}),
    (r".*\.attention\.(wq|wq_b|wkv_b)\.weight", {"tp": 0}),
    (r".*\.attention\.wo\.weight", {"tp": 1}),
    (r".*\.experts\.(w13|w2)", {"ep": 0, "expert_tp": 2}),
    (r".*\.(ffn|shared)\.w13", {"tp": 1}),
    (r".*\.(ffn|shared)\.w2", {"tp": 1}),
)
"""Regular expression of a parameter's whole name -> the dims that are split. The first that matches counts."""


def placement(name: str) -> Mapping[Axis, int]:
    """The dim that each axis splits of the parameter `name`, as it is called in the model; no axis: replicated."""
    return next((axes for pattern, axes in _TABLE if re.fullmatch(pattern, name)), {})


def is_expert(name: str) -> bool:
    """Whether the parameter belongs to routed experts, which have replicas of their own."""
    return "ep" in placement(name)


def holders(name: str, layout: Layout, model: Model) -> str:
    """Which of `spec.layout.HOLDERS` hold the same values of a parameter."""
    if name == "embed.weight" and layout.pp > 1 and embedding_at_both_ends(model):
        return "both_ends"
    split = {axis for axis in placement(name) if layout.degree(axis) > 1}
    if "ep" in split:
        return "expert_split" if "expert_tp" in split else "expert"
    return "tp_split" if split else "replicated"


@dataclass(frozen=True)
class Box:
    """A part of a tensor of `shape`: it begins at `offsets` and has `sizes`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, ...]


def whole(shape: tuple[int, ...]) -> Box:
    """All of a tensor."""
    return Box((0,) * len(shape), shape, shape)


def local_box(name: str, shape: tuple[int, ...], layout: Layout, rank: int) -> Box:
    """The part of the parameter `name` of global `shape` that `rank` holds (before ZeRO shards it)."""
    at = layout.coordinates(rank)
    offsets, sizes = [0] * len(shape), list(shape)
    for axis, dim in placement(name).items():
        degree = layout.degree(axis)
        assert sizes[dim] % degree == 0, (name, shape, axis, degree)  # a rule of spec.layout
        sizes[dim] //= degree
        offsets[dim] += at.along(axis) * sizes[dim]
    return Box(tuple(offsets), tuple(sizes), shape)
