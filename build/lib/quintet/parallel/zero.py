"""ZeRO (arXiv 1910.02054): a model's parameters in flat buckets, whose gradients, optimizer state and weights the replicas share out.

A parameter (or this rank's part of it, see `spec.placement`) is replicated over some ranks, its holders, and its gradient is the sum over
them. Parameters with the same holders lie one behind the other in a bucket, in the order in which backward reaches them. Let s be
the number of holders that divide one set of shards among them, and n the bucket's padded length:

    stage   weights [n]         gradient, fp32                      master and moments
      0     whole               whole, all-reduced                  whole, equal on all (s = 1)
      1     whole               whole while micro-batches add up,   shard [n/s]
                                then reduce-scattered: shard
      2     whole               whole until their bucket is full    shard [n/s]
                                and reduced, a shard that adds up
      3     shard; whole while  as 2                                shard [n/s]
            their block runs

A gradient leaves for its bucket as soon as backward has it; when a bucket is full, and those before it have gone, its reduction starts
and goes on beside the rest of backward, two at a time. After the update the holders of shards gather the whole weights again (stages 1
and 2), beside the next forward. With hybrid sharding (arXiv 2304.11277) s is smaller than the number of holders, and the holders of equal
shards add their sums up.

In a pipeline the gradients of all micro-batches come as the schedule has it and add up; `begin_micro_batch` and `end_micro_batch` then
stand around the whole step, and all reductions follow it in the order of the buckets, which is the same on ranks that hold the same.

Where a rank is the only holder (one device; an expert's rank without replicas) there is nobody to share with, and the gradients
stay as backward made them, one by one, until the update.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections import deque
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from quintet.cost.shard import bucket_numel
from quintet.model.transformer import Transformer
from quintet.parallel.bucket import Bucket, Piece, Reduction
from quintet.parallel.collectives import Pending, start_all_reduce
from quintet.parallel.mesh import Mesh
from quintet.parallel.units import Units, part_of, wait_at_first_use
from quintet.spec.placement import holders, local_box

_ALIGNMENT = 64
"""Elements that every parameter's place is a multiple of; grouped products want 16 bytes."""
IN_FLIGHT = 2
"""Reductions under way at one time; before another one starts the first is waited for, and its whole gradient can be freed."""


class ShardedParameters:
    """All parameters of a model in buckets, and the traffic of their gradients."""

    def __init__(
        self, model: Transformer, mesh: Mesh, *, dtype: torch.dtype, device: torch.device, closed_at: int | None = None
    ) -> None:
        """`model` is on the meta device with global shapes; afterwards it has this rank's parts, zero, on `device`. Buckets of stages 0
        to 2 are `closed_at` so many elements of a rank, by default those of `cost.shard.bucket_numel`."""
        self.mesh, self.stage, self._in_pipeline = mesh, mesh.layout.zero, mesh.layout.pp > 1
        self._takers: dict[Tensor, Callable[[Tensor], None]] = {}
        this = weakref.ref(self)  # a parameter's hook is held where Python looks for no circles

        def take_accumulated(parameter: Tensor) -> None:
            if (alive := this()) is not None:
                alive._take_accumulated(parameter)

        self.buckets: list[Bucket] = []
        self.is_mtp: list[bool] = []
        self._unit_buckets: dict[str, list[Bucket]] = {}
        for (names, kind, mtp), unit in _grouped(model, mesh, by_unit=self.stage == 3, closed_at=closed_at):
            pieces, numel, num_decayed = _cut(model, names, mesh, dtype=dtype, device=device)
            shard, replicate = mesh[f"{kind}.shard"], mesh[f"{kind}.replicate"]
            numel = math.ceil(numel / (shard.size * _ALIGNMENT)) * shard.size * _ALIGNMENT
            bucket = Bucket(
                pieces, numel, num_decayed=num_decayed, shard=shard, replicate=replicate, dtype=dtype, keep_shards=self.stage == 3
            )
            self.buckets.append(bucket)
            self.is_mtp.append(mtp)
            self._unit_buckets.setdefault(unit, []).append(bucket)
            for piece in pieces:
                self._takers[piece.parameter] = self._taker(bucket, piece, unit)
                piece.parameter.register_post_accumulate_grad_hook(take_accumulated)
        self._active: list[Bucket] = []
        self.with_mtp = False
        """Whether MTP modules, on whatever rank, run in this step."""
        self._last = False
        self._num_passed = 0
        """Of the active buckets, those whose turn to be reduced has come in this backward."""
        self._started: deque[Reduction] = deque()
        self._replicating: list[tuple[Bucket, Pending]] = []
        for name, buffer in list(model.named_buffers()):
            model.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], torch.zeros_like(buffer, device=device))
        self._units = Units(model, self._unit_buckets) if self.stage == 3 else None
        if self.stage in (1, 2):
            wait_at_first_use(model, self.buckets)

    def fill(self, values: Callable[[Piece], Tensor]) -> None:
        """Set every parameter: `values` of a piece are fp32, in the shape of its box."""
        for bucket in self.buckets:
            for piece in bucket.pieces:
                bucket.fill(piece, values(piece))

    def begin_step(self, *, mtp: bool) -> None:
        """Before a step's first micro-batch; without `mtp` its modules do not run and their buckets stay as they are."""
        self.with_mtp = mtp
        self._active = [bucket for bucket, is_mtp in zip(self.buckets, self.is_mtp, strict=True) if mtp or not is_mtp]

    def begin_micro_batch(self, *, last: bool) -> None:
        """Before a backward; `last` of its step."""
        self._last, self._num_passed = last, 0
        for bucket in self._active:
            bucket.begin_micro_batch()

    def end_micro_batch(self) -> None:
        """Behind a backward: reduce what has not started yet, and wait for all that has."""
        self._start_reductions(all_of_them=True)
        while self._started:
            self._finish_reduction()
        for bucket, pending in self._replicating:
            bucket.gradient_shard = pending.wait()
        self._replicating.clear()
        if self._units is not None:
            self._units.end_backward()
        self.finish_gathering()

    def finish_gathering(self) -> None:
        """Wait for all weights that are on their way. A forward does so by itself, part by part; this is for readers from outside."""
        for bucket in self.buckets:
            bucket.finish_gathering()

    def updated(self) -> list[Bucket]:
        """The buckets whose gradients came in this step, as shards."""
        return [bucket for bucket in self._active if bucket.has_gradient]

    def norm_squared(self) -> Tensor:
        """This rank's term of the gradient's squared norm: the terms of all ranks add up to it. A scalar, fp64."""
        terms = []
        for bucket in self.updated():
            shards = [part.values for part in bucket.gradients()] if bucket.gradient_shard is None else [bucket.gradient_shard]
            norms = torch._foreach_norm(shards, 2, dtype=torch.float32)
            terms.append(torch.stack(norms).double().square().sum() / bucket.replicate.size)
        return torch.stack(terms).sum()

    def discard(self) -> None:
        """Forget the gradients."""
        for bucket in self.buckets:
            bucket.forget()

    def publish(self) -> None:
        """After an update: the weights follow the masters. Below stage 3 they are gathered in the order in which forward wants them, and
        each part of the model waits for its own when it next runs."""
        for bucket in self._active[::-1]:
            bucket.forget()
            bucket.publish()

    def take(self, parameter: Tensor, gradient: Tensor) -> None:
        """Take a gradient over that did not come by autograd (see ops.deferred)."""
        self._takers[parameter](gradient)

    def _take_accumulated(self, parameter: Tensor) -> None:
        if parameter.grad is None:
            return  # put off
        gradient, parameter.grad = parameter.grad, None
        self._takers[parameter](gradient)

    def _taker(self, bucket: Bucket, piece: Piece, unit: str) -> Callable[[Tensor], None]:
        def take(gradient: Tensor) -> None:
            bucket.add(piece, gradient, again=self._in_pipeline)
            if self._in_pipeline:
                return
            if bucket.is_full:
                self._start_reductions()
                if self._units is not None:
                    self._units.leave_backward(unit)

        return take

    def _start_reductions(self, *, all_of_them: bool = False) -> None:
        """Start those of full buckets, in the order of the buckets: every rank makes the same calls in the same order."""
        while self._num_passed < len(self._active):
            bucket = self._active[self._num_passed]
            if not (all_of_them or bucket.is_full):
                return
            self._num_passed += 1
            if bucket.is_alone:
                continue
            # What is not divided would stay as large as it is: its sum waits for the last micro-batch.
            if self._last or (self.stage >= 2 and bucket.shard.size > 1):
                while len(self._started) >= IN_FLIGHT:
                    self._finish_reduction()
                self._started.append(bucket.start_reduction())
                if bucket.shard.size == 1:
                    self._finish_reduction(self._started.pop())

    def _finish_reduction(self, reduction: Reduction | None = None) -> None:
        """Wait for a reduction (the one that started first) and add its shard up; a step's whole sum goes on to the holders of equal
        shards."""
        reduction = reduction or self._started.popleft()
        bucket, shard = reduction.bucket, reduction.pending.wait()
        bucket.gradient_shard = shard if bucket.gradient_shard is None else bucket.gradient_shard.add_(shard)
        if self._last and bucket.replicate.size > 1:
            self._replicating.append((bucket, start_all_reduce(bucket.gradient_shard, bucket.replicate)))


def _grouped(
    model: Transformer, mesh: Mesh, *, by_unit: bool, closed_at: int | None
) -> Iterable[tuple[tuple[list[str], str, bool], str]]:
    """The names of each bucket's parameters, its holders, whether it belongs to MTP modules, and its unit; in the order of backward."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def numel(name: str) -> int:
        return math.prod(local_box(name, shapes[name], mesh.layout, mesh.rank).sizes)

    def unit(name: str) -> str:
        layered = part_of(name) != name.split(".")[0] and name.split(".")[2] != "norm"  # an MTP module's last norm runs behind it
        return part_of(name) if layered else "root" if by_unit else name.split(".")[0]

    closed_at = closed_at or bucket_numel(sum(map(numel, shapes)))
    open_buckets: dict[tuple[str, bool], list[str]] = {}
    closed: list[tuple[tuple[list[str], str, bool], str]] = []

    def close(key: tuple[str, bool], of: str) -> None:
        closed.append(((open_buckets.pop(key), *key), of))

    backward = sorted(list(shapes)[::-1], key=lambda name: unit(name) == "root") if by_unit else list(shapes)[::-1]
    for of, names in itertools.groupby(backward, unit):
        for name in names:
            open_buckets.setdefault((holders(name, mesh.layout, model.model), name.startswith("mtp.")), []).append(name)
        for key, held in list(open_buckets.items()):
            if by_unit or sum(map(numel, held)) >= closed_at:
                close(key, of)
    for key in list(open_buckets):
        close(key, "root")
    return closed


def _cut(model: nn.Module, names: list[str], mesh: Mesh, *, dtype: torch.dtype, device: torch.device) -> tuple[list[Piece], int, int]:
    """Put parameters without elements in place of the model's -> their pieces, the bucket's length, and where its vectors begin."""
    pieces: list[Piece] = []
    end = num_decayed = 0
    for name in sorted(names, key=lambda name: model.get_parameter(name).ndim < 2):
        old = model.get_parameter(name)
        shape = tuple(old.shape)
        box = local_box(name, shape, mesh.layout, mesh.rank)
        parameter = nn.Parameter(torch.empty(0, dtype=dtype, device=device))
        begin = math.ceil(end / _ALIGNMENT) * _ALIGNMENT
        end = begin + math.prod(box.sizes)
        if len(shape) >= 2:
            num_decayed = end
        owner, _, own_name = name.rpartition(".")
        model.get_submodule(owner).register_parameter(own_name, parameter)
        pieces.append(Piece(name, parameter, box, begin, end))
    return pieces, end, num_decayed
