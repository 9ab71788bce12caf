"""Expert parallelism: the routed experts are divided over a group of ranks, and each token's rows travel to its experts and back.

Dropless: as many rows are sent as tokens chose the experts of a rank, none or all of them (uneven all-to-all). The four stages of
`AllToAllDispatch` stand alone so that they can be overlapped. Letters: T tokens, K experts per token, D hidden, E experts, e = E/n
experts of this rank, N rows, n ranks of the group, t ranks that share each expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from quintet.model.moe import Experts
from quintet.model.router import Routing
from quintet.model.transformer import Transformer
from quintet.ops.permute import Permutation, collect, regroup_by_expert, sort_by_expert, spread, spread_gates
from quintet.parallel.collectives import Group, all_gather, all_to_all, exchange_rows, gather_tokens, scatter_tokens
from quintet.parallel.mesh import Mesh


def apply_expert(model: Transformer, mesh: Mesh) -> None:
    """Set the dispatch of every mixture of experts, whose experts are this rank's (see spec.placement); where all are whole, do nothing."""
    layout = mesh.layout
    if layout.ep == layout.expert_tp == 1:
        return
    for layer in model.moe_layers().values():
        layer.dispatch = AllToAllDispatch(mesh["ep"], mesh["tp"], layout.expert_tp, model.model.num_routed_experts)


@dataclass(frozen=True)
class Route:
    """Where rows go: `out` sorts this rank's rows by expert, which is by rank too; `send` and `receive` say how many travel to and from
    each rank; `arrivals` sorts what arrives by local expert."""

    out: Permutation
    send: tuple[int, ...]
    receive: tuple[int, ...]
    arrivals: Permutation


@dataclass(frozen=True)
class Arrived:
    """Rows at their experts: rows [N, D] and gates [N] in fp32, sorted by local expert and padded as the Permutation says."""

    rows: Tensor
    gates: Tensor


@dataclass(frozen=True)
class AllToAllDispatch:
    """The dispatch (see model.moe) over the ranks of `ep`. With `expert_tp` > 1 the ranks of `tp` each hold a part of every expert's
    inner width, so all of them send the tokens of all of them."""

    ep: Group
    tp: Group
    expert_tp: int
    num_experts: int

    def __call__(self, x: Tensor, routing: Routing, experts: Experts) -> tuple[Tensor, Tensor]:
        """x [T, D] of this rank -> the gated sum of each token's experts [T, D], and how many of these tokens went to each expert [E]."""
        spare = routing.dropped is not None
        if self.expert_tp == 1:
            route = self.prepare(routing.experts, spare=spare)
            arrived = self.dispatch(x, routing.gates, route)
            return self.combine(self.compute(arrived, route, experts), route), route.out.load
        (tokens,) = gather_tokens([x], self.tp, dim=0)
        (gates,) = gather_tokens([routing.gates], self.tp, dim=0)
        route = self.prepare(all_gather(routing.experts, self.tp), spare=spare)
        terms = self.combine(self.compute(self.dispatch(tokens, gates, route), route, experts), route)
        load = sort_by_expert(routing.experts, self.num_experts, spare=spare).load
        return scatter_tokens(terms, self.tp, dim=0), load

    def prepare(self, experts: Tensor, *, spare: bool) -> Route:
        """experts [T, K] (E where dropped, with `spare`) -> Route: ranks tell each other their counts, which the host then reads once."""
        out = sort_by_expert(experts, self.num_experts, padded=False, spare=spare)
        counts = out.load.view(self.ep.size, -1)  # [n, e]: experts lie in the order of ranks
        ones = [1] * self.ep.size
        arriving = all_to_all(counts, self.ep, send=ones, receive=ones)
        send, receive = torch.stack((counts.sum(1), arriving.sum(1))).tolist()
        return Route(out=out, send=tuple(send), receive=tuple(receive), arrivals=regroup_by_expert(arriving, sum(receive)))

    def dispatch(self, x: Tensor, gates: Tensor, route: Route) -> Arrived:
        """x [T, D], gates [T, K] -> the rows of all ranks at this rank's experts."""
        rows, row_gates = spread(x, route.out), spread_gates(gates, route.out)
        if route.out.spare:  # dropped slots have no row
            rows, row_gates = rows[: sum(route.send)], row_gates[: sum(route.send)]
        rows = exchange_rows(rows, self.ep, send=route.send, receive=route.receive)
        row_gates = exchange_rows(row_gates, self.ep, send=route.send, receive=route.receive)
        return Arrived(rows=spread(rows, route.arrivals), gates=spread_gates(row_gates[:, None], route.arrivals))

    def compute(self, arrived: Arrived, route: Route, experts: Experts) -> Tensor:
        """Rows through their experts, times their gates: [N, D]."""
        return experts(arrived.rows, arrived.gates, route.arrivals.ends)

    def combine(self, rows: Tensor, route: Route) -> Tensor:
        """rows [N, D] -> back to their ranks, and the sum of each token's [T, D]."""
        rows = exchange_rows(collect(rows, route.arrivals), self.ep, send=route.receive, receive=route.send)
        if route.out.spare:
            rows = F.pad(rows, (0, 0, 0, route.out.token_of_row.numel() - rows.shape[0]))
        return collect(rows, route.out)
