"""The small parts that every block is made of: linear map, RMSNorm, gated feed-forward; and the seam where a sequence is shared out."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from quintet.model.recompute import recomputed
from quintet.ops.deferred import linear
from quintet.ops.pointwise import Kernels


class Exchange(Protocol):
    """The seam of tensor parallelism around products whose weights are split: tokens come in from, and sums go back to, the ranks that
    share a sequence (arXiv 2205.05198, section 4.2.2). Alone, both do nothing.
    """

    def gather(self, *shards: Tensor, dim: int) -> tuple[Tensor, ...]:
        """Tensors that hold this rank's tokens along `dim` -> the same with the tokens of all ranks, in their order."""
        ...

    def scatter(self, partial: Tensor, *, dim: int) -> Tensor:
        """This rank's term of a sum over the ranks, for all tokens -> the whole sum, for this rank's tokens along `dim`."""
        ...


class Alone:
    """The exchange of a single device."""

    def gather(self, *shards: Tensor, dim: int) -> tuple[Tensor, ...]:
        """All tokens are here."""
        return shards

    def scatter(self, partial: Tensor, *, dim: int) -> Tensor:
        """All terms are here."""
        return partial


class Linear(nn.Module):
    """y = x W^T without bias: [..., I] -> [..., O]. The seam that an FP8 linear replaces."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class RMSNorm(nn.Module):
    """[..., D] -> [..., D] with a learned scale (arXiv 1910.07467)."""

    def __init__(self, size: int, *, eps: float, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.kernels = eps, kernels

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.weight, self.eps)


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x): [..., D] -> [..., D]. w1 and w3 are stored as one tensor [2, F, D] so that one product serves both."""

    def __init__(self, hidden_size: int, ffn_size: int, *, kernels: Kernels) -> None:
        super().__init__()
        self.w13 = nn.Parameter(torch.empty(2, ffn_size, hidden_size))
        self.w2 = nn.Parameter(torch.empty(hidden_size, ffn_size))
        self.kernels = kernels
        self.exchange: Exchange = Alone()
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        own = x.flatten(0, -2)
        (tokens,) = self.exchange.gather(own, dim=0)
        # Whoever shares the tokens out keeps its own, and gathers the others' again (arXiv 2205.05198, section 4.2.2).
        with recomputed((tokens,), lambda: self.exchange.gather(own, dim=0), active=self.recompute and tokens is not own):
            gate_up = linear(tokens, self.w13)
        return self.exchange.scatter(linear(self.kernels.swiglu(gate_up), self.w2), dim=0).view_as(x)
