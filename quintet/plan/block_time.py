"""Seconds of one block of one micro-batch on a device, term by term: products, attention, moved bytes, launches, and each kind of
message."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from quintet.cost.architecture import Architecture, Product
from quintet.plan.rates import attention_seconds, exchange_seconds, gather_seconds, product_seconds, within
from quintet.plan.setup import SIZE, Precision
from quintet.plan.software import Software
from quintet.spec.cluster import Cluster
from quintet.spec.layout import Layout
from quintet.spec.model import Model

KERNELS = {"dense": (26, 44), "moe": (70, 110)}
"""Kernels of a block, forward and backward, that a host launches one by one: counted in traces of Megatron-style blocks, assumed alike."""

LEAST_SECONDS = 3e-6
"""That a kernel takes on the device however little it does; assumed."""
KEPT_IN_BF16 = 0.15
"""Share of the products that training in nvfp4 leaves in bf16 (arXiv 2509.25149, section 3)."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a block's time depends on, beside its weights: hashable, so that layouts that share it share the result."""

    tokens: int
    """Of a tp group."""
    sequence_length: int
    tp: int
    cp: int
    ep: int
    expert_tp: int
    expert_stride: int
    """How far apart neighbours of an ep group lie."""
    own: tuple[Model, Layout] | None = None
    """On a CPU, where messages are those of Quintet's runtime (`cost`): its model and layout."""
    gather_rows: bool
    """Whether rows are gathered over tp behind the all-to-all, or tokens before it."""
    precision: Precision
    recompute: str
    recompute_share: float


@dataclass(frozen=True, kw_only=True)
class BlockTime:
    """Seconds. `input` and `weight` are the two halves of backward; what is recomputed is in `again`."""

    products: float = 0.0
    products_input: float = 0.0
    products_weight: float = 0.0
    grouped: float = 0.0
    grouped_input: float = 0.0
    grouped_weight: float = 0.0
    attention: float = 0.0
    attention_backward: float = 0.0
    moved: float = 0.0
    moved_backward: float = 0.0
    launch: float = 0.0
    """What launching takes longer than running, forward."""
    launch_backward: float = 0.0
    again: float = 0.0
    """What is computed a second time."""
    tensor: float = 0.0
    """Messages of tp that show, forward."""
    tensor_backward: float = 0.0
    ring: float = 0.0
    ring_backward: float = 0.0
    dispatch: float = 0.0
    """Of tokens to experts; backward sends the combine's gradient as long."""
    combine: float = 0.0
    dispatch_again: float = 0.0
    """All-to-alls that recomputation repeats."""

    @property
    def compute_forward(self) -> float:
        """Work on the device, forward, with messages of tp and cp, which stand between products."""
        return self.products + self.grouped + self.attention + self.moved + self.launch + self.tensor + self.ring

    @property
    def compute_input(self) -> float:
        """The same of the gradient of the input."""
        own = self.products_input + self.grouped_input + self.attention_backward + self.moved_backward + self.launch_backward + self.again
        return own + self.tensor_backward + self.ring_backward

    @property
    def compute_weight(self) -> float:
        """The same of the gradients of the weights."""
        return self.products_weight + self.grouped_weight

    @property
    def all_to_all(self) -> float:
        """Of a forward; a backward's are as long."""
        return self.dispatch + self.combine


@lru_cache(maxsize=100_000)
def block_time(a: Architecture, policy: Policy, cluster: Cluster, software: Software, *, moe: bool) -> BlockTime:
    """One layer, dense or mixture of experts."""
    tokens, tp = policy.tokens, policy.tp
    plain = (*a.attention, *((*a.router, *a.shared) if moe else a.dense))
    products = _products(plain, tokens=tokens, tp=tp, policy=policy, cluster=cluster, software=software)
    grouped = _experts(a, policy, cluster, software) if moe else (0.0, 0.0, 0.0)
    attention, attention_backward = _attention(a, policy, cluster, software)
    moved, moved_backward = _moved(a, policy, cluster, software, moe=moe)
    scale = 1 / (software.pace * (1.0 if policy.precision in ("bf16", "fp32") else software.low_pace))
    tensor, ring = _tensor(a, policy, cluster, software, moe=moe), _ring(a, policy, cluster, attention, attention_backward)
    dispatch, combine = all_to_alls(a, policy, cluster, software) if moe else (0.0, 0.0)
    local = a.num_experts // policy.ep * software.kernels_per_expert if moe else 0.0
    kernels = tuple(n + times * local for n, times in zip(KERNELS["moe" if moe else "dense"], (1, 2), strict=True))
    moved, moved_backward = moved + kernels[0] * LEAST_SECONDS, moved_backward + kernels[1] * LEAST_SECONDS
    forward = (products[0] + grouped[0] + attention + moved) * scale
    backward = (sum(products[1:]) + sum(grouped[1:]) + attention_backward + moved_backward) * scale
    host = software.launch_moe if moe else software.launch
    launch, launch_backward = (max(0.0, n * host - own) for n, own in zip(kernels, (forward, backward), strict=True))
    launch += software.wait if moe else 0.0
    again, dispatch_again = 0.0, 0.0
    if policy.recompute == "full":
        share = policy.recompute_share
        again, dispatch_again = share * (forward + launch + tensor[0] + ring[0]), share * (dispatch + combine)
    elif policy.recompute == "selective":
        up = [p for p in a.attention if p.name in ("wkv_b", "wq_b")]  # V3, 3.2.3: norms and MLA's up-projections
        again = scale * (_products(up, tokens=tokens, tp=tp, policy=policy, cluster=cluster, software=software)[0] + 0.3 * moved)
    return BlockTime(
        products=products[0] * scale,
        products_input=products[1] * scale,
        products_weight=products[2] * scale,
        grouped=grouped[0] * scale,
        grouped_input=grouped[1] * scale,
        grouped_weight=grouped[2] * scale,
        attention=attention * scale,
        attention_backward=attention_backward * scale,
        moved=moved * scale,
        moved_backward=moved_backward * scale,
        launch=launch,
        launch_backward=launch_backward,
        again=again,
        tensor=tensor[0],
        tensor_backward=tensor[1],
        ring=ring[0],
        ring_backward=ring[1],
        dispatch=dispatch * (1 - software.ep_hidden),
        combine=combine * (1 - software.ep_hidden),
        dispatch_again=dispatch_again * (1 - software.ep_hidden),
    )


def rate(cluster: Cluster, precision: str, software: Software) -> float:
    """Operations per second that products reach inside a step at best."""
    gpu = cluster.gpu
    peak, share = gpu.peak.of(precision), gpu.reachable.of(precision)
    if peak is None or share is None:  # a device without this type computes in bf16
        peak, share = gpu.peak.bf16, gpu.reachable.bf16
    fast = peak * share
    if precision == "nvfp4" and gpu.peak.nvfp4 is not None:
        fast = 1 / ((1 - KEPT_IN_BF16) / fast + KEPT_IN_BF16 / (gpu.peak.bf16 * gpu.reachable.bf16))
    return fast * gpu.sustained * software.cores


def _three(
    rows: float, outputs: float, inputs: float, *, rate: float, cluster: Cluster, size: float, software: Software, count: int = 1
) -> tuple[float, float, float]:
    """Seconds of a product, of its input's gradient and of its weight's."""
    more = {
        "rate": rate,
        "bandwidth": cluster.gpu.memory_bandwidth * software.memory,
        "cores": cluster.gpu.num_cores,
        "size": size,
        "count": count,
        "ramp": software.ramp,
    }
    return (
        product_seconds(rows, outputs, inputs, **more),  # type: ignore[arg-type]
        product_seconds(rows, inputs, outputs, **more),  # type: ignore[arg-type]
        product_seconds(inputs, outputs, rows, **more),  # type: ignore[arg-type]
    )


def _products(
    products: Iterable[Product], *, tokens: int, tp: int, policy: Policy, cluster: Cluster, software: Software
) -> tuple[float, float, float]:
    forward = backward = weight = 0.0
    for p in products:
        precision = policy.precision if p.low else "bf16" if policy.precision != "fp32" else "fp32"
        rows = tokens / tp if p.split == "tokens" else tokens
        outputs = p.outputs / tp if p.split == "columns" else p.outputs
        inputs = p.inputs / tp if p.split == "rows" else p.inputs
        f, i, w = _three(
            rows,
            outputs,
            inputs,
            rate=rate(cluster, precision, software),
            cluster=cluster,
            size=max(1.0, SIZE[precision]),
            software=software,
        )
        forward, backward, weight = forward + f, backward + i, weight + w
    return forward, backward, weight


def _experts(a: Architecture, policy: Policy, cluster: Cluster, software: Software) -> tuple[float, float, float]:
    """The routed experts of this rank, each with its mean share of rows."""
    sharing = policy.expert_tp
    rows = policy.tokens * sharing / policy.tp * a.experts_per_token * _uneven(policy, software)
    local = max(1, a.num_experts // policy.ep)
    total = [0.0, 0.0, 0.0]
    for p in a.expert:
        outputs = p.outputs / sharing if p.split == "columns" else p.outputs
        inputs = p.inputs / sharing if p.split == "rows" else p.inputs
        found = _three(
            rows / local,
            outputs,
            inputs,
            rate=rate(cluster, policy.precision, software) * software.grouped,
            cluster=cluster,
            size=max(1.0, SIZE[policy.precision]),
            software=software,
            count=local,
        )
        total = [x + y for x, y in zip(total, found, strict=True)]
    return total[0], total[1], total[2]


def _uneven(policy: Policy, software: Software) -> float:
    return 1 + software.imbalance if policy.ep > 1 else 1.0


def _attention(a: Architecture, policy: Policy, cluster: Cluster, software: Software) -> tuple[float, float]:
    """A ring works on pairs of parts of 1 / cp of the sequence, of which causality leaves half of the keys, as of a whole sequence."""
    flops = policy.tokens * a.attention_flops(keys=policy.sequence_length / 2) / policy.tp
    keys = policy.sequence_length / policy.cp
    narrow = min(1.0, a.qk_head_dim / 128) ** 0.5  # the fastest kernels are fed less well by narrow heads
    reached = narrow if software.attention == 1.0 else software.attention
    return (
        attention_seconds(cluster.gpu, flops, keys=keys, backward=False) / reached,
        attention_seconds(cluster.gpu, 2.5 * flops, keys=keys, backward=True) / reached,
    )


def _moved(a: Architecture, policy: Policy, cluster: Cluster, software: Software, *, moe: bool) -> tuple[float, float]:
    """Seconds of norms, residuals, rotary embedding, activations and routing."""
    bandwidth = cluster.gpu.memory_bandwidth * software.memory / software.moved
    forward, backward = moved_bytes(a, policy, moe=moe)
    return forward / bandwidth, backward / bandwidth


def moved_bytes(a: Architecture, policy: Policy, *, moe: bool) -> tuple[float, float]:
    """Bytes that fused kernels of norms, residuals, rotary embedding, activations and routing read and write, forward and backward."""
    width, tp, tokens = a.hidden_size, policy.tp, policy.tokens
    inner = a.shared_ffn_size if moe else a.ffn_size
    gate = 3 if a.gated else 2
    heads = a.num_heads * a.qk_head_dim + a.num_kv_heads * a.qk_head_dim
    forward = (10 * width + 2 * heads + gate * inner) / tp
    backward = (12 * width + 2 * heads + (gate + gate - 1) * inner) / tp
    if a.kv_lora_rank is not None:
        latents = (a.q_lora_rank or 0) + a.kv_lora_rank
        forward, backward = forward + 2 * latents + heads / tp, backward + 3 * latents + heads / tp
    if moe:
        rows = a.experts_per_token / tp * policy.expert_tp
        routed = 4 * width + gate * a.expert_ffn_size / policy.expert_tp
        forward += rows * routed + 4 * a.num_experts / tp
        backward += rows * (4 * width + (2 * gate - 1) * a.expert_ffn_size / policy.expert_tp) + 4 * a.num_experts / tp
    size = 4 if policy.precision == "fp32" else 2
    return tokens * size * forward, tokens * size * backward


def _tensor(a: Architecture, policy: Policy, cluster: Cluster, software: Software, *, moe: bool) -> tuple[float, float]:
    """Gathers of tokens and scatters of sums: two of each forward, one more gather of each backward for the weights' gradients."""
    if policy.tp == 1:
        return 0.0, 0.0
    low = software.low_gather and policy.precision in ("fp8", "nvfp4")

    def gather(width: float, size: float = 2.0) -> float:
        return gather_seconds(cluster, policy.tokens * width * size, ranks=policy.tp, stride=1)

    scatter, tokens = gather(a.hidden_size), gather(a.hidden_size, 1.0 if low else 2.0)
    into_attention = tokens
    if a.kv_lora_rank is not None:
        into_attention = gather((a.q_lora_rank or a.hidden_size) + a.kv_lora_rank + a.qk_rope_head_dim)
    feed = 1.0 if not moe or a.shared_ffn_size else 0.0
    beside = 1.0 if moe and policy.expert_tp > 1 and not policy.gather_rows else 0.0
    forward = into_attention + scatter + (feed + beside) * (tokens + scatter)
    again = into_attention + (feed + beside) * tokens
    shown = 1 - software.tp_hidden
    # Rows that are gathered behind an all-to-all wait for it, and experts for them: no product is there to hide them.
    rows = 2 * scatter * a.experts_per_token if moe and policy.gather_rows else 0.0
    return shown * forward + rows, shown * (forward + again) + rows


def _ring(a: Architecture, policy: Policy, cluster: Cluster, attention: float, attention_backward: float) -> tuple[float, float]:
    """What the ring's messages take longer than the attention beside which they travel; backward brings gradients along."""
    if policy.cp == 1:
        return 0.0, 0.0
    width = a.num_kv_heads / policy.tp * (a.qk_head_dim + a.v_head_dim)
    step = 2 * policy.tokens * width
    link = cluster.link if policy.tp * policy.cp <= cluster.domain else cluster.network
    one = step / link.effective + link.latency
    own, own_backward = attention / policy.cp, attention_backward / policy.cp
    steps = policy.cp - 1
    return steps * max(0.0, one - own), steps * max(0.0, 2 * one - own_backward)


@lru_cache(maxsize=100_000)
def all_to_alls(a: Architecture, policy: Policy, cluster: Cluster, software: Software) -> tuple[float, float]:
    """Seconds of a dispatch and of a combine, if nothing hides them, with experts chosen equally often."""
    if policy.ep == 1:
        return 0.0, 0.0
    near_ranks = within(cluster, ranks=policy.ep, stride=policy.expert_stride)
    domains = math.ceil(policy.ep / near_ranks)
    tokens = policy.tokens / policy.tp * (1 if policy.gather_rows else policy.expert_tp) * _uneven(policy, software)
    chosen = a.experts_per_token
    far = chosen * (domains - 1) / domains
    if software.once_per_node and domains > 1:
        reached = domains * (1 - (1 - 1 / domains) ** chosen)
        far = min(reached, a.groups_per_token or reached) * (domains - 1) / domains
    near = chosen * (near_ranks - 1) / near_ranks if software.once_per_node else chosen * (near_ranks - 1) / policy.ep
    sizes = (1.03 if software.low_dispatch else 2.0, 2.0)
    dispatch, combine = (
        exchange_seconds(
            cluster, far_bytes=tokens * far * a.hidden_size * size, near_bytes=tokens * near * a.hidden_size * size, domains=domains
        )
        for size in sizes
    )
    return dispatch / software.all_to_all, combine / software.all_to_all


def ends_time(a: Architecture, policy: Policy, cluster: Cluster, software: Software, *, head: bool) -> BlockTime:
    """The embedding, or norm, logits and loss."""
    tokens, tp = policy.tokens, policy.tp
    bandwidth = cluster.gpu.memory_bandwidth * software.memory
    if not head:
        moved = tokens * a.hidden_size * 2 / bandwidth
        return BlockTime(moved=2 * moved, moved_backward=3 * moved)
    f, i, w = _products(a.head, tokens=tokens, tp=tp, policy=policy, cluster=cluster, software=software)
    moved = tokens * a.vocab_size / tp / bandwidth
    gather = gather_seconds(cluster, tokens * 2 * a.hidden_size, ranks=tp, stride=1) * (1 - software.tp_hidden)
    scale = 1 / software.pace
    return BlockTime(
        products=f * scale,
        products_input=i * scale,
        products_weight=w * scale,
        moved=10 * moved * scale,  # bf16 logits written, read and exponentiated in fp32
        moved_backward=8 * moved * scale,
        tensor=gather,
        tensor_backward=gather,
    )
