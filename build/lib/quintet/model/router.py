"""The router of DeepSeekMoE: sigmoid scores, a bias that balances without a loss, and a choice limited to a few groups (V3 2.1.2).

Letters: T tokens, D hidden, E experts, K experts per token, B sequences, S tokens of each, P pieces of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor, nn

from quintet.ops.exact_linear import exact_linear
from quintet.spec.model import Model


@dataclass(frozen=True)
class Routing:
    """Where each token goes: experts [T, K], gates [T, K] in fp32, and all scores [T, E] in fp32.

    Where experts have a capacity, `dropped` [E] int64 counts the tokens that an expert was chosen by and did not take; in their places of
    `experts` stands E, with gate 0.
    """

    experts: Tensor
    gates: Tensor
    scores: Tensor
    dropped: Tensor | None = None


class Ahead(Protocol):
    """The seam of capacity where ranks share sequences: what came earlier in them, on other ranks. A rank's tokens of a sequence are
    `num_pieces` runs of equal length, each without a gap, and `num_ranks` ranks hold as many tokens of it."""

    num_ranks: int
    num_pieces: int

    def __call__(self, counts: Tensor) -> Tensor:
        """counts [B, P, E] of this rank's pieces -> the sums over all pieces that come earlier in the sequence [B, P, E]."""
        ...


class NothingAhead:
    """Whole sequences are here."""

    num_ranks = 1
    num_pieces = 1

    def __call__(self, counts: Tensor) -> Tensor:
        """Nothing came earlier."""
        return torch.zeros_like(counts)


def within_capacity(routing: Routing, num_sequences: int, factor: float, *, ahead: Ahead) -> Routing:
    """Drop from each expert the tokens beyond ceil(factor x S x K / E) of a sequence, S being its length on all ranks (arXiv 2101.03961).

    routing of T = num_sequences x (tokens here) tokens. Earlier tokens come first, so what follows does not change what came before.
    """
    experts, num_experts = routing.experts, routing.scores.shape[1]
    length = experts.shape[0] // max(num_sequences, 1) * ahead.num_ranks
    capacity = math.ceil(Fraction(str(factor)) * length * experts.shape[1] / num_experts)  # in decimals, as it was written
    queue = experts.view(num_sequences, ahead.num_pieces, -1 if num_sequences else 1)
    place, counts = _queues(queue, num_experts)
    room = capacity - ahead(counts)
    dropped = (place >= room.gather(2, queue)).view_as(experts)
    taken = counts.minimum(room.clamp(min=0))
    return Routing(
        experts=experts.masked_fill(dropped, num_experts),
        gates=routing.gates.masked_fill(dropped, 0.0),
        scores=routing.scores,
        dropped=(counts - taken).sum((0, 1)),
    )


def _queues(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """experts [B, P, tokens x K] in the order of tokens -> the place of each in its piece's queue for its expert, counts [B, P, E]."""
    num_queues = experts.shape[0] * experts.shape[1]
    queue = experts.reshape(num_queues, experts.shape[2]) + num_experts * torch.arange(num_queues, device=experts.device)[:, None]
    order = queue.flatten().sort(stable=True)
    first = torch.searchsorted(order.values, torch.arange(num_queues * num_experts + 1, device=experts.device))
    place = torch.empty_like(order.indices)
    place[order.indices] = torch.arange(queue.numel(), device=experts.device) - first[order.values]
    return place.view_as(experts), first.diff().view(*experts.shape[:2], num_experts)


class Router(nn.Module):
    """Chooses experts by score plus bias, and weighs them by the score alone (V3 eq. 12-16)."""

    expert_bias: Tensor

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.weight = nn.Parameter(torch.empty(model.num_routed_experts, model.hidden_size))
        # fp32 whatever the model's dtype: its updates are smaller than bf16's spacing.
        self.register_buffer("expert_bias", torch.zeros(model.num_routed_experts, dtype=torch.float32))
        # The seam of those who note choices or repeat others': x [T, D] and its best experts [T, K] -> experts [T, K].
        self.decide: Callable[[Tensor, Tensor], Tensor] = lambda x, experts: experts

    def forward(self, x: Tensor) -> Routing:
        """x [T, D] -> Routing, in fp32."""
        scores = torch.sigmoid(exact_linear(x, self.weight))
        experts = self.decide(x, self.choose(scores.detach()))
        gates = scores.gather(1, experts)
        if self.model.normalize_gates:
            gates = gates / (gates.sum(1, keepdim=True) + 1e-20)
        return Routing(experts=experts, gates=gates * self.model.routed_scaling_factor, scores=scores)

    def choose(self, scores: Tensor) -> Tensor:
        """scores [T, E] -> experts [T, K]: the best by biased score within the groups whose best two sum highest."""
        biased = scores + self.expert_bias
        groups = self.model.num_groups
        if groups > 1 and self.model.num_groups_per_token < groups:
            grouped = biased.unflatten(1, (groups, -1))
            best = grouped.topk(2, dim=2).values.sum(2).topk(self.model.num_groups_per_token, dim=1).indices
            open_groups = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, best, True)
            biased = grouped.masked_fill(~open_groups[:, :, None], -torch.inf).flatten(1)
        return biased.topk(self.model.num_experts_per_token, dim=1).indices


@torch.no_grad()
def updated_bias(bias: Tensor, load: Tensor, speed: float) -> Tensor:
    """bias [E], load [E] (tokens of the whole batch) -> bias [E]: up by `speed` where underloaded, down where overloaded.

    arXiv 2408.15664, Algorithm 1: b_i + u sign(mean(c) - c_i).
    """
    load = load.to(bias.dtype)
    return bias + speed * torch.sign(load.mean() - load)


def count_choices(scores: Tensor, num_sequences: int, experts_per_token: int) -> Tensor:
    """scores [T, E], T = num_sequences * S -> how many tokens of each sequence have an expert among their best K: [B, E] in their type,
    without gradient. Where ranks hold parts of the sequences, the sum over the ranks is that of the whole ones."""
    per_sequence = _by_sequence(scores.detach(), num_sequences)
    chosen = per_sequence.topk(experts_per_token, dim=2).indices.flatten(1)
    count = torch.zeros(num_sequences, scores.shape[1], dtype=scores.dtype, device=scores.device)
    return count.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=scores.dtype))


def sum_affinities(scores: Tensor, num_sequences: int) -> Tensor:
    """scores [T, E], T = num_sequences * S -> the sum over the tokens of each sequence of an expert's part of all scores: [B, E]."""
    per_sequence = _by_sequence(scores, num_sequences)
    return (per_sequence / per_sequence.sum(2, keepdim=True)).sum(1)


def _by_sequence(scores: Tensor, num_sequences: int) -> Tensor:
    return scores.view(num_sequences, -1 if num_sequences else 1, scores.shape[1])


def sequence_balance_loss(count: Tensor, affinity: Tensor, experts_per_token: int) -> Tensor:
    """V3 eq. 17-20 without alpha, of any layers [.., B, E] -> the sum over layers and sequences of sum_i f_i P_i.

    `count` (see count_choices) is that of whole sequences. f is a constant to the gradient and P a mean over tokens, so with a rank's own
    `affinity` (see sum_affinities) the results of the ranks are shares that add up, and so do their gradients.
    """
    length = count.sum(-1, keepdim=True) / experts_per_token
    f = count * (count.shape[-1] / experts_per_token) / length
    return (f * affinity / length).sum()
