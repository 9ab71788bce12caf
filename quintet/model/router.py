"""The router of DeepSeekMoE: sigmoid scores, a bias that balances without a loss, and a choice limited to a few groups (V3 2.1.2).

Letters: T tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quintet.ops.exact_linear import exact_linear
from quintet.spec.model import Model


@dataclass(frozen=True)
class Routing:
    """Where each token goes: experts [T, K], gates [T, K] in fp32, and all scores [T, E] in fp32."""

    experts: Tensor
    gates: Tensor
    scores: Tensor


class Router(nn.Module):
    """Chooses experts by score plus bias, and weighs them by the score alone (V3 eq. 12-16)."""

    expert_bias: Tensor

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.weight = nn.Parameter(torch.empty(model.num_routed_experts, model.hidden_size))
        # fp32 whatever the model's dtype: its updates are smaller than bf16's spacing.
        self.register_buffer("expert_bias", torch.zeros(model.num_routed_experts, dtype=torch.float32))

    def forward(self, x: Tensor) -> Routing:
        """x [T, D] -> Routing, in fp32."""
        scores = torch.sigmoid(exact_linear(x, self.weight))
        experts = self.choose(scores.detach())
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


def sequence_balance_loss(
    scores: Tensor, num_sequences: int, experts_per_token: int, *, whole_count: Callable[[Tensor], Tensor] = lambda count: count
) -> Tensor:
    """V3 eq. 17-20 without alpha: scores [T, E], T = num_sequences * S -> the sum over sequences of sum_i f_i P_i.

    Where ranks hold parts of the sequences, `whole_count` adds up their counts [B, E]; f is a constant to the gradient and P a mean over
    tokens, so the results of the ranks are shares that add up, and so do their gradients.
    """
    per_sequence = scores.view(num_sequences, -1 if num_sequences else 1, scores.shape[1])
    chosen = per_sequence.detach().topk(experts_per_token, dim=2).indices.flatten(1)
    count = torch.zeros(num_sequences, scores.shape[1], dtype=scores.dtype, device=scores.device)
    count = whole_count(count.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=scores.dtype)))
    length = count.sum(1, keepdim=True) / experts_per_token
    f = count * (scores.shape[1] / experts_per_token) / length
    p = (per_sequence / per_sequence.sum(2, keepdim=True)).sum(1) / length
    return (f * p).sum()
