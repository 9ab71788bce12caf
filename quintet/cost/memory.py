"""Bytes of one training step on a rank of a layout, part by part, from the spec; by default on a single device.

Per weight of a rank (its part by `spec.placement`, MTP included), of which one in s is in its ZeRO shard:

    ZeRO    weights  gradients  master  moments                 with weights in fp32
    0         2         4         4       8                     4, 4, -, 8: the weights are their own master
    1         2         4        4/s     8/s                    whole gradients add up over micro-batches
    2         2        4/s       4/s     8/s                    besides whole gradients of the buckets that are on their way
    3        2/s       4/s       4/s     8/s                    besides whole weights and gradients of the layers at work

with moments of 4 bytes; bf16 moments take half. What activations are kept: `cost.activations`. The loss turns its logits into the gradients
of hidden states (counted as activations) and head at once, chunk by chunk.

An estimate: the allocator's rounding, temporaries inside an operation and the working gradients of a single layer are left out, and
activations are those of one micro-batch; in a pipeline, of as many as the schedule keeps at one time, with what it keeps for weight
gradients that it puts off.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

from quintet.cost.activations import (
    FP32,
    Device,
    block_bytes,
    element_bytes,
    outside_bytes,
    put_off_bytes,
    put_off_outside_bytes,
    tokens_of,
)
from quintet.cost.balance import part_at
from quintet.cost.pipeline import kept_schedule, named_schedule
from quintet.cost.ring_comm import ring_payload, ring_width
from quintet.cost.shard import held, num_shards
from quintet.cost.zero_comm import bucket_sizes, parts_in_backward
from quintet.schedule import Schedule, fewest_microbatches
from quintet.schedule.held import peak
from quintet.schedule.op import Work
from quintet.spec.layout import Layout
from quintet.spec.model import Model
from quintet.spec.run import Precision, Train

IN_FLIGHT = 2
"""Reductions that ZeRO has under way at one time: that of `parallel.zero`, which needs torch."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes by part at the peak of a training step."""

    weights: int
    """Weights that compute; with ZeRO 3 this rank's shard of them."""
    gradients: int
    """Accumulated gradients, fp32."""
    master_weights: int
    """fp32 copy of bf16 weights; 0 if the weights are fp32."""
    moments: int
    """Both AdamW moments."""
    gathered: int
    """ZeRO 2 and 3: whole gradients of a few buckets; ZeRO 3: whole weights of what is at work, and of embedding and head; on a CPU also
    what gloo's messages take. As far as they do not take the place of logits, and of activations of layers that backward has left."""
    activations: int
    """What a micro-batch keeps from forward for backward; in a pipeline, what the most of them keep at one time."""
    recomputation: int
    """What the largest layer holds besides while backward computes it again; 0 without recompute."""
    logits: int
    """One chunk's logits and their gradient, and the head's gradient that the chunks add up to: fp32, then one per loss."""
    messages: int
    """The largest message and its copy, where tokens, rows or payloads travel."""

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(getattr(self, field.name) for field in fields(self))


def step_memory(
    model: Model,
    train: Train,
    *,
    sequence_length: int,
    device: Device = "cpu",
    layout: Layout | None = None,
    place: int = 0,
    moments: Precision = "fp32",
    num_microbatches: int | None = None,
    schedule: Schedule | None = None,
) -> Memory:
    """Bytes of a step with micro-batches of `train.micro_batch` sequences of `sequence_length` tokens, on each rank at place `place` of
    the pipeline of a legal `layout` (default: one device); `moments` is the type that the optimizer keeps them in. `num_microbatches` of
    a step (default: 2 pp) matter to a pipeline, and beyond 2 pp to gpipe alone; `schedule` is what it goes by if not the layout's own."""
    layout = layout or Layout()
    part, size, weights = part_at(model, layout, place), element_bytes(train), held(model, layout, place=place)
    whole, shard = sum(weights.total.values()), _shard_of([weights.total], layout)
    modules = model.num_mtp_modules if part.last else 0
    num_dense = sum(layer < model.num_dense_layers for layer in part.layers)
    num_blocks = {False: num_dense, True: len(part.layers) - num_dense + modules}

    def block(moe: bool, policy: Train) -> int:
        return block_bytes(model, policy, layout, moe=moe, sequence_length=sequence_length, device=device)

    recomputed = (block(moe, replace(train, recompute="none")) - block(moe, train) for moe, num in num_blocks.items() if num)
    outside = outside_bytes(model, train, layout, sequence_length=sequence_length, losses=part.last * (1 + modules), modules=modules)
    logits = logits_bytes(model, train, layout, sequence_length=sequence_length, modules=modules) if part.last else 0
    blocks = {f"layers.{layer}": block(layer >= model.num_dense_layers, train) for layer in part.layers}
    blocks |= {f"mtp.{module}": block(True, train) for module in range(modules)}
    activations = sum(blocks.values()) + outside
    if layout.pp > 1:
        stages = stage_bytes(model, train, layout, place=place, sequence_length=sequence_length, device=device)
        activations = stages.most((schedule or _short(layout, num_microbatches or 2 * layout.pp)).table[place])
    return Memory(
        weights=size * (shard if layout.zero == 3 else whole),
        gradients=FP32 * (shard if layout.zero >= 2 else whole),
        master_weights=FP32 * shard if size < FP32 else 0,
        moments=2 * (2 if moments == "bf16" else FP32) * shard,
        gathered=_gathered(model, layout, blocks, outside + logits, size=size, place=place, copied=device == "cpu"),
        activations=activations,
        recomputation=max(recomputed, default=0),
        logits=logits,
        messages=message_bytes(model, train, layout, sequence_length=sequence_length),
    )


def largest_rank(
    model: Model,
    train: Train,
    *,
    sequence_length: int,
    device: Device = "cpu",
    layout: Layout,
    moments: Precision = "fp32",
    num_microbatches: int | None = None,
) -> Memory:
    """The `step_memory` of the pipeline stage that needs most."""
    stages = (
        step_memory(
            model,
            train,
            sequence_length=sequence_length,
            device=device,
            layout=layout,
            place=place,
            moments=moments,
            num_microbatches=num_microbatches,
        )
        for place in range(layout.pp)
    )
    return max(stages, key=lambda memory: memory.total)


@dataclass(frozen=True, kw_only=True)
class StageBytes:
    """What a micro-batch keeps in the stages of a rank of a pipeline, by their numbers."""

    kept: dict[int, int]
    """From a stage's forward to its backward, or to the gradient of its input."""
    put_off: dict[int, int]
    """From there to the weight gradients, if they are put off."""

    def most(self, row: Sequence[Work]) -> int:
        """Bytes that are kept at once, at most, by a rank's row."""
        return int(peak(row, kept=self.kept, put_off=self.put_off))


def stage_bytes(model: Model, train: Train, layout: Layout, *, place: int, sequence_length: int, device: Device = "cpu") -> StageBytes:
    """Of the ranks at `place`. What is outside of layers counts with the last stage, with its MTP modules."""
    kept, put_off = {}, {}
    for number, stage in zip(layout.stages_at(place), part_at(model, layout, place).stages, strict=True):
        modules = model.num_mtp_modules if stage.last else 0
        num_dense = sum(layer < model.num_dense_layers for layer in stage.layers)
        counted = {False: num_dense, True: len(stage.layers) - num_dense + modules}
        shape = {"sequence_length": sequence_length}
        kept[number] = sum(n * block_bytes(model, train, layout, moe=moe, device=device, **shape) for moe, n in counted.items() if n)
        kept[number] += outside_bytes(model, train, layout, losses=stage.last * (1 + modules), modules=modules, **shape)
        put_off[number] = sum(n * put_off_bytes(model, train, layout, moe=moe, **shape) for moe, n in counted.items() if n)
        put_off[number] += put_off_outside_bytes(model, train, layout, modules=modules, **shape)
    return StageBytes(kept=kept, put_off=put_off)


def _short(layout: Layout, num_microbatches: int) -> Schedule:
    """The layout's schedule; a shorter one that keeps as much, where there is one: beyond 2 pp only gpipe keeps more."""
    kept = kept_schedule(layout, num_microbatches)
    if kept is not None:
        return kept
    if layout.pipeline == "gpipe":
        return named_schedule(layout, num_microbatches)
    count = max(min(num_microbatches, 2 * layout.pp), fewest_microbatches(layout.schedule_for(num_microbatches), layout.pp))
    return named_schedule(layout, count)


def _shard_of(counts: Iterable[Counter[str]], layout: Layout) -> int:
    """Elements of a rank's ZeRO shard of weights by holders, the padding of its buckets left out."""
    return sum(-(-count // num_shards(layout, holders)) for some in counts for holders, count in some.items())


def _gathered(model: Model, layout: Layout, blocks: dict[str, int], outside: int, *, size: int, place: int, copied: bool) -> int:
    """Bytes of whole weights and gradients beside a rank's shards, at the moment in which all is largest: the loss, when all activations
    (`blocks` and those `outside`) are there, or some part's backward, when the later ones' are gone.

    In a part's backward there are the whole gradients of buckets that have begun to fill, and those under way; at stage 3 the weights of
    that part, of the next one, and of all outside of layers. gloo takes as much again for all that is under way (`copied`).
    """
    if not layout.zero:
        return 0
    order, by_unit = parts_in_backward(model, layout, place=place), layout.zero == 3
    number, times = {part: i for i, part in enumerate(order)}, 2 if copied else 1
    buckets = [bucket for bucket in bucket_sizes(model, layout, place=place) if num_shards(layout, bucket.holders) > 1]
    weights = [sum(b.numel for b in buckets if by_unit and b.last == part and not b.root) for part in order]
    root = size * sum(bucket.numel for bucket in buckets if by_unit and bucket.root)
    # MTP modules look tokens up again: the embedding's gradient from there waits for the one from its first use.
    waits = size * model.vocab_size // layout.tp * model.hidden_size if any(part.startswith("mtp.") for part in blocks) else 0

    def whole(i: int) -> int:
        """Bytes in the backward of part i."""
        begun = [b for b in buckets if (b.root and by_unit) or number[b.first] <= i]
        full = list(itertools.takewhile(lambda b: number[b.last] < i, buckets))  # reductions start in this order
        flying, kept = sum(b.numel for b in full[-IN_FLIGHT:]), sum(b.numel for b in begun if b not in full)
        gradients = kept + times * flying if layout.zero >= 2 else (times - 1) * flying
        return FP32 * gradients + root + size * (weights[i] + times * sum(weights[i + 1 : i + 2])) + waits

    largest, gone = root, 0
    for i, part in enumerate(order):
        if part == "norm":  # behind the head, and MTP modules before it, nothing is left of the losses
            gone += outside
        largest = max(largest, whole(i) - gone)
        gone += blocks.get(part, 0)
    return largest


def logits_bytes(model: Model, train: Train, layout: Layout, *, sequence_length: int, modules: int) -> int:
    """Bytes of the loss."""
    size, rows = element_bytes(train), model.vocab_size // layout.tp
    chunk = 2 * size * min(train.loss_chunk, tokens_of(train, layout, sequence_length)) * rows
    return chunk + (FP32 + size * modules) * rows * model.hidden_size


def message_bytes(model: Model, train: Train, layout: Layout, *, sequence_length: int) -> int:
    """Bytes of the largest message that a rank has in hand, and of what it was made from or becomes."""
    size, tokens = element_bytes(train), tokens_of(train, layout, sequence_length)
    gathered = tokens * model.hidden_size if layout.tp > 1 else 0
    sent = tokens // (1 if layout.expert_tp > 1 else layout.tp) * model.num_experts_per_token if layout.ep > 1 else 0
    passed = 0
    if layout.cp > 1:
        own = sequence_length // layout.cp
        payload = ring_payload(model, tokens_per_rank=own, cp=layout.cp, tp=layout.tp, element_bytes=size)
        passed = 2 * tokens * ring_width(model, tp=layout.tp, payload=payload)
    return size * max(gathered, 2 * sent * model.hidden_size, passed)
