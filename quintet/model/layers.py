"""The small parts that every block is made of: linear map, RMSNorm, gated feed-forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quintet.ops.pointwise import Kernels


class Linear(nn.Module):
    """y = x W^T without bias: [..., I] -> [..., O]. The seam that an FP8 linear replaces."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class RMSNorm(nn.Module):
    """[..., D] -> [..., D] with a learned scale (arXiv 1910.07467)."""

    def __init__(self, size: int, *, eps: float, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.kernels = eps, kernels

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.weight, self.eps)


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x): [T, D] -> [T, D]. w1 and w3 are stored as one tensor [2, F, D] so that one product serves both."""

    def __init__(self, hidden_size: int, ffn_size: int, *, kernels: Kernels) -> None:
        super().__init__()
        self.w13 = nn.Parameter(torch.empty(2, ffn_size, hidden_size))
        self.w2 = nn.Parameter(torch.empty(hidden_size, ffn_size))
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.kernels.swiglu(F.linear(x, self.w13.flatten(0, 1))), self.w2)
