"""Every kind of call that a CPU's step is made of, measured on a rank while the others do the same, since they share memory and caches.

Figures (`spec.cluster.Eager`) are fitted to a few sizes each by least squares of relative errors. Weights come from a pool that no cache
holds, as in a step. What a layer does besides products and attention is what a real one takes longer: `measured_layers`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw

from quintet.ops.attention import attend_block, attend_block_backward, attention
from quintet.parallel import collectives
from quintet.parallel.collectives import Group
from quintet.plan.eager_time import core_work
from quintet.spec.cluster import Calls
from quintet.spec.model import Model
from quintet.train.stopwatch import Sample, both_ways, fit, least_of_message, seconds_of

POOL_BYTES = 1 << 26
"""Of weights and gradients that take turns, so that no cache holds them."""
PRODUCTS = tuple(itertools.product((64, 256, 1024), ((256, 256), (512, 128), (128, 512), (1024, 256), (256, 1024))))
"""Rows; outputs and inputs."""
GROUPED = tuple(itertools.product((8, 32, 128), ((512, 256), (256, 256), (256, 128))))
"""Rows of each expert; outputs and inputs."""
NUM_EXPERTS = 16
MESSAGES = (1 << 12, 1 << 17, 1 << 20, 1 << 23)
"""Bytes of a whole message."""
SEQUENCES = ((1, 64), (1, 256), (4, 256))
"""Sequences and tokens of each, that a layer and attention are measured with."""
MODEL = Model(
    vocab_size=4096,
    hidden_size=256,
    num_layers=2,
    num_dense_layers=1,
    num_heads=4,
    q_lora_rank=128,
    kv_lora_rank=64,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    dense_ffn_size=768,
    expert_ffn_size=256,
    num_routed_experts=NUM_EXPERTS,
    num_shared_experts=1,
    num_experts_per_token=4,
)
"""Whose layers are measured."""


def products() -> list[Calls]:
    """Of a product with a weight, of its input's gradient and of its weight's."""
    samples: list[list[Sample]] = [[], [], []]
    for rows, (outputs, inputs) in PRODUCTS:
        weights = _pool(outputs, inputs)
        x, gradient = (torch.randn(rows, width).bfloat16() for width in (inputs, outputs))
        works = (lambda: x @ next(weights).t(), lambda: gradient @ next(weights), lambda: gradient.t() @ x)  # noqa: B023
        work, moved = 2 * rows * outputs * inputs, 2 * (rows * (outputs + inputs) + outputs * inputs)
        for kind, one in zip(samples, works, strict=True):
            kind.append(Sample(seconds=seconds_of(one), flops=work, num_bytes=moved))
    return [fit(kind) for kind in samples]


def grouped_products() -> list[Calls]:
    """The same of a grouped product; a call for each expert."""
    samples: list[list[Sample]] = [[], [], []]
    for rows, (outputs, inputs) in GROUPED:
        weights = _pool(NUM_EXPERTS, outputs, inputs)
        x, gradient = (torch.randn(NUM_EXPERTS * rows, width).bfloat16() for width in (inputs, outputs))
        ends = torch.arange(1, NUM_EXPERTS + 1, dtype=torch.int32) * rows
        works = (
            lambda: F.grouped_mm(x, next(weights).transpose(1, 2), offs=ends),  # noqa: B023
            lambda: F.grouped_mm(gradient, next(weights), offs=ends),  # noqa: B023
            lambda: F.grouped_mm(gradient.t(), x, offs=ends),  # noqa: B023
        )
        work = 2 * NUM_EXPERTS * rows * outputs * inputs
        moved = 2 * NUM_EXPERTS * (rows * (outputs + inputs) + outputs * inputs)
        for kind, one in zip(samples, works, strict=True):
            kind.append(Sample(seconds=seconds_of(one), calls=NUM_EXPERTS, flops=work, num_bytes=moved))
    return [fit(kind) for kind in samples]


def core_attention() -> tuple[Calls, Calls]:
    """Forward and backward."""
    samples: tuple[list[Sample], list[Sample]] = ([], [])
    for sequences, length in SEQUENCES:
        q, k, v = _heads(sequences, length)
        calls, flops = core_work(sequences, length, heads=MODEL.num_heads, widths=MODEL.qk_head_dim + MODEL.v_head_dim)
        both = both_ways(lambda q=q, k=k, v=v: attention(q, k, v, scale=0.1), (q, k, v))  # type: ignore[misc]
        for kind, seconds, factor in zip(samples, both, (1, 2.5), strict=True):
            kind.append(Sample(seconds=seconds, calls=calls, flops=factor * flops))
    return fit(samples[0]), fit(samples[1])


def ring_attention() -> tuple[Calls, Calls]:
    """One part of a ring, forward and backward."""
    samples: tuple[list[Sample], list[Sample]] = ([], [])
    for sequences, length in SEQUENCES:
        q, k, v = (x.detach() for x in _heads(sequences, length))
        calls, flops = core_work(sequences, length, heads=MODEL.num_heads, widths=MODEL.qk_head_dim + MODEL.v_head_dim)
        out, lse = attend_block(q, k, v, scale=0.1, causal=True)
        works = (
            lambda: attend_block(q, k, v, scale=0.1, causal=True),  # noqa: B023
            lambda: attend_block_backward(out, q, k, v, out, lse, scale=0.1, causal=True),  # noqa: B023
        )
        for kind, one, factor in zip(samples, works, (1, 2.5), strict=True):
            kind.append(Sample(seconds=seconds_of(one), calls=calls, flops=factor * flops))
    return fit(samples[0]), fit(samples[1])


def accumulating() -> Calls:
    """Adding a weight's gradient in bf16 to one in fp32."""
    numel = 1 << 18
    sums, gradients = itertools.cycle(torch.zeros(POOL_BYTES // 4).split(numel)), torch.randn(numel).bfloat16()
    return Calls(per_byte=seconds_of(lambda: next(sums).add_(gradients)) / (2 * numel))


def updating() -> Calls:
    """The gradient's norm, AdamW and the new weights in bf16, as `train.optimizer` goes through a bucket."""
    numel = POOL_BYTES // 16
    master, gradient, first, second = (torch.zeros(numel) for _ in range(4))
    weights, count = torch.zeros(numel, dtype=torch.bfloat16), torch.tensor(1.0)

    def update() -> None:
        torch._foreach_norm([gradient], 2, dtype=torch.float32)
        gradient.mul_(0.5)
        adamw(
            [master],
            [gradient],
            [first],
            [second],
            [],
            [count],
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.95,
            lr=1e-3,
            weight_decay=0.1,
            eps=1e-8,
            maximize=False,
        )
        weights.copy_(master)

    return Calls(per_byte=seconds_of(update) / (2 * numel))


def messages(group: Group) -> dict[str, Calls]:
    """Each kind of message, by the bytes that this rank sends; nothing where it is alone."""
    kinds: dict[str, tuple[Callable[[Tensor], object], float]] = {
        "gather": (lambda whole: collectives.all_gather(whole[: len(whole) // group.size], group), 1.0),
        "scatter": (lambda whole: collectives.reduce_scatter(whole, group), 1.0),
        "reduce": (lambda whole: collectives.all_reduce(whole, group), 2.0),
        "exchange": (lambda whole: collectives.all_to_all(whole, group, send=even, receive=even), 1.0),
        "send": (lambda whole: collectives.Shift([whole], group).wait(), group.size / max(1, group.size - 1)),
    }
    if group.size == 1:
        return dict.fromkeys(kinds, Calls())
    found = {}
    for name, (send, times) in kinds.items():
        samples = []
        for size in MESSAGES:
            numel = size // 4 // group.size * group.size
            whole, even = torch.zeros(numel), [numel // group.size] * group.size
            seconds = least_of_message(lambda send=send, whole=whole: send(whole))  # type: ignore[misc]
            samples.append(Sample(seconds=seconds, num_bytes=times * 4 * numel * (group.size - 1) / group.size))
        found[name] = fit(samples)
    return found


def _pool(*shape: int) -> itertools.cycle[Tensor]:
    """Weights in bf16 that take turns."""
    numel = torch.Size(shape).numel()
    return itertools.cycle(torch.full((max(1, POOL_BYTES // 2 // numel), *shape), 0.05, dtype=torch.bfloat16))


def _heads(sequences: int, length: int) -> list[Tensor]:
    widths = (MODEL.qk_head_dim, MODEL.qk_head_dim, MODEL.v_head_dim)
    return [torch.randn(sequences, MODEL.num_heads, length, width).bfloat16().requires_grad_() for width in widths]
