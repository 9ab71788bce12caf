"""Multi-token prediction: a module that predicts one token further from the hidden state and the next token (V3 2.2).

Letters: B batch, S sequence, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quintet.model.block import Block
from quintet.model.crossing import Steps, straight
from quintet.model.layers import Linear, RMSNorm
from quintet.model.moe import MoEStatistics
from quintet.ops.cross_entropy import IGNORED
from quintet.ops.pointwise import Kernels
from quintet.spec.model import Model


class MtpModule(nn.Module):
    """h' = M [norm(Emb(t_{i+k})); norm(h_i)], then a block (V3 eq. 21-22); embedding and head are the main model's.

    The halves of M stand in the order of the published weights (`enorm` first), not of the report's formula.
    """

    def __init__(self, model: Model, *, kernels: Kernels) -> None:
        super().__init__()
        self.embed_norm = RMSNorm(model.hidden_size, eps=model.rms_norm_eps, kernels=kernels)
        self.hidden_norm = RMSNorm(model.hidden_size, eps=model.rms_norm_eps, kernels=kernels)
        self.eh_proj = Linear(2 * model.hidden_size, model.hidden_size)
        self.block = Block(model, dense=False, kernels=kernels)
        self.norm = RMSNorm(model.hidden_size, eps=model.rms_norm_eps, kernels=kernels)

    def forward(
        self, hidden: Tensor, embedded: Tensor, rotation: tuple[Tensor, Tensor], document_ids: Tensor | None
    ) -> tuple[Tensor, MoEStatistics | None]:
        """hidden [B, S, D] of the previous depth, embedded [B, S, D] of the tokens k further -> hidden [B, S, D] before the norm."""
        return straight(self.steps(hidden, embedded, rotation, document_ids))

    def steps(
        self, hidden: Tensor, embedded: Tensor, rotation: tuple[Tensor, Tensor], document_ids: Tensor | None
    ) -> Steps[tuple[Tensor, MoEStatistics | None]]:
        """`forward`, which can be set aside where experts exchange rows."""
        x = self.eh_proj(torch.cat((self.embed_norm(embedded), self.hidden_norm(hidden)), -1))
        return (yield from self.block.steps(x, rotation, document_ids))


def shifted(labels: Tensor, places: int) -> Tensor:
    """labels [B, S] -> [B, S] moved left by `places`, IGNORED at the end: the targets of MTP depth `places`."""
    out = torch.full_like(labels, IGNORED)
    if places < labels.shape[1]:
        out[:, : labels.shape[1] - places] = labels[:, places:]
    return out
