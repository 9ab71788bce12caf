"""Bytes on each rank of a pipeline at the peak of a step: states, activations in flight, logits, messages, and the margins around them.

`cost` counts what Quintet's own models keep on its runtime; this adds what a plan needs beyond it: every rank of a pipeline with as many
micro-batches in flight as its schedule keeps, fp8, devices' own overhead, and transformers other than Quintet's.

In fp8, and of other transformers, elements that a layer keeps of a token for backward, with fused attention and without recomputation (t =
tp, D hidden, F inner width, h heads of qk width q and value width v, g key-value heads, K experts per token):

    attention    D/t norm's input, D/t its output, (h q + g (q + v))/t, h v/t attention's output, and log-sum-exp
    latent       D/t, D/t, latents twice, h (2 q + v)/t, h v/t twice (`cost.activations`)
    feed-forward D/t, D/t, gate, up and product: 3 F/t, or 2 F/t without a gate
    experts      K/t (D + 3 F_e): gathered inputs, gate and up, product
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from operator import attrgetter
from typing import TypeAlias

from quintet.cost import activations
from quintet.cost.activations import Device
from quintet.cost.memory import logits_bytes
from quintet.plan.block_time import Policy
from quintet.plan.setup import Setup
from quintet.plan.stages import Part, policy_of, ranks_of
from quintet.plan.step_time import reads_embedding_again, unsplit_weights, weights_of
from quintet.schedule import build
from quintet.schedule.classic import rounds
from quintet.schedule.held import fullest
from quintet.spec.run import Train

BF16, FP32, INDEX = 2, 4, 8
FRAMEWORK_BYTES = 2.5e9
"""CUDA's context, NCCL's buffers, workspaces of products; assumed."""
CPU_FRAMEWORK_BYTES = 0.25e9
"""A process that has imported torch and Quintet, as measured on Linux."""
FRAGMENTATION = 0.04
"""Of what comes and goes: activations, logits, messages; assumed."""
IMBALANCE = 0.10
"""How many more rows than the mean an expert-parallel rank receives, once balanced by bias; assumed."""


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of a rank of the pipeline, by part."""

    weights: float
    gradients: float
    master_weights: float
    moments: float
    gathered: float
    """ZeRO 3's whole weights of the layers at work."""
    activations: float
    recomputation: float
    """What one layer holds besides while it is computed again."""
    logits: float
    messages: float
    imbalance: float
    """Rows beyond the mean at the experts of this rank."""
    fragmentation: float
    framework: float

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return _sum_of_parts(self)

    @property
    def margins(self) -> float:
        """What is set aside rather than counted."""
        return self.imbalance + self.fragmentation + self.framework


_parts_of = attrgetter(*(field.name for field in fields(RankMemory)))


def _sum_of_parts(one: RankMemory) -> float:
    return float(sum(_parts_of(one)))  # searches ask often, so the names are looked up once


def rank_memory(setup: Setup, parts: tuple[Part, ...], *, device: Device = "cuda") -> tuple[RankMemory, ...]:
    """Of each rank of the pipeline, first to last."""
    held = ranks_of(setup.layout)
    in_flight = peaks_in_flight(setup.schedule, setup.layout.pp, setup.num_microbatches, setup.chunks)
    policy = policy_of(setup)
    kinds = {moe: _block(setup, policy, moe=moe, device=device) for moe in (False, True)}
    routed, messages = _routed_bytes(setup, policy), _message_bytes(setup)
    known: dict[tuple[Moments, tuple[Part, ...]], RankMemory] = {}
    found = []
    for rank, stages in enumerate(held):
        key = (in_flight[rank], tuple(parts[stage] for stage in stages))
        if key not in known:
            one = _of_rank(setup, key[1], in_flight=key[0], kinds=kinds, routed=routed, messages=messages)
            known[key] = one if device == "cuda" else replace(one, framework=CPU_FRAMEWORK_BYTES)
        found.append(known[key])
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Bytes of a layer."""

    kept: float
    """From forward for backward."""
    again: float
    """Besides, while it is computed again."""
    put_off: float
    """For weight gradients that are put off."""


def _block(setup: Setup, policy: Policy, *, moe: bool, device: Device) -> _Block:
    kept = block_bytes(setup, policy, moe=moe, device=device)
    if (train := setup.policy) is not None:
        assert setup.model is not None
        put_off = activations.put_off_bytes(setup.model, train, setup.layout, moe=moe, sequence_length=setup.sequence_length)
        return _Block(kept=kept, again=_own_block(setup, replace(train, recompute="none"), moe=moe, device=device) - kept, put_off=put_off)
    whole = _full_bytes(setup, policy, moe=moe)
    return _Block(kept=kept, again=whole - kept, put_off=whole)  # inputs of products, and gradients of outputs for what else was kept


def _own_block(setup: Setup, train: Train, *, moe: bool, device: Device) -> float:
    """What a layer of Quintet's own model keeps, as its runtime does."""
    assert setup.model is not None
    return activations.block_bytes(setup.model, train, setup.layout, moe=moe, sequence_length=setup.sequence_length, device=device)


def _of_rank(
    setup: Setup, held: tuple[Part, ...], *, in_flight: Moments, kinds: dict[bool, _Block], routed: float, messages: float
) -> RankMemory:
    layout, a = setup.layout, setup.architecture
    common, experts = (sum(both) for both in zip(*(weights_of(setup, part) for part in held), strict=True))
    if any(part.embedding for part in held) and any(reads_embedding_again(a, part) and not part.embedding for part in held):
        common -= a.vocab_size * a.hidden_size / layout.tp  # an MTP module on the first stage's rank reads its embedding (V3, 3.2.3)
    # The embedding of a pipeline's two ends has the replicas of both.
    ends = sum(part.embedding for part in held) + sum(reads_embedding_again(a, part) for part in held)
    both = layout.pp > 1 and (setup.num_mtp > 0 or a.tie_embeddings)
    twice = a.vocab_size * a.hidden_size / layout.tp if both and ends == 1 else 0.0
    # Quintet's ZeRO shares what tp leaves whole over the ranks of tp as well.
    over_tp = 0.0 if setup.megatron else sum(unsplit_weights(setup, part) for part in held) * (1 - 1 / layout.tp)
    shared, whole = _sharded(setup, common - twice / 2 - over_tp, experts), common + experts
    modules = sum(part.num_mtp for part in held)
    num_moe = sum(part.num_moe for part in held) + (modules if a.num_experts else 0)
    num_dense = sum(part.num_dense for part in held) + (0 if a.num_experts else modules)
    kept = num_dense * kinds[False].kept + num_moe * kinds[True].kept + sum(_end_bytes(setup, part) for part in held)
    put_off = num_dense * kinds[False].put_off + num_moe * kinds[True].put_off + _put_off_outside(setup, modules)
    in_all = max(whole * kept + half * put_off for whole, half in in_flight) / len(held)  # as much of each of the rank's stages
    share = max(whole + half for whole, half in in_flight) / len(held)
    present = [moe for moe, num in ((False, num_dense), (True, num_moe)) if num]
    logits = _logits_bytes(setup) if any(part.head for part in held) else 0.0
    largest = max((sum(a.block_weights(moe=moe)) for moe in present), default=0) / layout.tp / (layout.ep if num_moe else 1)
    return RankMemory(
        weights=_word(setup) * (shared if layout.zero == 3 else whole),
        gradients=setup.gradient_bytes * (shared if layout.zero >= 2 else whole),
        master_weights=0.0 if setup.precision == "fp32" else FP32 * (shared if layout.zero else whole),
        moments=2 * setup.moments_bytes * (shared if layout.zero else whole),
        gathered=2 * (_word(setup) + FP32) * largest if layout.zero == 3 else 0.0,
        activations=in_all,
        recomputation=max((kinds[moe].again for moe in present), default=0.0),
        logits=logits,
        messages=messages,
        imbalance=IMBALANCE * share * num_moe * routed if layout.ep > 1 and setup.recompute != "full" else 0.0,
        fragmentation=FRAGMENTATION * (in_all + logits + messages),
        framework=FRAMEWORK_BYTES,
    )


def _sharded(setup: Setup, common: float, experts: float) -> float:
    """Weights of which a rank holds the optimizer's state."""
    layout = setup.layout
    if not layout.zero:
        return common + experts
    if layout.zero_ranks is None:
        return common / setup.replicas + experts / setup.expert_replicas
    return common / layout.zero_ranks + experts / max(1, layout.zero_ranks * setup.expert_replicas // setup.replicas)


Moments: TypeAlias = tuple[tuple[int, int], ...]
"""At which a rank may keep most: stages' micro-batches whose input has no gradient yet, and those whose weight gradients are put off."""


def peaks_in_flight(schedule: str, num_ranks: int, num_microbatches: int, chunks: int) -> tuple[Moments, ...]:
    """Per rank, counted in the schedule itself."""
    if num_ranks == 1:
        return (((1, 0),),)
    if schedule == "gpipe":
        return (((num_microbatches, 0),),) * num_ranks
    # The peak does not grow any more once the pipeline has been full; interleaved schedules fill it with a first round, of P or a few more.
    m, p = num_microbatches, num_ranks
    if schedule.startswith("interleaved"):
        first = len(rounds(p, m)[0])
        m = 2 * first if m > 2 * first and 2 * first < 3 * p else m
    elif m > 2 * p:
        m = 2 * p
    elif schedule == "dualpipe":
        m += m % 2
    return _counted_peaks(schedule, num_ranks, m, chunks)


@lru_cache(maxsize=4096)
def _counted_peaks(schedule: str, num_ranks: int, num_microbatches: int, chunks: int) -> tuple[Moments, ...]:
    return tuple(fullest(row) for row in build(schedule, num_ranks, num_microbatches, chunks=chunks).table)


def block_bytes(setup: Setup, policy: Policy, *, moe: bool, device: Device = "cuda") -> float:
    """What a layer keeps of a micro-batch from forward for backward."""
    if (train := setup.policy) is not None:
        return _own_block(setup, train, moe=moe, device=device)
    a, tokens, tp = setup.architecture, policy.tokens, policy.tp
    kept = _full_bytes(setup, policy, moe=moe)
    if policy.recompute == "full":
        return kept + policy.recompute_share * (_word(setup) * tokens * a.hidden_size / tp - kept)
    if policy.recompute == "selective":
        again = 2 * a.hidden_size / tp  # the norms' outputs
        if a.kv_lora_rank is not None:
            again += (a.q_lora_rank or 0) + a.kv_lora_rank + a.num_heads * (2 * a.qk_head_dim + a.v_head_dim) / tp
        kept -= (1 if _low(setup) else _word(setup)) * tokens * 2 * a.hidden_size / tp + _word(setup) * tokens * (
            again - 2 * a.hidden_size / tp
        )
    return kept


def _word(setup: Setup) -> int:
    """Bytes of a weight or activation that is not cast further down."""
    return FP32 if setup.precision == "fp32" else BF16


def _low(setup: Setup) -> bool:
    """Whether inputs of products are kept as they were cast: a byte each (V3, 3.3.3)."""
    return setup.precision in ("fp8", "nvfp4")


def _inner_bytes(setup: Setup, inner: float) -> float:
    """Of a feed-forward's gate, up and product; in fp8 selective recomputation keeps gate and up in fp8, and no product (V3, 3.2.3,
    3.3.3)."""
    wide = (2 if setup.architecture.gated else 1) * inner
    if not _low(setup):
        return _word(setup) * (wide + inner)
    return wide if setup.recompute == "selective" else _word(setup) * wide + inner


def _full_bytes(setup: Setup, policy: Policy, *, moe: bool) -> float:
    """What is kept without recomputation."""
    a, tokens, tp = setup.architecture, policy.tokens, policy.tp
    low = _low(setup)
    heads, width = a.num_heads / tp, a.hidden_size / tp
    cast = 1 if low else _word(setup)
    if a.kv_lora_rank is None:
        kept = _word(setup) * (heads * a.qk_head_dim + a.num_kv_heads / tp * (a.qk_head_dim + a.v_head_dim)) + cast * heads * a.v_head_dim
    else:
        latents = 2 * ((a.q_lora_rank or 0) + a.kv_lora_rank) + a.qk_rope_head_dim
        outputs = 1 if low else 2  # our attention's output is kept a second time, as its kernel laid it out
        kept = _word(setup) * (latents + heads * (2 * a.qk_head_dim + a.v_head_dim * (1 + outputs)))
    kept += (
        2 * (_word(setup) + cast) * width + _inner_bytes(setup, (a.shared_ffn_size if moe else a.ffn_size) / tp) + FP32 * (heads + 2 / tp)
    )
    return tokens * kept + (_routed_bytes(setup, policy) if moe else 0)


def _routed_bytes(setup: Setup, policy: Policy) -> float:
    """What the routed experts of one layer keep: rows, gate, up and product."""
    a = setup.architecture
    rows = policy.tokens * policy.expert_tp / policy.tp * a.experts_per_token
    row = (1 if _low(setup) else _word(setup)) * a.hidden_size + _inner_bytes(setup, a.expert_ffn_size / policy.expert_tp)
    return rows * (row + FP32 + 2 * INDEX)


def _end_bytes(setup: Setup, part: Part) -> float:
    """Of losses and MTP modules."""
    if setup.model is not None and (train := setup.policy) is not None:
        losses = part.head + part.num_mtp
        more = {"sequence_length": setup.sequence_length, "losses": losses, "modules": part.num_mtp}
        return activations.outside_bytes(setup.model, train, setup.layout, **more) if losses else 0.0
    a, tokens = setup.architecture, setup.tokens
    losses, width = (1 if part.head else 0) + part.num_mtp, a.hidden_size
    return (
        losses * tokens * width * _word(setup) * (1 + 1 / setup.layout.tp)
        + part.num_mtp * 4 * tokens * width * _word(setup) / setup.layout.tp
    )


def _put_off_outside(setup: Setup, modules: int) -> float:
    """What MTP modules keep besides their layers for weight gradients that are put off."""
    if setup.model is None or (train := setup.policy) is None:
        return modules * _word(setup) * setup.tokens / setup.layout.tp * 3 * setup.architecture.hidden_size
    return activations.put_off_outside_bytes(
        setup.model, train, setup.layout, sequence_length=setup.sequence_length, modules=modules
    )


def _logits_bytes(setup: Setup) -> float:
    """Logits in bf16 and fp32, and their gradient, of the tokens whose logits exist at a time; in Quintet also the head's gradient."""
    if setup.model is not None and (train := setup.policy) is not None:
        return logits_bytes(setup.model, train, setup.layout, sequence_length=setup.sequence_length, modules=setup.num_mtp)
    a = setup.architecture
    tokens = min(setup.tokens, setup.loss_chunk or setup.tokens)
    return tokens * a.vocab_size / setup.layout.tp * (2 * _word(setup) + (FP32 if setup.precision != "fp32" else 0))


def _message_bytes(setup: Setup) -> float:
    """The largest message and what it becomes."""
    a, layout = setup.architecture, setup.layout
    gathered = _word(setup) * setup.tokens * a.hidden_size if layout.tp > 1 else 0.0
    rows = setup.tokens * layout.expert_tp / layout.tp * a.experts_per_token if layout.ep > 1 else 0.0
    between = _word(setup) * 2 * setup.tokens / layout.tp * a.hidden_size if layout.pp > 1 else 0.0
    return max(gathered, 2 * _word(setup) * rows * a.hidden_size) + between
