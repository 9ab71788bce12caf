"""Messages between the ranks of a group: each kind once, counted in bytes, with its gradient where autograd needs one.

Local shapes stand with each function; n is the size of the group. Every rank of a group makes the same calls in the same order, as NCCL
wants it. Eight-bit floats travel as bytes. A group of one sends nothing.

Sums of scattered tensors. gloo's reduce-scatter is an all-reduce of which each rank forgets most: it sends twice what must be sent. There
each rank gets the others' terms of its part by an all-to-all, (n-1)/n of the tensor as the optimum wants it, and adds them up itself:
in fp32 whatever the type, and in the order of ranks, so that the sum does not depend on who was early. NCCL's own reduce-scatter sends
the optimum and needs no room for the terms, so it stays: gradients are fp32 before they are sent. (V4 sums bf16 gradients in this way on
NCCL too, since there each hop of a ring would round; see arXiv 2606.19348. Here nothing of that kind is summed in bf16.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 has new names for these two and warns of the old ones; 2.11 knows only the old.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Traffic:
    """What this rank has sent in a group, as the bandwidth-optimal algorithm of each collective sends it."""

    num_bytes: int = 0
    num_calls: int = 0

    def add(self, num_bytes: int) -> None:
        """One more call."""
        self.num_bytes += num_bytes
        self.num_calls += 1


@dataclass(frozen=True)
class Group:
    """Ranks that exchange along one axis; `rank` is this one's place among `ranks`, and `process_group` is None where it is alone.
    `beside`, if there is one, has the same ranks, for short messages that must not queue behind long ones."""

    axis: str
    ranks: tuple[int, ...]
    rank: int
    process_group: dist.ProcessGroup | None = None
    beside: dist.ProcessGroup | None = None
    traffic: Traffic = field(default_factory=Traffic, compare=False)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def for_numbers(self) -> Group:
        """The same ranks, by the process group beside."""
        return self if self.beside is None else replace(self, process_group=self.beside)


def alone(axis: str) -> Group:
    """The group of a single device."""
    return Group(axis, (0,), 0)


class Pending:
    """A collective under way; `wait` returns its result and may be called once. What arrived becomes the result by `finish`."""

    def __init__(self, arriving: Tensor, work: dist.Work | None, finish: Callable[[Tensor], Tensor] | None = None) -> None:
        self._arriving, self._work, self._finish = arriving, work, finish

    def wait(self) -> Tensor:
        """The result, when it is there."""
        arriving, work = self._arriving, self._work
        del self._arriving, self._work  # whoever keeps this object does not keep a message
        if work is not None:
            work.wait()
        return arriving if self._finish is None else self._finish(arriving)


def all_reduce(tensor: Tensor, group: Group, *, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """[...] -> [...], in place: the sum (or `op`) over the group."""
    return start_all_reduce(tensor, group, op=op).wait()


def start_all_reduce(tensor: Tensor, group: Group, *, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Pending:
    """As all_reduce, without waiting."""
    if group.process_group is None:
        return Pending(tensor, None)
    group.traffic.add(2 * _bytes(tensor) * (group.size - 1) // group.size)
    return Pending(tensor, dist.all_reduce(tensor, op, group=group.process_group, async_op=True))


def all_gather(shard: Tensor, group: Group) -> Tensor:
    """[a, ...] -> [n a, ...]: the ranks' shards, in their order, along the first dim."""
    if group.process_group is None:
        return shard
    return start_all_gather(shard, shard.new_empty(group.size * shard.shape[0], *shard.shape[1:]), group).wait()


def start_all_gather(shard: Tensor, out: Tensor, group: Group) -> Pending:
    """Shard [a, ...] -> `out` [n a, ...], without waiting; `shard` may be this rank's part of `out`."""
    if group.process_group is None:
        if out.data_ptr() != shard.data_ptr():
            out.copy_(shard)
        return Pending(out, None)
    group.traffic.add(_bytes(shard) * (group.size - 1))
    work = _all_gather_single(_plain(out), _plain(shard.contiguous()), group=group.process_group, async_op=True)
    return Pending(out, work)


def reduce_scatter(tensor: Tensor, group: Group) -> Tensor:
    """[n a, ...] -> [a, ...]: this rank's part of the sum over the group."""
    return start_reduce_scatter(tensor, group).wait()


def start_reduce_scatter(tensor: Tensor, group: Group) -> Pending:
    """As reduce_scatter, without waiting; `tensor` must stay as it is until then."""
    if group.process_group is None:
        return Pending(tensor, None)
    group.traffic.add(_bytes(tensor) * (group.size - 1) // group.size)
    if dist.get_backend(group.process_group) == "gloo":
        terms = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        work = dist.all_to_all_single(terms, tensor.contiguous(), group=group.process_group, async_op=True)
        return Pending(terms, work, lambda terms: sum_in_order(terms.unflatten(0, (group.size, -1))))
    out = tensor.new_empty(tensor.shape[0] // group.size, *tensor.shape[1:])
    work = _reduce_scatter_single(out, tensor.contiguous(), group=group.process_group, async_op=True)
    return Pending(out, work)


def sum_in_order(terms: Tensor) -> Tensor:
    """[n, ...] -> [...]: added up in fp32, one rank after the other."""
    total = terms[0].to(torch.float32, copy=True)
    for term in terms[1:]:
        total += term
    return total.to(terms.dtype)


def all_to_all(rows: Tensor, group: Group, *, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    """[sum(send), ...] -> [sum(receive), ...]: `send[r]` rows, in order, go to rank r of the group, `receive[r]` come from it."""
    return start_all_to_all(rows, group, send=send, receive=receive).wait()


def start_all_to_all(rows: Tensor, group: Group, *, send: Sequence[int], receive: Sequence[int], room: int = 0) -> Pending:
    """As all_to_all, without waiting; behind the rows that arrive there is room for some more, whose values are undefined."""
    assert sum(send) == rows.shape[0], (send, rows.shape)
    if group.process_group is None and not room:
        return Pending(rows, None)
    out = rows.new_empty(sum(receive) + room, *rows.shape[1:])
    if group.process_group is None:
        out[: len(rows)] = rows
        return Pending(out, None)
    group.traffic.add((sum(send) - send[group.rank]) * (_bytes(rows) // max(rows.shape[0], 1)))
    arriving, leaving = _plain(out[: sum(receive)]), _plain(rows.contiguous())
    work = dist.all_to_all_single(arriving, leaving, list(receive), list(send), group=group.process_group, async_op=True)
    return Pending(out, work)


def gather_rows(rows: Tensor, group: Group, *, counts: Sequence[int]) -> Tensor:
    """[counts[rank], ...] -> [sum(counts), ...]: the rows of all ranks, of which `counts[r]` lie on rank r."""
    if group.process_group is None:
        return rows
    return all_to_all(torch.cat([rows] * group.size), group, send=[len(rows)] * group.size, receive=counts)


def scatter_rows(rows: Tensor, group: Group, *, counts: Sequence[int]) -> Tensor:
    """[sum(counts), ...] -> [n, counts[rank], ...]: every rank's term of this rank's rows, the way back of `gather_rows`."""
    if group.process_group is None:
        return rows[None]
    own = counts[group.rank]
    terms = all_to_all(rows, group, send=counts, receive=[own] * group.size)
    return terms.view(group.size, own, *rows.shape[1:])


class Shift:
    """Tensors on their way to the next rank of a ring (and the previous rank's on their way here)."""

    def __init__(self, tensors: Sequence[Tensor], group: Group) -> None:
        self._sent = [tensor.contiguous() for tensor in tensors]  # kept alive until they have left
        self._received = [torch.empty_like(tensor) for tensor in self._sent]
        following, previous = (group.ranks[(group.rank + by) % group.size] for by in (1, -1))
        group.traffic.add(sum(map(_bytes, self._sent)))
        self._works = dist.batch_isend_irecv(
            [
                operation
                for out, into in zip(self._sent, self._received, strict=True)
                for operation in (
                    dist.P2POp(dist.isend, _plain(out), following, group.process_group),
                    dist.P2POp(dist.irecv, _plain(into), previous, group.process_group),
                )
            ]
        )

    def wait(self) -> list[Tensor]:
        """What the previous rank sent: tensors of the same shapes and types."""
        for work in self._works:
            work.wait()
        return self._received


def gather_tokens(shards: Sequence[Tensor], group: Group, *, dim: int) -> tuple[Tensor, ...]:
    """[.., a, ..., w_i] for several widths w_i -> [.., n a, ..., w_i] along `dim`, in one message; backward scatters the sums."""
    if group.process_group is None:
        return tuple(shards)
    widths = [shard.shape[-1] for shard in shards]
    packed = shards[0] if len(shards) == 1 else torch.cat(tuple(shards), -1)
    out: Tensor = _Gather.apply(packed, group, dim)
    return (out,) if len(shards) == 1 else out.split(widths, -1)


def scatter_tokens(partial: Tensor, group: Group, *, dim: int) -> Tensor:
    """[.., n a, ...] -> [.., a, ...]: this rank's tokens of the sum over the group; backward gathers."""
    if group.process_group is None:
        return partial
    out: Tensor = _Scatter.apply(partial, group, dim)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _gather(shard, group, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _scatter(grads[0], ctx.group, ctx.dim), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _scatter(partial, group, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _gather(grads[0], ctx.group, ctx.dim), None, None


def _gather(shard: Tensor, group: Group, dim: int) -> Tensor:
    """[.., a, ..] -> [.., n a, ..] along `dim`."""
    if dim == 0:
        return all_gather(shard, group)
    stacked = all_gather(shard.unsqueeze(0), group)  # [n, .., a, ..]
    return stacked.movedim(0, dim).flatten(dim, dim + 1)


def _scatter(tensor: Tensor, group: Group, dim: int) -> Tensor:
    """[.., n a, ..] -> [.., a, ..] along `dim`."""
    if dim == 0:
        return reduce_scatter(tensor, group)
    stacked = tensor.unflatten(dim, (group.size, -1)).movedim(dim, 0).contiguous()
    return reduce_scatter(stacked, group).squeeze(0)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _plain(tensor: Tensor) -> Tensor:
    """Eight-bit floats, which collectives do not know, as bytes."""
    return tensor.view(torch.uint8) if tensor.dtype.is_floating_point and tensor.element_size() == 1 else tensor
