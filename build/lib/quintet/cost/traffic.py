"""Bytes that a rank sends in one optimizer step along each axis of the mesh, from the spec.

    tp, sequence            `cost.tensor_comm`    tokens between split products; the experts' counts
    ep (tp: expert_tp)      `cost.expert_comm`    rows to their experts and back
    cp                      `cost.ring_comm`      the ring of attention
    pp                      here                  activations and their gradients, between stages of the pipeline
    .shard, .replicate      `cost.zero_comm`      gradients and weights, by the ranks that hold the same ones
    dp                      here                  how many targets the step has, per depth of prediction
    world                   here                  the losses, the gradient's norm and every expert's load, in one message

They are those that the bandwidth-optimal algorithm of each collective sends, as `parallel.collectives` counts them. A backend may send
more; `benchmarks/traffic.py` measures how much more gloo does.

**Pipelines.** A stage hands [B, s, D] of its ranks' tokens on, forward and backward, once for each micro-batch; between stages of one
rank nothing is sent. So a rank sends as often as the schedule has ops whose result another rank needs, and every axis counts the stages and
micro-batches that the schedule brings to the rank: with DualPipe the half of them at each of its two stages. That stages lie twice there,
and a token embedding at both ends of a line, is a matter of holders, whose gradients `.shard` and `.replicate` sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from quintet.cost.activations import element_bytes
from quintet.cost.balance import pipeline_stages
from quintet.cost.expert_comm import expert_bytes, mean_rows, ranks_per_token, shared_bytes
from quintet.cost.pipeline import schedule_of
from quintet.cost.ring_comm import ring_bytes, ring_payload
from quintet.cost.tensor_comm import INDEX, passed, sequence_bytes, tensor_bytes
from quintet.cost.zero_comm import bucket_sizes, gradient_bytes, weight_bytes
from quintet.schedule import Schedule
from quintet.schedule.lower import messages
from quintet.spec.layout import GROUPS, Layout
from quintet.spec.model import Model
from quintet.spec.run import Train
from quintet.spec.stage import Stage

FP64 = 8
STEP_NUMBERS = 7
"""What ranks tell each other of a step beside the experts' load: four losses, how many assignments were dropped, the norm's
square, and whether to stop."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows between a rank and the other ranks of its ep group in a step, over all mixtures of experts and micro-batches: one for each token
    and rank that holds some of its experts."""

    out: float
    """Sent to experts there."""
    into: float
    """Received from there."""
    here: float = 0
    """With `expert_tp`: all that arrive at this rank, its own for itself included."""
    there: float = 0
    """With `expert_tp`: all that arrive at the other ranks that share its experts."""


def step_traffic(
    model: Model,
    train: Train,
    layout: Layout,
    *,
    sequence_length: int,
    batch_sequences: int,
    mtp: bool = True,
    rank: int = 0,
    rows: Rows | None = None,
) -> dict[str, float]:
    """Axis (of `spec.layout.GROUPS`, and `world`) -> bytes that `rank` sends in a step of `batch_sequences` sequences on all ranks.

    Ranks differ in their sequences, if dp does not divide the batch, in their stages, and in `rows`; by default all experts are chosen
    equally often and none drops a row. With `mtp` false the MTP modules do not run. Raises SpecError for fewer micro-batches than the
    layout's pipeline schedule takes.
    """
    modules = model.num_mtp_modules if mtp else 0
    micro_batches = _micro_batches(train, layout, batch_sequences=batch_sequences, rank=rank)
    place = layout.coordinates(rank).pp if layout.pp > 1 else None
    buckets = [bucket for bucket in bucket_sizes(model, layout, place=place) if mtp or not bucket.mtp]
    sent: Counter[str] = Counter(dict.fromkeys((*GROUPS, "world"), 0))
    sent.update(gradient_bytes(buckets, layout, micro_batches=len(micro_batches)))
    sent.update(weight_bytes(buckets, layout, micro_batches=len(micro_batches), element_bytes=element_bytes(train)))
    visits = [Visit(None, sequences) for sequences in micro_batches]
    if place is not None:
        schedule = schedule_of(layout, len(micro_batches))
        visits = _visits(schedule, pipeline_stages(model, layout), place, micro_batches)
        token = model.hidden_size * element_bytes(train)
        sent["pp"] += _handed_on(schedule, place, micro_batches) * (sequence_length // (layout.cp * layout.tp)) * token
    for visit in visits:
        sent.update(_within_model(model, train, layout, visit, sequence_length=sequence_length, modules=modules))
    sent["dp"] += _all_reduce(INDEX * (1 + model.num_mtp_modules), layout.dp)
    loads = (model.num_moe_layers + model.num_mtp_modules) * model.num_routed_experts
    sent["world"] += _all_reduce(FP64 * (STEP_NUMBERS + loads), layout.num_ranks)
    on_ep, on_tp = _of_experts(model, train, layout, visits, tokens=sequence_length // layout.cp, modules=modules, rows=rows)
    return {**sent, "ep": on_ep, "tp": sent["tp"] + on_tp}


@dataclass(frozen=True)
class Visit:
    """A micro-batch of so many sequences at a stage of the model, or in the whole of it."""

    stage: Stage | None
    sequences: int


def _visits(schedule: Schedule, stages: Sequence[Stage], place: int, micro_batches: Sequence[int]) -> list[Visit]:
    """What passes the stages at a place of pp."""
    ops = (op for work in schedule.table[place] for op in work.ops)
    return [Visit(stages[op.stage], micro_batches[op.microbatch]) for op in ops if op.kind == "F"]


def _handed_on(schedule: Schedule, place: int, micro_batches: Sequence[int]) -> int:
    """Sequences that a place of pp sends to others in a step, activations and gradients."""
    return sum(micro_batches[send.microbatch] for work in schedule.table[place] for send, _, _ in messages(schedule, work))


def _micro_batches(train: Train, layout: Layout, *, batch_sequences: int, rank: int) -> list[int]:
    """Sequences of each micro-batch of a rank; as many as the rank with most sequences has, the last ones perhaps empty."""
    own = len(range(layout.coordinates(rank).dp, batch_sequences, layout.dp))
    count = layout.num_microbatches(batch_sequences, train.micro_batch)
    return [min(max(own - i * train.micro_batch, 0), train.micro_batch) for i in range(count)]


def _within_model(
    model: Model, train: Train, layout: Layout, visit: Visit, *, sequence_length: int, modules: int
) -> Counter[str]:
    """Bytes of forward and backward of one micro-batch, on tp, sequence and cp."""
    sequences, stage = visit.sequences, visit.stage
    size, own = element_bytes(train), sequence_length // layout.cp
    tokens = sequences * own
    payload = ring_payload(model, tokens_per_rank=own, cp=layout.cp, tp=layout.tp, element_bytes=size)
    ring = ring_bytes(
        model,
        tokens_per_rank=own,
        sequences=sequences,
        cp=layout.cp,
        tp=layout.tp,
        payload=payload,
        element_bytes=size,
    )
    again = ring.forward if train.recompute == "full" else 0
    across_tp = tensor_bytes(model, layout, tokens=tokens, element_bytes=size, recompute=train.recompute, num_mtp=modules, stage=stage)
    counts = sequence_bytes(model, layout, sequences=sequences, recompute=train.recompute, num_mtp=modules, stage=stage)
    here = passed(model, num_mtp=modules, stage=stage)
    return Counter(
        {
            "tp": round(across_tp.total),  # its shares are whole numbers
            "sequence": round(counts.total),
            "cp": (here.dense + here.moe) * (ring.total + again),
        }
    )


def _of_experts(
    model: Model, train: Train, layout: Layout, visits: Sequence[Visit], *, tokens: int, modules: int, rows: Rows | None
) -> tuple[float, float]:
    """Bytes on ep and on tp of all mixtures of experts; `tokens` are those of a sequence that the ranks of a tp group hold."""
    layers = [passed(model, num_mtp=modules, stage=visit.stage).moe for visit in visits]
    through = sum(count * visit.sequences for count, visit in zip(layers, visits, strict=True)) * tokens // layout.tp
    mean, arriving = mean_rows(model, layout, tokens=through), through * ranks_per_token(model, layout)
    rows = rows or Rows(out=mean, into=mean, here=arriving, there=(layout.tp - 1) * arriving)

    def across(rows: Rows) -> tuple[float, float]:
        size = element_bytes(train)
        on_ep = expert_bytes(model, layout, rows_out=rows.out, rows_in=rows.into, element_bytes=size, recompute=train.recompute)
        on_tp = shared_bytes(model, layout, rows_here=rows.here, rows_there=rows.there, element_bytes=size, recompute=train.recompute)
        return on_ep.total, on_tp.total

    # That sum holds the numbers of rows that ranks tell each other in one pass through one layer.
    (on_ep, on_tp), (ep_numbers, tp_numbers) = across(rows), across(Rows(out=0, into=0))
    more = sum(layers) - 1
    return on_ep + more * ep_numbers, on_tp + more * tp_numbers


def _all_reduce(num_bytes: int, ranks: int) -> int:
    return 2 * num_bytes * (ranks - 1) // ranks
