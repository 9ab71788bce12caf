"""Bytes that a rank sends for ZeRO, from the spec: of gradients that are summed and weights that are gathered, bucket by bucket.

A bucket of n padded elements, whose weights have s shards and r replicas of each shard, costs per step and rank (m micro-batches, w bytes
of a weight; gradients are 4 bytes):

    stage   gradients, on .shard         on .replicate                   weights, on .shard
      0                                  2 (r-1)/r 4 n
      1     (s-1)/s 4 n                  2 (r-1)/r 4 n/s                  (s-1)/s w n
      2     m (s-1)/s 4 n                2 (r-1)/r 4 n/s                  (s-1)/s w n
      3     m (s-1)/s 4 n                2 (r-1)/r 4 n/s                  2 m (s-1)/s w n, once for embedding, last norms and head

Weights are gathered twice per micro-batch at stage 3, for forward and for backward, which recomputation shares.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from quintet.cost.balance import part_at
from quintet.cost.shard import bucket_numel, num_holders, num_shards
from quintet.cost.tensor_comm import FP32
from quintet.spec.layout import Layout
from quintet.spec.model import Model
from quintet.spec.placement import holders, local_box

ALIGNMENT = 64
"""Elements that the place of every parameter in its bucket is a multiple of; `parallel` has the same, and needs torch."""

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class BucketSize:
    """What must be known of a bucket to count its messages."""

    holders: str
    """The name in `spec.layout.HOLDERS` of the ranks that hold the same values."""
    numel: int
    """Elements, padding included."""
    mtp: bool
    """Whether it belongs to MTP modules."""
    root: bool
    """At stage 3: whether its weights stay whole through a step, as those outside of layers do."""
    first: str
    """The part of the model whose gradients are the first to come into it: `layers.3`, `mtp.0`, `embed`, `norm`, `head`."""
    last: str
    """The part whose gradients fill it."""


def bucket_sizes(model: Model, layout: Layout, *, closed_at: int | None = None, place: int | None = None) -> list[BucketSize]:
    """The buckets of every rank (at a place of the pipeline), in the order in which backward fills them; below ZeRO's stage 3 `closed_at`
    so many elements (see `cost.shard.bucket_numel`)."""
    open_buckets: dict[tuple[str, bool], list[tuple[str, int]]] = {}
    closed: list[BucketSize] = []
    by_unit = layout.zero == 3

    def close(key: tuple[str, bool], *, root: bool) -> None:
        (kind, mtp), held = key, open_buckets.pop(key)
        padded = sum(_up(numel, ALIGNMENT) for _, numel in held)
        numel = _up(padded, num_shards(layout, kind) * ALIGNMENT)
        first, last = part_of(held[0][0]), part_of(held[-1][0])
        closed.append(BucketSize(holders=kind, numel=numel, mtp=mtp, root=root, first=first, last=last))

    backward = _backward(model, layout, place)
    closed_at = closed_at or bucket_numel(sum(numel for _, numel in backward))
    if by_unit:
        backward.sort(key=lambda parameter: _unit(parameter[0], by_unit=True) == "root")
    for unit, parameters in itertools.groupby(backward, lambda parameter: _unit(parameter[0], by_unit=by_unit)):
        for name, numel in parameters:
            open_buckets.setdefault((holders(name, layout, model), name.startswith("mtp.")), []).append((name, numel))
        for key, held in list(open_buckets.items()):
            if by_unit or sum(numel for _, numel in held) >= closed_at:
                close(key, root=unit == "root")
    for key in list(open_buckets):
        close(key, root=True)
    return closed


def parts_in_backward(model: Model, layout: Layout, *, place: int | None = None) -> list[str]:
    """The parts of the model (at a place of the pipeline) in the order in which backward reaches them."""
    return list(dict.fromkeys(part_of(name) for name, _ in _backward(model, layout, place)))


def part_of(name: str) -> str:
    """The part of the model that a weight belongs to."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] in ("layers", "mtp") else parts[0]


def _backward(model: Model, layout: Layout, place: int | None) -> list[tuple[str, int]]:
    """Every weight of a rank, the last one first: its name and its elements there."""
    part = None if place is None else part_at(model, layout, place)
    held = [(name, shape) for name, shape in _parameters(model) if part is None or part.holds(name)]
    return [(name, math.prod(local_box(name, shape, layout, 0).sizes)) for name, shape in held[::-1]]


def gradient_bytes(buckets: list[BucketSize], layout: Layout, *, micro_batches: int) -> Counter[str]:
    """Axis -> bytes of gradients that a rank sends in a step."""
    sent: Counter[str] = Counter()
    for bucket in buckets:
        shards, replicas = num_shards(layout, bucket.holders), num_replicas(layout, bucket.holders)
        times = micro_batches if layout.zero >= 2 else 1
        sent[f"{bucket.holders}.shard"] += times * FP32 * bucket.numel * (shards - 1) // shards
        sent[f"{bucket.holders}.replicate"] += 2 * FP32 * (bucket.numel // shards) * (replicas - 1) // replicas
    return sent


def weight_bytes(buckets: list[BucketSize], layout: Layout, *, micro_batches: int, element_bytes: int) -> Counter[str]:
    """Axis -> bytes of weights that a rank sends in a step."""
    sent: Counter[str] = Counter()
    for bucket in buckets:
        shards = num_shards(layout, bucket.holders)
        times = 2 * micro_batches if layout.zero == 3 and not bucket.root else 1
        sent[f"{bucket.holders}.shard"] += times * element_bytes * (bucket.numel // shards) * (shards - 1)
    return sent


def num_replicas(layout: Layout, holders: str) -> int:
    """Ranks whose shards of a weight with these holders are equal: the size of the group `holders`.replicate."""
    return num_holders(layout, holders) // num_shards(layout, holders)


def _unit(name: str, *, by_unit: bool) -> str:
    """A layer, an MTP module or a part outside of them; at stage 3 (`by_unit`) all that lies outside stays whole together."""
    parts = name.split(".")
    layered = parts[0] in ("layers", "mtp") and parts[2] != "norm"
    return part_of(name) if layered else "root" if by_unit else parts[0]


def _up(count: int, step: int) -> int:
    return -(-count // step) * step


def _parameters(model: Model) -> Iterator[tuple[str, Shape]]:
    """Every weight's name and shape, in the order in which the model has them."""
    width = model.hidden_size
    yield "embed.weight", (model.vocab_size, width)
    for layer in range(model.num_layers):
        yield from _block(model, f"layers.{layer}", moe=layer >= model.num_dense_layers)
    yield "norm.weight", (width,)
    if not model.tie_embeddings:
        yield "head.weight", (model.vocab_size, width)
    for module in range(model.num_mtp_modules):
        yield f"mtp.{module}.embed_norm.weight", (width,)
        yield f"mtp.{module}.hidden_norm.weight", (width,)
        yield f"mtp.{module}.eh_proj.weight", (width, 2 * width)
        yield from _block(model, f"mtp.{module}.block", moe=True)
        yield f"mtp.{module}.norm.weight", (width,)


def _block(model: Model, prefix: str, *, moe: bool) -> Iterator[tuple[str, Shape]]:
    width, query, latent, heads = model.hidden_size, model.q_lora_rank, model.kv_lora_rank, model.num_heads
    found: dict[str, Shape] = {"attention_norm.weight": (width,)}
    if query is None:
        found["attention.wq.weight"] = (heads * model.qk_head_dim, width)
    else:
        found["attention.wq_a.weight"], found["attention.q_norm.weight"] = (query, width), (query,)
        found["attention.wq_b.weight"] = (heads * model.qk_head_dim, query)
    found["attention.wkv_a.weight"] = (latent + model.qk_rope_head_dim, width)
    found["attention.kv_norm.weight"] = (latent,)
    found["attention.wkv_b.weight"] = (heads * (model.qk_nope_head_dim + model.v_head_dim), latent)
    found["attention.wo.weight"] = (width, heads * model.v_head_dim)
    found["ffn_norm.weight"] = (width,)
    if moe:
        experts, inner = model.num_routed_experts, model.expert_ffn_size
        found["ffn.router.weight"] = (experts, width)
        found["ffn.experts.w13"], found["ffn.experts.w2"] = (experts, 2, inner, width), (experts, width, inner)
        if shared := model.num_shared_experts * inner:
            found["ffn.shared.w13"], found["ffn.shared.w2"] = (2, shared, width), (width, shared)
    else:
        found["ffn.w13"], found["ffn.w2"] = (2, model.dense_ffn_size, width), (width, model.dense_ffn_size)
    return ((f"{prefix}.{name}", shape) for name, shape in found.items())
