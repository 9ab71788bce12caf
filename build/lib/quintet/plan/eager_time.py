"""Seconds of a block, of ZeRO's messages and of the optimizer on a CPU, from what `quintet doctor --cluster` measured there.

A CPU runs operations one by one as they are called. Every term is calls, operations and bytes times a measured figure each
(`spec.cluster.Eager`), and all terms add up: nothing runs beside anything, since messages take the cores that compute. How Quintet computes
is taken from its runtime: attention in blocks of queries, gradients that add up in fp32 behind every micro-batch, a row for each token and
rank of ep, reduce-scatters as an all-to-all and a sum.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from quintet.cost.architecture import Architecture, Product
from quintet.cost.shard import NUM_BUCKETS
from quintet.plan.block_time import BlockTime, Policy, moved_bytes
from quintet.plan.setup import Setup
from quintet.plan.software import Software
from quintet.spec.cluster import Calls, Cluster, Eager

QUERY_BLOCK = 128
"""Queries that attention takes at a time: that of `ops.attention`, which needs torch."""
BF16, FP32 = 2, 4
SHARED_NUMBERS = 2
"""Small messages before each dispatch: counts of rows, and of tokens' experts."""


@lru_cache(maxsize=100_000)
def eager_block(a: Architecture, policy: Policy, cluster: Cluster, software: Software, *, moe: bool) -> BlockTime:
    """One layer of one micro-batch, dense or mixture of experts."""
    eager, tokens, scale = _of(cluster), policy.tokens, 1 / software.pace
    plain = _products((*a.attention, *((*a.router, *a.shared) if moe else a.dense)), tokens=tokens, policy=policy, cluster=cluster)
    grouped = _experts(a, policy, cluster) if moe else (0.0, 0.0, 0.0)
    core, core_backward = _core(a, policy, eager)
    rest = (eager.dense, eager.dense_backward)
    if moe:
        rest = (eager.moe, eager.moe_backward) if policy.ep == 1 else (eager.routed, eager.routed_backward)
    forward_bytes, backward_bytes = moved_bytes(a, policy, moe=moe)
    moved, moved_backward = rest[0].seconds(calls=0, num_bytes=forward_bytes), rest[1].seconds(calls=0, num_bytes=backward_bytes)
    common, experts = a.block_weights(moe=moe)
    kept = eager.accumulate.seconds(calls=0, num_bytes=BF16 * common / policy.tp)
    kept_experts = eager.accumulate.seconds(calls=0, num_bytes=BF16 * experts / (policy.ep * policy.expert_tp))
    tensor, tensor_backward = _tensor(a, policy, eager, moe=moe)
    ring, ring_backward = _ring_messages(a, policy, eager)
    dispatch = _dispatch(a, policy, eager) if moe else 0.0
    forward = scale * (plain[0] + grouped[0] + core + moved + rest[0].call)
    again = again_messages = 0.0
    if policy.recompute == "full":
        again, again_messages = policy.recompute_share * (forward + tensor + ring), policy.recompute_share * 2 * dispatch
    elif policy.recompute == "selective":
        up = [p for p in a.attention if p.name in ("wkv_b", "wq_b")]
        again = scale * (_products(up, tokens=tokens, policy=policy, cluster=cluster)[0] + 0.3 * moved)
    return BlockTime(
        products=scale * plain[0],
        products_input=scale * plain[1],
        products_weight=scale * (plain[2] + kept),
        grouped=scale * grouped[0],
        grouped_input=scale * grouped[1],
        grouped_weight=scale * (grouped[2] + kept_experts),
        attention=scale * core,
        attention_backward=scale * core_backward,
        moved=scale * moved,
        moved_backward=scale * moved_backward,
        launch=scale * rest[0].call,
        launch_backward=scale * rest[1].call,
        again=again,
        tensor=tensor,
        tensor_backward=tensor_backward,
        ring=ring,
        ring_backward=ring_backward,
        dispatch=dispatch,
        combine=dispatch,
        dispatch_again=again_messages,
    )


@lru_cache(maxsize=20_000)
def eager_end(a: Architecture, policy: Policy, cluster: Cluster, software: Software, *, head: bool) -> BlockTime:
    """The embedding, or norm, logits and loss, whose gradients forward computes already."""
    eager, tokens, scale, tp = _of(cluster), policy.tokens, 1 / software.pace, policy.tp
    kept = scale * eager.accumulate.seconds(calls=0, num_bytes=BF16 * a.vocab_size * a.hidden_size / tp)
    exchanged = BF16 * tokens * a.hidden_size * (tp - 1) / tp
    gather, scatter = (one.seconds(num_bytes=exchanged) if tp > 1 else 0.0 for one in (eager.gather, eager.scatter))
    if not head:
        return BlockTime(products_weight=kept, tensor=scatter, tensor_backward=gather)
    products = _products(a.head, tokens=tokens, policy=policy, cluster=cluster)
    loss = eager.loss.seconds(num_bytes=BF16 * tokens * a.vocab_size / tp)
    return BlockTime(
        products=scale * sum(products),
        products_weight=kept,
        moved=scale * loss,
        tensor=gather,
        tensor_backward=scatter,
    )


def eager_zero(setup: Setup, cluster: Cluster, common: float, experts: float) -> tuple[float, float]:
    """Seconds of a step's reductions of gradients and gatherings of a rank's weights: those that all replicas hold, and experts."""
    eager, zero, m = _of(cluster), setup.layout.zero, setup.num_microbatches
    layered = setup.architecture.num_layers / setup.layout.pp
    buckets = layered if zero == 3 else NUM_BUCKETS
    gradients = weights = 0.0
    for numel, ranks in ((common, setup.replicas), (experts, setup.expert_replicas)):
        if ranks == 1 or not numel:
            continue
        sent = numel * (ranks - 1) / ranks
        if zero == 0:
            gradients += eager.reduce.seconds(calls=buckets, num_bytes=2 * FP32 * sent)
        else:
            times = m if zero >= 2 and setup.layout.pp == 1 else 1
            gradients += times * eager.scatter.seconds(calls=buckets, num_bytes=FP32 * sent)
            weights += (2 * m if zero == 3 else 1) * eager.gather.seconds(calls=buckets, num_bytes=BF16 * sent)
    return gradients, weights


def eager_update(cluster: Cluster, weights: float) -> float:
    """Seconds of the gradient's norm and the update of so many weights."""
    return _of(cluster).update.seconds(num_bytes=BF16 * weights)


def eager_hop(cluster: Cluster, num_bytes: float) -> float:
    """Seconds of a message between stages."""
    return _of(cluster).send.seconds(num_bytes=num_bytes)


def _of(cluster: Cluster) -> Eager:
    assert cluster.eager is not None
    return cluster.eager


def _products(products: Iterable[Product], *, tokens: float, policy: Policy, cluster: Cluster) -> tuple[float, float, float]:
    """Seconds of products, of their inputs' gradients and of their weights'."""
    total = (0.0, 0.0, 0.0)
    for p in products:
        rows = tokens / policy.tp if p.split == "tokens" else tokens
        outputs = p.outputs / policy.tp if p.split == "columns" else p.outputs
        inputs = p.inputs / policy.tp if p.split == "rows" else p.inputs
        eager = _of(cluster)
        found = _three((eager.product, eager.product_input, eager.product_weight), rows, outputs, inputs, policy=policy, cluster=cluster)
        total = (total[0] + found[0], total[1] + found[1], total[2] + found[2])
    return total


def _experts(a: Architecture, policy: Policy, cluster: Cluster) -> tuple[float, float, float]:
    eager, sharing = _of(cluster), policy.expert_tp
    rows, local = policy.tokens * sharing / policy.tp * a.experts_per_token, max(1, a.num_experts // policy.ep)
    total = (0.0, 0.0, 0.0)
    for p in a.expert:
        outputs = p.outputs / sharing if p.split == "columns" else p.outputs
        inputs = p.inputs / sharing if p.split == "rows" else p.inputs
        kinds = (eager.grouped, eager.grouped_input, eager.grouped_weight)
        found = _three(kinds, rows, outputs, inputs, policy=policy, cluster=cluster, count=local)
        total = (total[0] + found[0], total[1] + found[1], total[2] + found[2])
    return total


def _three(
    kinds: tuple[Calls, Calls, Calls], rows: float, outputs: float, inputs: float, *, policy: Policy, cluster: Cluster, count: int = 1
) -> tuple[float, float, float]:
    """A product of `rows` in all with `count` matrices, and both of its gradients."""
    peak = cluster.gpu.peak
    slower = peak.bf16 / (peak.fp32 or peak.bf16) if policy.precision == "fp32" else 1.0
    size = FP32 if policy.precision == "fp32" else BF16
    flops, num_bytes = slower * 2 * rows * outputs * inputs, size * (count * inputs * outputs + rows * (inputs + outputs))
    first, second, third = (kind.seconds(calls=count, flops=flops, num_bytes=num_bytes) for kind in kinds)
    return first, second, third


def core_work(sequences: float, length: float, *, heads: float, widths: float) -> tuple[float, float]:
    """Calls and operations of a forward of causal attention in blocks of queries, each with all keys up to its end."""
    blocks = -(-length // QUERY_BLOCK)
    size = length / blocks
    return blocks, 2 * sequences * heads * widths * size * size * blocks * (blocks + 1) / 2


def _core(a: Architecture, policy: Policy, eager: Eager) -> tuple[float, float]:
    heads, widths = a.num_heads / policy.tp, a.qk_head_dim + a.v_head_dim
    sequences, length = policy.tokens * policy.cp / policy.sequence_length, policy.sequence_length / policy.cp
    calls, flops = core_work(sequences, length, heads=heads, widths=widths)
    if policy.cp == 1:
        return eager.core.seconds(calls=calls, flops=flops), eager.core_backward.seconds(calls=calls, flops=2.5 * flops)
    others = policy.cp - 1  # half of their scores are seen
    calls, flops = calls * policy.cp, flops + others * sequences * heads * widths * length * length
    again = [p for p in a.attention if p.name == "wkv_b"]  # latents are expanded where they arrive, and once more in backward
    grown = 2 * sequences * length * sum(p.weights for p in again) / policy.tp
    forward = eager.ring.seconds(calls=calls, flops=flops) + eager.product.seconds(calls=others, flops=0.75 * others * grown)
    backward = eager.ring_backward.seconds(calls=calls, flops=2.5 * flops)
    return forward, backward + eager.product.seconds(calls=policy.cp, flops=(1 + 0.75 * others) * grown)


def _ring_messages(a: Architecture, policy: Policy, eager: Eager) -> tuple[float, float]:
    """Payloads that go round, and in backward their gradients in fp32 as well."""
    if policy.cp == 1:
        return 0.0, 0.0
    expanded = a.num_heads / policy.tp * (a.qk_head_dim + a.v_head_dim)
    width = min(expanded, a.kv_lora_rank + a.qk_rope_head_dim) if a.kv_lora_rank else expanded
    payload = BF16 * policy.tokens * width
    one, gradient = eager.send.seconds(num_bytes=payload), eager.send.seconds(num_bytes=2 * payload)
    return (policy.cp - 1) * one, (policy.cp - 1) * one + policy.cp * gradient


def _tensor(a: Architecture, policy: Policy, eager: Eager, *, moe: bool) -> tuple[float, float]:
    """Gathers of tokens and scatters of sums; backward has the other one of each."""
    if policy.tp == 1:
        return 0.0, 0.0
    share = BF16 * policy.tokens * (policy.tp - 1) / policy.tp
    latents = (a.q_lora_rank or a.hidden_size) + a.kv_lora_rank + a.qk_rope_head_dim if a.kv_lora_rank is not None else a.hidden_size
    feeds = (1 if not moe or a.shared_ffn_size else 0) + (1 if moe and policy.expert_tp > 1 else 0)
    gathered = [latents, *[a.hidden_size] * feeds]
    scattered = [a.hidden_size] * (1 + feeds)
    forward = sum(eager.gather.seconds(num_bytes=share * w) for w in gathered) + sum(
        eager.scatter.seconds(num_bytes=share * w) for w in scattered
    )
    backward = sum(eager.scatter.seconds(num_bytes=share * w) for w in gathered) + sum(
        eager.gather.seconds(num_bytes=share * w) for w in scattered
    )
    return forward, backward


def _dispatch(a: Architecture, policy: Policy, eager: Eager) -> float:
    """One of the two all-to-alls of a forward: a row per token and rank that has some of its experts."""
    if policy.ep == 1:
        return 0.0
    reached = policy.ep * (1 - (1 - 1 / policy.ep) ** a.experts_per_token)
    sent = BF16 * a.hidden_size * policy.tokens / policy.tp * reached * (policy.ep - 1) / policy.ep
    return eager.exchange.seconds(calls=1 + SHARED_NUMBERS / 2, num_bytes=sent)
