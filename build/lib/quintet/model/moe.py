"""DeepSeekMoE: shared experts that every token passes, and fine-grained routed ones (V3 2.1.2).

Letters: T tokens, N token-expert rows (padded per expert), D hidden, F expert inner width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from quintet.model.crossing import Steps, straight
from quintet.model.layers import FeedForward
from quintet.model.router import Ahead, NothingAhead, Router, Routing, count_choices, sum_affinities, within_capacity
from quintet.ops.grouped_matmul import grouped_matmul
from quintet.ops.permute import collect, sort_by_expert, spread, spread_gates
from quintet.ops.pointwise import Kernels
from quintet.spec.model import Model


@dataclass(frozen=True)
class MoEStatistics:
    """Of one MoE layer and micro-batch: load [E] (tokens that chose each expert, int64), how many of these it had no capacity for [E], and
    what the balance loss is made of, count and affinity [B, E] (see router.count_choices, sum_affinities); where sequences are shared out
    over ranks, this rank's share of each."""

    load: Tensor
    dropped: Tensor
    count: Tensor
    affinity: Tensor


class Experts(nn.Module):
    """The routed experts' feed-forwards, computed over rows sorted by expert."""

    def __init__(self, model: Model, *, kernels: Kernels) -> None:
        super().__init__()
        self.w13 = nn.Parameter(torch.empty(model.num_routed_experts, 2, model.expert_ffn_size, model.hidden_size))
        self.w2 = nn.Parameter(torch.empty(model.num_routed_experts, model.hidden_size, model.expert_ffn_size))
        self.kernels = kernels

    def forward(self, rows: Tensor, gates: Tensor, ends: Tensor) -> Tensor:
        """rows [N, D], gates [N], ends [E] (row where each expert's part stops) -> [N, D], each row times its gate."""
        gate_up = grouped_matmul(rows, self.w13, ends)
        return grouped_matmul(self.kernels.scaled_swiglu(gate_up, gates), self.w2, ends)


class Dispatch(Protocol):
    """The seam that expert parallelism replaces: bring rows to their experts, compute, bring the sums back. `experts` holds this rank's
    experts only, all of them where it is alone."""

    def __call__(
        self, x: Tensor, routing: Routing, experts: Experts, beside: Callable[[], tuple[Tensor, ...]]
    ) -> Steps[tuple[Tensor, tuple[Tensor, ...], Tensor]]:
        """x [T, D] -> the gated sum of each token's experts [T, D], what `beside` returns, which is computed while rows are under way, and
        how many of these tokens went to each expert [E]."""
        ...


def local_dispatch(
    x: Tensor, routing: Routing, experts: Experts, beside: Callable[[], tuple[Tensor, ...]]
) -> Steps[tuple[Tensor, tuple[Tensor, ...], Tensor]]:
    """All experts are here: sort, compute, add up. Nothing is sent, so nothing is set aside."""
    yield from ()
    permutation = sort_by_expert(routing.experts, experts.w2.shape[0], spare=routing.dropped is not None)
    rows = experts(spread(x, permutation), spread_gates(routing.gates, permutation), permutation.ends)
    return collect(rows, permutation), beside(), permutation.load


class MixtureOfExperts(nn.Module):
    """Shared plus routed experts. `dispatch` is a seam, and so is `ahead`."""

    def __init__(self, model: Model, *, kernels: Kernels) -> None:
        super().__init__()
        self.model = model
        self.router = Router(model)
        self.experts = Experts(model, kernels=kernels)
        self.shared = (
            FeedForward(model.hidden_size, model.num_shared_experts * model.expert_ffn_size, kernels=kernels)
            if model.num_shared_experts
            else None
        )
        self.dispatch: Dispatch = local_dispatch
        self.ahead: Ahead = NothingAhead()

    def forward(self, x: Tensor) -> tuple[Tensor, MoEStatistics]:
        """x [B, S, D] -> [B, S, D] and the layer's statistics."""
        return straight(self.steps(x))

    def steps(self, x: Tensor) -> Steps[tuple[Tensor, MoEStatistics]]:
        """`forward`, which can be set aside where experts exchange rows."""
        tokens = x.flatten(0, 1)
        routing = self.router(tokens)
        if self.model.capacity_factor is not None:
            routing = within_capacity(routing, x.shape[0], self.model.capacity_factor, ahead=self.ahead)

        count = count_choices(routing.scores, x.shape[0], self.model.num_experts_per_token)

        def beside() -> tuple[Tensor, ...]:
            affinity = sum_affinities(routing.scores, x.shape[0])
            return (affinity,) if self.shared is None else (affinity, self.shared(tokens))

        out, (affinity, *shared), load = yield from self.dispatch(tokens, routing, self.experts, beside)
        for term in shared:
            out = out + term
        dropped = torch.zeros_like(load) if routing.dropped is None else routing.dropped
        return out.view_as(x), MoEStatistics(load=load + dropped, dropped=dropped, count=count, affinity=affinity)
