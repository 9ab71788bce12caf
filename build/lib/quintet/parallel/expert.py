"""Expert parallelism: the routed experts are divided over a group of ranks, and each token travels to its experts and back.

Dropless: a rank gets as many rows as tokens chose its experts, none or all of them (uneven all-to-all). A token goes once to each rank
that holds some of its experts, whatever their number (V3 3.2.2 does so by node): its row carries the token's experts and gates, the rank
copies it for each expert it has, and adds the results up before they go back.

    prepare     experts [T, K]          -> Route: which rows go where; the host reads how many
    dispatch    [T, D] -> [R, D]        all-to-all: a row per token and rank; then a copy of each for every expert: [N, D]
    compute     [N, D] -> [N, D]        grouped products
    combine     [N, D] -> [R, D]        the sum of each row's experts; all-to-all back, and the sum of each token's ranks: [T, D]

**The seam for overlap.** Dispatch and combine have two halves, and so have their backwards, which autograd calls: whatever lies between the
halves runs while the message travels.

    forward     start_dispatch .. finish_dispatch    compute    start_combine .. finish_combine
    backward    finish_dispatch's starts the message back, start_dispatch's waits for it; likewise for combine

A `Flight` is what lies between two halves. In autograd's graph it is one edge, `token`, a tensor without elements. What is computed beside
dispatch (the shared experts) stands between its halves, and since autograd runs nodes in the reverse order of their making, its backward,
too, is computed while the gradients of rows are under way. Who overlaps one micro-batch with another (parallel.stages) puts another token
in the flight's place (see model.crossing): backward up to it leaves the message on its way, and backward from the flight's own token goes
on with what came before, and begins by waiting.

With `expert_tp` > 1 the ranks of tp each hold a part of every expert's inner width. Each sends its own tokens only, and rows are gathered
from these ranks where they arrived, as the sums are scattered to them before they go back: what crosses ep stays the same, and tp lies
inside a node.

Letters: T tokens, K experts per token, D hidden, E experts, e = E/n experts of this rank, R rows that arrive, N copies of them, n ranks
of the group, t ranks that share each expert, W a row as it travels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quintet.cost.expert_comm import row_bytes, up
from quintet.cost.tensor_comm import FP32
from quintet.model.crossing import Steps
from quintet.model.moe import Experts
from quintet.model.router import Routing
from quintet.model.transformer import Transformer
from quintet.ops.permute import Permutation, sort_by_expert, spread_gates, sum_rows
from quintet.parallel.collectives import (
    Group,
    Pending,
    all_gather,
    all_to_all,
    gather_rows,
    scatter_rows,
    start_all_to_all,
    sum_in_order,
)
from quintet.parallel.mesh import Mesh


def apply_expert(model: Transformer, mesh: Mesh) -> None:
    """Set the dispatch of every mixture of experts, whose experts are this rank's (see spec.placement); where all are whole, do nothing."""
    layout = mesh.layout
    if layout.ep == layout.expert_tp == 1:
        return
    assert model.model.num_routed_experts < 2**15, "experts' numbers travel in 16 bits"
    sharing = mesh["tp"] if layout.expert_tp > 1 else None
    for layer in model.moe_layers().values():
        layer.dispatch = AllToAllDispatch(mesh["ep"], sharing, model.model.num_routed_experts, model.model.hidden_size)


@dataclass(frozen=True)
class Sizes:
    """Rows to and from each rank of ep (`send`, `receive`), those that arrive at each of the t ranks that share experts, and, behind rows
    that come back, room for a spare one."""

    send: tuple[int, ...]
    receive: tuple[int, ...]
    shared: tuple[int, ...]
    room: int

    def start_out(self, rows: Tensor, ep: Group) -> Pending:
        """Rows on their way to their experts' ranks."""
        return start_all_to_all(rows, ep, send=self.send, receive=self.receive)

    def start_back(self, rows: Tensor, ep: Group) -> Pending:
        """Rows on their way back."""
        return start_all_to_all(rows, ep, send=self.receive, receive=self.send, room=self.room)


@dataclass(frozen=True)
class Route:
    """Where the rows of some tokens go.

    `rows` sorts a row per token and rank by rank, slots that need none having the spare row; `carrier` [T, K] is the row that carries each
    slot. `num_copies` is how many copies the experts here take of the rows that arrive; `load` [E] counts the tokens here that chose each
    expert.
    """

    rows: Permutation
    carrier: Tensor
    sizes: Sizes
    num_copies: int
    load: Tensor


@dataclass
class _Back:
    """Where the backward of a flight's second half leaves the message for that of the first."""

    pending: Pending | None = None

    def wait(self) -> Tensor:
        assert self.pending is not None, "the second half goes backward first"
        arrived, self.pending = self.pending.wait(), None
        return arrived


@dataclass(frozen=True)
class Flight:
    """Rows under way: between the halves of dispatch or combine. See the head of this file."""

    route: Route
    pending: Pending
    token: Tensor
    back: _Back


@dataclass(frozen=True)
class Arrived:
    """Rows at their experts: copies [N, D] and their gates [N] in fp32, sorted by local expert and padded as `copies` says."""

    rows: Tensor
    gates: Tensor
    copies: Permutation


@dataclass(frozen=True)
class AllToAllDispatch:
    """The dispatch (see model.moe) over the ranks of `ep`; `sharing` are the ranks of tp, if each of them holds a part of every expert."""

    ep: Group
    sharing: Group | None
    num_experts: int
    hidden_size: int

    def __call__(
        self, x: Tensor, routing: Routing, experts: Experts, beside: Callable[[], tuple[Tensor, ...]]
    ) -> Steps[tuple[Tensor, tuple[Tensor, ...], Tensor]]:
        """As Dispatch says: x [T, D] of this rank -> [T, D] and load [E]. `beside` runs while rows travel to their experts."""
        route = self.prepare(routing.experts)
        flight = self.start_dispatch(x, routing, route)
        token, *others = yield flight.token, *beside()
        arrived = self.finish_dispatch(replace(flight, token=token))
        flight = self.start_combine(self.compute(arrived, experts), arrived.copies, route)
        token, *others = yield flight.token, *others
        return self.finish_combine(replace(flight, token=token)), tuple(others), route.load

    def prepare(self, experts: Tensor) -> Route:
        """experts [T, K] (E where dropped) -> Route: ranks tell each other two numbers, which the host then reads once."""
        n, per_rank = self.ep.size, self.num_experts // self.ep.size
        owner = experts // per_rank
        first = (owner[:, :, None] == owner[:, None]).int().argmax(2)  # the slot of a token whose row goes to the same rank
        to = owner.masked_fill(first != torch.arange(experts.shape[1], device=experts.device), n)
        told = torch.stack((_count(to, n), _count(owner, n)), 1)  # to each rank: rows, and the copies that its experts take of them
        ones = [1] * n
        arriving = all_to_all(told, self.ep.for_numbers, send=ones, receive=ones)
        here = arriving.sum(0, keepdim=True) if self.sharing is None else all_gather(arriving.sum(0, keepdim=True), self.sharing)
        rows_and_copies = torch.cat((told, arriving, here)).t().tolist()
        send, receive, shared = (tuple(rows_and_copies[0][part]) for part in (slice(n), slice(n, 2 * n), slice(2 * n, None)))
        rows = sort_by_expert(to, n, padded=False, spare=True, taken=sum(send))
        return Route(
            rows=rows,
            carrier=rows.row_of_slot.gather(1, first),
            sizes=Sizes(send, receive, shared, room=int(rows.spare)),
            num_copies=sum(rows_and_copies[1][2 * n :]),
            load=_count(experts, self.num_experts),
        )

    def start_dispatch(self, x: Tensor, routing: Routing, route: Route) -> Flight:
        """x [T, D] and its routing -> rows under way to their experts."""
        back = _Back()
        token, pending = _Depart.apply(x, routing.gates, routing.experts, self.ep, route, back)
        return Flight(route, pending, token, back)

    def finish_dispatch(self, flight: Flight) -> Arrived:
        """Copies of the rows of all ranks, for this rank's experts."""
        route, message = flight.route, flight.pending.wait()
        if self.sharing is not None:
            message = gather_rows(message, self.sharing, counts=route.sizes.shared)
        here, num_slots = self.num_experts // self.ep.size, route.carrier.shape[1]
        local = _ids(message, self.hidden_size, num_slots).long() - self.ep.rank * here
        local.masked_fill_((local < 0) | (local >= here), here)
        copies = sort_by_expert(local, here, spare=True, taken=route.num_copies)
        x, gates = message[:, : self.hidden_size], _gates(message, self.hidden_size, num_slots)
        rows, gates = _Arrive.apply(flight.token, x, gates, copies, self, route.sizes, flight.back)
        return Arrived(rows, gates, copies)

    def compute(self, arrived: Arrived, experts: Experts) -> Tensor:
        """Copies through their experts, times their gates: [N, D]."""
        return experts(arrived.rows, arrived.gates, arrived.copies.ends)

    def start_combine(self, rows: Tensor, copies: Permutation, route: Route) -> Flight:
        """rows [N, D] -> the sums of each row's experts, under way back."""
        back = _Back()
        token, pending = _Leave.apply(rows, copies, self, route.sizes, back)
        return Flight(route, pending, token, back)

    def finish_combine(self, flight: Flight) -> Tensor:
        """The sum of each token's rows [T, D]."""
        out: Tensor = _Return.apply(flight.token, flight.pending.wait(), self.ep, flight.route, flight.back)
        return out

    def own_rows(self, terms: Tensor, sizes: Sizes) -> Tensor:
        """This rank's term of all rows of the ranks that share experts [R of all, W] -> the terms of this rank's rows [t, R, W]."""
        return terms[None] if self.sharing is None else scatter_rows(terms, self.sharing, counts=sizes.shared)


class _Depart(torch.autograd.Function):
    """The first half of dispatch; its backward is the second half of the way back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gates: Tensor, experts: Tensor, ep: Group, route: Route, back: _Back
    ) -> tuple[Tensor, Pending]:
        ctx.save_for_backward(route.rows.row_of_slot, route.carrier)
        ctx.spare, ctx.back, ctx.hidden_size = route.rows.spare, back, x.shape[1]
        token_of_row, num_slots = route.rows.token_of_row[: sum(route.sizes.send)], experts.shape[1]
        message = _empty_message(x, len(token_of_row), num_slots, with_ids=True)
        torch.index_select(x, 0, token_of_row, out=message[:, : x.shape[1]])
        _gates(message, x.shape[1], num_slots).copy_(gates[token_of_row])
        _ids(message, x.shape[1], num_slots).copy_(experts[token_of_row])
        return x.new_empty(0), route.sizes.start_out(message, ep)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        row_of_slot, carrier = ctx.saved_tensors
        message, slots = ctx.back.wait(), torch.arange(carrier.shape[1], device=carrier.device)
        message[len(message) - ctx.spare :] = 0  # what was dropped has no gradient
        grad_x = sum_rows(message[:, : ctx.hidden_size], row_of_slot, spare=ctx.spare)
        return grad_x, _gates(message, ctx.hidden_size, len(slots))[carrier, slots], None, None, None, None


class _Arrive(torch.autograd.Function):
    """The second half of dispatch; its backward is the first half of the way back."""

    @staticmethod
    def forward(
        ctx: Any, token: Tensor, x: Tensor, gates: Tensor, copies: Permutation, dispatch: AllToAllDispatch, sizes: Sizes, back: _Back
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(copies.row_of_slot)
        ctx.spare, ctx.dispatch, ctx.sizes, ctx.back = copies.spare, dispatch, sizes, back
        here = gates.where(copies.row_of_slot < copies.token_of_row.numel() - copies.spare, 0.0)
        return x.index_select(0, copies.token_of_row), spread_gates(here, copies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (row_of_slot,) = ctx.saved_tensors
        rows, gates = grads
        num_slots = row_of_slot.shape[1]
        message = _empty_message(rows, len(row_of_slot), num_slots)
        message[:, : rows.shape[1]] = sum_rows(rows.contiguous(), row_of_slot, spare=ctx.spare)
        is_here = row_of_slot < len(rows) - ctx.spare
        _gates(message, rows.shape[1], num_slots).copy_(gates[row_of_slot].where(is_here, 0.0))
        terms = ctx.dispatch.own_rows(message, ctx.sizes)
        if len(terms) > 1:
            message = _empty_message(rows, terms.shape[1], num_slots)
            message[:, : rows.shape[1]] = sum_in_order(terms[:, :, : rows.shape[1]])
            _gates(message, rows.shape[1], num_slots).copy_(sum_in_order(_gates(terms, rows.shape[1], num_slots)))
        ctx.back.pending = ctx.sizes.start_back(message, ctx.dispatch.ep)
        return rows.new_zeros(0), None, None, None, None, None, None


class _Leave(torch.autograd.Function):
    """The first half of combine; its backward is the second half of the way there."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, copies: Permutation, dispatch: AllToAllDispatch, sizes: Sizes, back: _Back
    ) -> tuple[Tensor, Pending]:
        ctx.save_for_backward(copies.token_of_row)
        ctx.dispatch, ctx.sizes, ctx.back = dispatch, sizes, back
        terms = dispatch.own_rows(sum_rows(rows, copies.row_of_slot, spare=copies.spare), sizes)
        return rows.new_empty(0), sizes.start_back(terms[0] if len(terms) == 1 else sum_in_order(terms), dispatch.ep)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (token_of_row,) = ctx.saved_tensors
        arrived, sharing = ctx.back.wait(), ctx.dispatch.sharing
        if sharing is not None:
            arrived = gather_rows(arrived, sharing, counts=ctx.sizes.shared)
        return arrived.index_select(0, token_of_row), None, None, None, None


class _Return(torch.autograd.Function):
    """The second half of combine; its backward is the first half of the way there."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, rows: Tensor, ep: Group, route: Route, back: _Back) -> Tensor:
        ctx.save_for_backward(route.rows.token_of_row)
        ctx.ep, ctx.sizes, ctx.back = ep, route.sizes, back
        return sum_rows(rows, route.rows.row_of_slot, spare=route.rows.spare)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (token_of_row,) = ctx.saved_tensors
        rows = grads[0].index_select(0, token_of_row[: sum(ctx.sizes.send)])
        ctx.back.pending = ctx.sizes.start_out(rows, ctx.ep)
        return grads[0].new_zeros(0), None, None, None, None


def _count(ids: Tensor, bound: int) -> Tensor:
    """ids [..] up to and with `bound` -> how many there are of each below it: [bound]."""
    return ids.new_zeros(bound + 1).scatter_add_(0, ids.flatten(), torch.ones_like(ids).flatten())[:bound]


def _empty_message(like: Tensor, num_rows: int, num_slots: int, *, with_ids: bool = False) -> Tensor:
    """Rows as they travel [R, W], of the type of `like` [.., D]: D values, K gates in fp32, and perhaps K numbers of experts in 16 bits."""
    width = row_bytes(like.shape[1], num_slots, like.element_size(), with_ids=with_ids)
    return like.new_empty(num_rows, width // like.element_size())


def _gates(message: Tensor, hidden_size: int, num_slots: int) -> Tensor:
    """The gates in a message [.., R, W], or their gradients: [.., R, K] in fp32."""
    return _tail(message, hidden_size).view(torch.float32)[..., :num_slots]


def _ids(message: Tensor, hidden_size: int, num_slots: int) -> Tensor:
    """The numbers of experts in a message [R, W]: [R, K]."""
    return _tail(message, hidden_size).view(torch.int16)[..., 2 * num_slots : 3 * num_slots]


def _tail(message: Tensor, hidden_size: int) -> Tensor:
    """What stands behind the values, at the next multiple of four bytes."""
    size = message.element_size()
    return message[..., up(hidden_size * size, FP32) // size :]
