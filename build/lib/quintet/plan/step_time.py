"""Seconds of a training step: the pipeline by closed forms, ZeRO's messages, the optimizer, and what waiting for the slowest costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from operator import attrgetter

from quintet.cost.architecture import Architecture
from quintet.plan.eager_time import eager_hop, eager_update, eager_zero
from quintet.plan.pipeline_time import PipelineTime, pipeline_time
from quintet.plan.rates import gather_seconds, send_seconds
from quintet.plan.setup import SIZE, Setup
from quintet.plan.stages import Blocks, Part, StageTime, blocks, parts, ranks_of, stage_time
from quintet.spec.cluster import Cluster

OPTIMIZER_BYTES = 22
"""Read and written per parameter besides both moments: gradient (for the norm and for the update), master weight twice, weight."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step by what they go to; they add up."""

    forward: float
    input_gradient: float
    weight_gradient: float
    all_to_all: float
    """Of experts, where it shows."""
    overlap: float
    """What overlapped pairs save (negative)."""
    bubble: float
    p2p: float
    gradients: float
    """ZeRO's reduction of gradients, where it shows."""
    weights: float
    """ZeRO's gathering of weights, where it shows."""
    optimizer: float
    straggling: float

    @property
    def total(self) -> float:
        """The step."""
        return _sum_of_parts(self)


_parts_of = attrgetter(*(field.name for field in fields(StepTime)))


def _sum_of_parts(one: StepTime) -> float:
    return float(sum(_parts_of(one)))  # searches ask often, so the names are looked up once


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A step with what it was computed from."""

    step: StepTime
    blocks: Blocks
    parts: tuple[Part, ...]
    """Per stage."""
    stages: tuple[StageTime, ...]
    pipeline: PipelineTime


def step_time(setup: Setup, cluster: Cluster) -> Timed:
    """The step of a legal setup."""
    found = blocks(setup, cluster)
    layout, a = setup.layout, setup.architecture
    cut = parts(setup, found)
    times = {part: stage_time(part, found, moe=bool(a.num_experts)) for part in set(cut)}
    stages = tuple(times[part] for part in cut)
    stride = layout.num_ranks // layout.pp
    sent = setup.tokens / layout.tp * a.hidden_size * 2
    hop = 0.0
    if layout.pp > 1:
        hop = send_seconds(cluster, sent, stride=stride) if cluster.eager is None else eager_hop(cluster, sent)
    pipeline = pipeline_time(
        layout,
        setup.num_microbatches,
        stages,
        hop=hop,
        p2p_hidden=setup.software.p2p_hidden,
        pair_waits=setup.software.pair_waits,
    )
    gradients, weights = _zero_seconds(setup, cluster, cut, stages)
    optimizer = _optimizer_seconds(setup, cluster, cut)
    busy = pipeline.total + gradients + weights + optimizer
    doublings = max(0.0, math.log2(max(1, layout.num_ranks) / cluster.domain))
    step = StepTime(
        forward=pipeline.forward,
        input_gradient=pipeline.input,
        weight_gradient=pipeline.weight,
        all_to_all=pipeline.all_to_all,
        overlap=-pipeline.saved,
        bubble=pipeline.bubble,
        p2p=pipeline.p2p,
        gradients=gradients,
        weights=weights,
        optimizer=optimizer,
        straggling=busy * setup.software.straggle * doublings,
    )
    return Timed(step=step, blocks=found, parts=cut, stages=stages, pipeline=pipeline)


def weights_of(setup: Setup, part: Part) -> tuple[float, float]:
    """Weights that a rank of a stage holds: those that its replicas share, and of its routed experts."""
    layout = setup.layout
    return _weights(setup.architecture, part, layout.tp, layout.ep * layout.expert_tp)[:2]


def unsplit_weights(setup: Setup, part: Part) -> float:
    """Of the former, those that tp leaves whole, so that all of its ranks hold the same."""
    return _weights(setup.architecture, part, setup.layout.tp, setup.layout.ep * setup.layout.expert_tp)[2]


@lru_cache(maxsize=50_000)
def _weights(a: Architecture, part: Part, tp: int, expert_ways: int) -> tuple[float, float, float]:
    common, experts, unsplit = 0.0, 0.0, 0.0
    for moe, num in ((False, part.num_dense), (True, part.num_moe), (bool(a.num_experts), part.num_mtp)):
        shared, routed = a.block_weights(moe=moe) if num else (0, 0)
        # tp leaves norms, routers and down-projections of latents whole.
        whole = 2 * a.hidden_size + sum(p.weights for p in (*a.attention, *(a.router if moe else ())) if p.split == "tokens")
        common += num * (whole + (shared - whole) / tp)
        unsplit += num * whole
        experts += num * routed / expert_ways
    common += part.num_mtp * a.projection[0].weights
    unsplit += part.num_mtp * a.projection[0].weights
    vocabulary = a.vocab_size * a.hidden_size / tp
    common += vocabulary * ((part.embedding or reads_embedding_again(a, part)) + (part.head and not a.tie_embeddings))
    return common, experts, unsplit


def reads_embedding_again(a: Architecture, part: Part) -> bool:
    """Whether a stage needs the token embedding behind the first one: for MTP modules, or as its head."""
    return part.num_mtp > 0 or (part.head and a.tie_embeddings)


def _zero_seconds(setup: Setup, cluster: Cluster, cut: tuple[Part, ...], stages: tuple[StageTime, ...]) -> tuple[float, float]:
    """Seconds of gradients and weights that show on the rank that has most of them: beyond what one micro-batch can hide."""
    layout, hidden = setup.layout, setup.software.zero_hidden
    worst = (0.0, 0.0)
    ranks = ranks_of(layout)
    for mine in {ranks[0], ranks[-1]}:
        common = sum(weights_of(setup, cut[stage])[0] for stage in mine)
        experts = sum(weights_of(setup, cut[stage])[1] for stage in mine)
        if cluster.eager is not None:
            worst = max(worst, eager_zero(setup, cluster, common, experts), key=sum)
            continue
        # All-to-alls take the same cards: only what they leave of the work hides anything.
        backward = hidden * max(0.0, sum(stages[s].input + stages[s].weight - stages[s].all_to_all for s in mine))
        forward = hidden * max(0.0, sum(stages[s].forward - stages[s].all_to_all for s in mine))
        replicas = setup.expert_replicas
        groups = ((common, setup.replicas, layout.tp), (experts, replicas, max(1, setup.replicas * layout.tp // replicas)))
        reduce = sum(gather_seconds(cluster, setup.gradient_bytes * n, ranks=ranks, stride=stride) for n, ranks, stride in groups)
        gather = sum(gather_seconds(cluster, SIZE["bf16"] * n, ranks=ranks, stride=stride) for n, ranks, stride in groups)
        m = setup.num_microbatches
        if layout.zero == 0:
            shown = (max(0.0, 2 * reduce - backward), 0.0)
        elif layout.zero == 3:  # gathered twice for every micro-batch, beside the same work that hides the gradients
            left = max(0.0, backward - reduce)
            shown = (m * max(0.0, reduce - backward), m * max(0.0, 2 * gather - forward - left))
        else:
            shown = ((m if layout.zero == 2 else 1) * max(0.0, reduce - backward), max(0.0, gather - forward))
        worst = max(worst, shown, key=sum)
    return worst


def _optimizer_seconds(setup: Setup, cluster: Cluster, cut: tuple[Part, ...]) -> float:
    layout = setup.layout
    bandwidth = cluster.gpu.memory_bandwidth * setup.software.memory
    shards = (setup.replicas, setup.expert_replicas) if layout.zero else (1, 1)
    own = {part: sum(n / ways for n, ways in zip(weights_of(setup, part), shards, strict=True)) for part in set(cut)}
    most = max(sum(own[cut[stage]] for stage in held) for held in ranks_of(layout))
    if cluster.eager is not None:
        return eager_update(cluster, most)
    return most * (OPTIMIZER_BYTES + 4 * setup.moments_bytes) / bandwidth
