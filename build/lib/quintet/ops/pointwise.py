"""Element-wise operations of the model: plain references, and the same functions fused by torch.compile.

Letters: T tokens, B batch, S sequence, D hidden, F inner width, N width of q/k without rotary embedding, R rotary width,
V width of the value, H heads, C vocabulary.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D], weight [D] -> [..., D]: x / sqrt(mean(x^2) + eps) * weight, in fp32 inside (arXiv 1910.07467)."""
    x_fp32 = x.float()
    return (x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2F] -> [..., F]: silu(first half) * second half (arXiv 2002.05202)."""
    gate, up = gate_up.float().chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def scaled_swiglu(gate_up: Tensor, scale: Tensor) -> Tensor:
    """[T, 2F], scale [T] -> [T, F]: swiglu times a factor per row (the router's gate)."""
    gate, up = gate_up.float().chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up * scale[:, None]).to(gate_up.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn interleaved pairs (V3's convention): x [..., R], cos and sin [..., R/2] that broadcast -> [..., R]."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


def assemble_qkv(q: Tensor, kv: Tensor, k_pe: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate and lay out the heads of latent attention (V2 2.1.2-2.1.3).

    q [B, S, H, N+R], kv [B, S, H, N+V], k_pe [B, S, R] shared by all heads, cos and sin [S, R/2]
    -> q [B, H, S, N+R], k [B, H, S, N+R], v [B, H, S, V], each contiguous.
    """
    rope_dim = k_pe.shape[-1]
    nope_dim = q.shape[-1] - rope_dim
    q_nope, q_pe = q.split((nope_dim, rope_dim), -1)
    k_nope, v = kv.split((nope_dim, kv.shape[-1] - nope_dim), -1)
    q_pe = rotate(q_pe, cos[:, None], sin[:, None])
    k_pe = rotate(k_pe, cos, sin)[:, :, None].expand(-1, -1, q.shape[2], -1)
    heads_first = (t.transpose(1, 2).contiguous() for t in (torch.cat((q_nope, q_pe), -1), torch.cat((k_nope, k_pe), -1), v))
    q, k, v = heads_first
    return q, k, v


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """logits [T, C], labels [T] (negative: ignored) -> loss [T] in fp32 (0 where ignored), its gradient [T, C]."""
    logits_fp32 = logits.float()
    log_sum = logits_fp32.logsumexp(-1, keepdim=True)
    valid = (labels >= 0)[:, None]
    target = labels.clamp(min=0)[:, None]
    loss = (log_sum - logits_fp32.gather(1, target)).masked_fill(~valid, 0.0)
    classes = torch.arange(logits.shape[1], device=logits.device)[None]
    grad = torch.where(valid, (logits_fp32 - log_sum).exp() - (classes == target).float(), 0.0)
    return loss[:, 0], grad.to(logits.dtype)


def part_of_cross_entropy(logits: Tensor, target: Tensor, here: Tensor) -> tuple[Tensor, Tensor]:
    """What the ranks of a split vocabulary tell each other: logits [T, C/n], target [T] (a class here), whether the label is here [T] ->
    the log-sum-exp of this part, and the label's logit, 0 where it is elsewhere: [T] each, in fp32."""
    logits_fp32 = logits.float()
    return logits_fp32.logsumexp(-1), logits_fp32.gather(1, target[:, None])[:, 0].where(here, 0.0)


def part_of_its_gradient(logits: Tensor, log_sum: Tensor, target: Tensor, here: Tensor, valid: Tensor) -> Tensor:
    """As above, with the log-sum-exp of all parts [T] and whether there is a label at all [T] -> the gradient of this part [T, C/n]."""
    classes = torch.arange(logits.shape[1], device=logits.device)[None]
    label = (classes == target[:, None]) & here[:, None]
    return torch.where(valid[:, None], (logits.float() - log_sum[:, None]).exp() - label.float(), 0.0).to(logits.dtype)


@dataclass(frozen=True)
class Kernels:
    """The set of element-wise functions that a model calls; signatures as the references above."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    swiglu: Callable[[Tensor], Tensor]
    scaled_swiglu: Callable[[Tensor, Tensor], Tensor]
    assemble_qkv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    cross_entropy: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    part_of_cross_entropy: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    part_of_its_gradient: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


REFERENCE = Kernels(rms_norm, swiglu, scaled_swiglu, assemble_qkv, cross_entropy, part_of_cross_entropy, part_of_its_gradient)
_OF_THE_LOSS = ("cross_entropy", "part_of_cross_entropy", "part_of_its_gradient")


class _Fused:
    """The compiled function where gradients are recorded, the reference elsewhere.

    Training calls every function with one shape a step; evaluation and generation come with many shapes, each of which would
    compile again.
    """

    def __init__(self, reference: Callable[..., Any], *, always: bool = False) -> None:
        self.reference, self.always = reference, always
        self.compiled = torch.compile(reference, dynamic=False, fullgraph=True)

    def __call__(self, *args: Any) -> Any:
        return (self.compiled if self.always or torch.is_grad_enabled() else self.reference)(*args)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has what it needs: a C++ compiler on CPU, Triton on CUDA."""
    if device.type == "cuda":
        return torch.utils._triton.has_triton()
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def fused() -> Kernels:
    """The references compiled by Inductor; the first call of each takes about a second, once per shape."""
    torch._dynamo.config.recompile_limit = 64
    # The loss is computed inside an autograd function, where no gradient is recorded.
    return Kernels(*(_Fused(getattr(REFERENCE, name), always=name in _OF_THE_LOSS) for name in Kernels.__dataclass_fields__))
