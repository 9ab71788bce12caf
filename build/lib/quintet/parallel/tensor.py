"""Tensor parallelism: heads, feed-forwards and vocabulary are split over a group of ranks, and so are the tokens between them.

Each rank holds S/n consecutive tokens of the sequences of its group, except inside a split product: there the tokens of all ranks come in
by an all-gather, and the ranks' terms of the result go out by a reduce-scatter (arXiv 2205.05198, section 4.2.2). Letters: B batch,
S sequence, T tokens, D hidden, C vocabulary, E experts, n ranks of the group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from quintet.model.attention import LatentAttention
from quintet.model.layers import FeedForward
from quintet.model.moe import MixtureOfExperts
from quintet.model.transformer import Embedding, Transformer
from quintet.ops.cross_entropy import CrossEntropy, head_loss
from quintet.ops.pointwise import REFERENCE, Kernels
from quintet.parallel.collectives import Group, all_gather, all_reduce, gather_tokens, scatter_tokens
from quintet.parallel.mesh import Mesh
from quintet.spec.layout import Layout


def apply_tensor(model: Transformer, mesh: Mesh) -> None:
    """Set the seams of a model whose parameters are this rank's parts (see spec.placement); where nothing is split, do nothing.

    Its inputs and labels stay whole, [B, S] of all tokens of the group, and its losses become shares, whose sum over the ranks is the
    loss. What is not split (norms, latent down-projections, routers, eh_proj) sees this rank's tokens or heads, so its gradient is
    a share too.
    """
    tp, sequence = mesh["tp"], mesh["sequence"]
    for module in model.modules():
        if isinstance(module, MixtureOfExperts) and sequence.size > 1:
            module.ahead = AheadOnRanks(sequence, mesh.layout)
        if isinstance(module, LatentAttention | FeedForward) and tp.size > 1:
            module.exchange = TokenExchange(tp)
        if isinstance(module, Embedding) and tp.size > 1:
            module.lookup = vocabulary_lookup(tp)
    if sequence.size > 1:
        model.whole_count = lambda count: all_reduce(count, sequence)
    if tp.size > 1:
        model.head_loss = VocabularyParallelLoss(tp, model.kernels)


@dataclass(frozen=True)
class TokenExchange:
    """The exchange (see model.layers) of ranks that split a product: [.., a, ..] -> [.., n a, ..] in, and sums [.., a, ..] out."""

    group: Group

    def gather(self, *shards: Tensor, dim: int) -> tuple[Tensor, ...]:
        """Tokens of all ranks, in one message; backward adds up the ranks' gradients."""
        return gather_tokens(shards, self.group, dim=dim)

    def scatter(self, partial: Tensor, *, dim: int) -> Tensor:
        """The sum over the ranks, for this rank's tokens; backward gathers."""
        return scatter_tokens(partial, self.group, dim=dim)


def vocabulary_lookup(group: Group) -> Callable[[Tensor, Tensor], Tensor]:
    """The lookup of an embedding whose rows are split: tokens [B, S], weight [C/n, D] -> [B, S/n, D]."""

    def lookup(tokens: Tensor, weight: Tensor) -> Tensor:
        row, here = _row_here(tokens, weight.shape[0], group)
        return scatter_tokens(F.embedding(row, weight).masked_fill(~here[..., None], 0.0), group, dim=1)

    return lookup


@dataclass(frozen=True)
class VocabularyParallelLoss:
    """The loss (see transformer.HeadLoss) of a head whose rows are split, without ever putting its logits together.

    Every rank computes the loss of all tokens from its part of their logits and returns an n-th of it.
    """

    group: Group
    kernels: Kernels = REFERENCE

    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk: int, kernel: CrossEntropy) -> Tensor:
        """hidden [B, S/n, D], weight [C/n, D], labels [B, S] (negative: ignored) -> this rank's share of the sum of the losses."""
        (tokens,) = gather_tokens([hidden.flatten(0, 1)], self.group, dim=0)  # rank by rank
        labels = labels.unflatten(1, (self.group.size, -1)).movedim(1, 0).flatten()
        if torch.is_grad_enabled():
            return head_loss(tokens, weight, labels, chunk=chunk, kernel=self.share)
        pieces = zip(tokens.split(chunk), labels.split(chunk), strict=True)
        plain = replace(self, kernels=REFERENCE)  # evaluation comes with many shapes, each of which would compile anew
        return torch.stack([tokens.new_zeros((), dtype=torch.float32), *(plain.share(t @ weight.t(), l)[0].sum() for t, l in pieces)]).sum()

    def share(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """ops.pointwise.cross_entropy over a split vocabulary, the loss divided by n: logits [T, C/n], labels [T] -> [T], [T, C/n].

        Ranks exchange two numbers per token: the log-sum-exp of their part, and the label's logit if it is theirs.
        """
        target, here = _row_here(labels, logits.shape[1], self.group)
        own = torch.stack(self.kernels.part_of_cross_entropy(logits, target, here))
        parts = all_gather(own[None], self.group)
        log_sum, valid = parts[:, 0].logsumexp(0), labels >= 0
        loss = (log_sum - parts[:, 1].sum(0)).where(valid, 0.0)
        return loss / self.group.size, self.kernels.part_of_its_gradient(logits, log_sum, target, here, valid)


def _row_here(ids: Tensor, num_rows: int, group: Group) -> tuple[Tensor, Tensor]:
    """ids [..] -> their rows in this rank's part of the vocabulary (any other row where they lie elsewhere), and whether they lie in it."""
    row = ids - group.rank * num_rows
    return row.clamp(0, num_rows - 1), (row >= 0) & (row < num_rows)


class AheadOnRanks:
    """What came earlier in sequences that the ranks of `group` share (see router.Ahead).

    A rank of cp holds the chunks r and 2 cp - 1 - r of 2 cp, and its ranks of tp consecutive parts of these; so that every piece lies in
    one chunk, an odd tp cuts its parts in two.
    """

    def __init__(self, group: Group, layout: Layout) -> None:
        self.group, self.num_ranks = group, group.size
        self.num_pieces = 2 if layout.cp > 1 and layout.tp % 2 else 1
        per_cp = layout.tp * self.num_pieces
        self.places = [_place(piece, piece // per_cp, layout.cp, per_cp) for piece in range(layout.cp * per_cp)]

    def __call__(self, counts: Tensor) -> Tensor:
        """counts [B, P, E] of this rank -> [B, P, E]."""
        pieces = all_gather(counts.transpose(0, 1).contiguous(), self.group)  # [n P, B, E]
        places = torch.tensor(self.places, device=counts.device)
        ordered = torch.empty_like(pieces)
        ordered[places] = pieces
        earlier = (ordered.cumsum(0) - ordered)[places]
        return earlier[self.group.rank * self.num_pieces :][: self.num_pieces].transpose(0, 1)


def _place(piece: int, cp_rank: int, cp: int, per_cp: int) -> int:
    """Where in the sequence a piece lies, counted in pieces; `per_cp` of them lie on each rank of cp."""
    if cp == 1:
        return piece
    half, within = per_cp // 2, piece % per_cp
    chunk = cp_rank if within < half else 2 * cp - 1 - cp_rank
    return chunk * half + within % half
