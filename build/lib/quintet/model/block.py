"""One transformer block: latent attention and a feed-forward, each behind a norm and added to the residual stream."""

from __future__ import annotations

from torch import Tensor, nn

from quintet.model.attention import LatentAttention, LatentCache
from quintet.model.crossing import Steps, begin, carrying, straight
from quintet.model.layers import FeedForward, RMSNorm
from quintet.model.moe import MixtureOfExperts, MoEStatistics
from quintet.model.recompute import recomputed
from quintet.ops.pointwise import Kernels
from quintet.spec.model import Model


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); the feed-forward is dense or a mixture of experts."""

    def __init__(self, model: Model, *, dense: bool, kernels: Kernels) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(model.hidden_size, eps=model.rms_norm_eps, kernels=kernels)
        self.attention = LatentAttention(model, kernels=kernels)
        self.ffn_norm = RMSNorm(model.hidden_size, eps=model.rms_norm_eps, kernels=kernels)
        self.ffn: FeedForward | MixtureOfExperts = (
            FeedForward(model.hidden_size, model.dense_ffn_size, kernels=kernels) if dense else MixtureOfExperts(model, kernels=kernels)
        )
        self.recompute = False

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], document_ids: Tensor | None) -> tuple[Tensor, MoEStatistics | None]:
        """x [B, S, D] -> x [B, S, D], and the statistics of a mixture of experts."""
        return straight(self.steps(x, rotation, document_ids))

    def steps(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], document_ids: Tensor | None
    ) -> Steps[tuple[Tensor, MoEStatistics | None]]:
        """`forward`, which can be set aside where experts exchange rows."""
        normed = self.attention_norm(x)
        with recomputed((normed,), lambda: (self.attention_norm(x),), active=self.recompute):
            attended = self.attention(normed, rotation, document_ids)
        out: tuple[Tensor, MoEStatistics | None] = yield from self._feed_forward(x + attended)
        return out

    def decode(self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: LatentCache) -> Tensor:
        """New tokens [B, S, D] against the cache -> [B, S, D]."""
        x = x + self.attention.decode(self.attention_norm(x), rotation, cache)
        return straight(self._feed_forward(x))[0]

    def _feed_forward(self, x: Tensor) -> Steps[tuple[Tensor, MoEStatistics | None]]:
        normed = self.ffn_norm(x)
        with recomputed((normed,), lambda: (self.ffn_norm(x),), active=self.recompute):
            if isinstance(self.ffn, FeedForward):
                return x + self.ffn(normed), None
            # What keeps `normed` runs before the first crossing, and this context must not stay open beyond.
            begun = begin(self.ffn.steps(normed))
        (out, statistics), (x,) = yield from carrying(begun, (x,))
        return x + out, statistics
