"""Rotary position embedding and its YaRN extension, as V3 applies them (arXiv 2104.09864, 2309.00071; V3 4.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quintet.spec.model import Model, Yarn


def frequencies(model: Model, device: torch.device) -> Tensor:
    """Angular frequency of each rotated pair: [R/2], fp32, in radians per token."""
    half = torch.arange(0, model.qk_rope_head_dim, 2, dtype=torch.float32, device=device)
    plain = 1.0 / model.rope_theta ** (half / model.qk_rope_head_dim)
    if model.yarn is None:
        return plain
    return _extended(plain, model.yarn, theta=model.rope_theta, dim=model.qk_rope_head_dim)


def _extended(plain: Tensor, yarn: Yarn, *, theta: float, dim: int) -> Tensor:
    """YaRN 3.2: pairs that turn often keep their frequency, slow ones are divided by the factor, a ramp lies between."""

    def pair_with(rotations: float) -> float:
        return dim * math.log(yarn.original_context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with(yarn.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device=plain.device) - low) / max(high - low, 0.001)
    slowed = ramp.clamp(0, 1)
    return plain / yarn.factor * slowed + plain * (1 - slowed)


def _mscale(factor: float, weight: float) -> float:
    """YaRN's attention temperature, 0.1 w ln(s) + 1."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(model: Model) -> float:
    """Scale of the attention logits: 1/sqrt(width), times the squared mscale under YaRN (V3 4.3)."""
    scale = model.qk_head_dim**-0.5
    if model.yarn and model.yarn.mscale_all_dim:
        scale *= _mscale(model.yarn.factor, model.yarn.mscale_all_dim) ** 2
    return scale


def rotation(model: Model, positions: Tensor) -> tuple[Tensor, Tensor]:
    """positions [S] -> cos and sin, each [S, R/2] in fp32, scaled by YaRN's ratio of mscales."""
    angles = torch.outer(positions.float(), frequencies(model, positions.device))
    ratio = 1.0
    if model.yarn:
        if model.yarn.mscale and model.yarn.mscale_all_dim:
            ratio = _mscale(model.yarn.factor, model.yarn.mscale) / _mscale(model.yarn.factor, model.yarn.mscale_all_dim)
        else:
            ratio = _mscale(model.yarn.factor, 1.0)
    return angles.cos() * ratio, angles.sin() * ratio
