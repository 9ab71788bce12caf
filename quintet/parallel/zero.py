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
and 2). With hybrid sharding (arXiv 2304.11277) s is smaller than the number of holders, and the holders of equal shards add their sums up.

Where a rank is the only holder (one device; an expert's rank without replicas) there is nobody to share with, and the gradients
stay as backward made them, one by one, until the update.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quintet.parallel.collectives import Group, Pending, start_all_gather, start_all_reduce, start_reduce_scatter
from quintet.parallel.mesh import Mesh
from quintet.spec.layout import Layout
from quintet.spec.placement import Box, local_box, placement

BUCKET_NUMEL = 25_000_000
"""Buckets of stages 0 to 2 are closed at this many elements of a rank (100 MB of fp32 gradients)."""
_ALIGNMENT = 64
"""Elements that every parameter's place is a multiple of; grouped products want 16 bytes."""
IN_FLIGHT = 2
"""Reductions under way at one time; before another one starts the first is waited for, and its whole gradient can be freed."""


@dataclass(frozen=True)
class Piece:
    """A parameter's place in a bucket: `begin` to `end`. `box` is what this rank holds of it."""

    name: str
    parameter: nn.Parameter
    box: Box
    begin: int
    end: int


@dataclass(frozen=True)
class Part:
    """A contiguous run of one parameter's elements within a rank's shard: those `begin` to `end` of the local box, row by row."""

    piece: Piece
    begin: int
    end: int
    values: Tensor


@dataclass(frozen=True)
class Reduction:
    """A bucket's gradient on its way; `whole` stays alive until it has been read."""

    bucket: Bucket
    whole: Tensor
    pending: Pending


def holders(name: str, layout: Layout) -> str:
    """Which of `spec.layout.HOLDERS` hold the same values of a parameter."""
    split = {axis for axis in placement(name) if layout.degree(axis) > 1}
    if "ep" in split:
        return "expert_split" if "expert_tp" in split else "expert"
    return "tp_split" if split else "replicated"


class Bucket:
    """Parameters one behind the other: weights [n] in the compute type, fp32 gradient and master, and this rank's shard of each [n/s]."""

    def __init__(
        self, pieces: list[Piece], numel: int, *, num_decayed: int, shard: Group, replicate: Group, dtype: torch.dtype, keep_shards: bool
    ) -> None:
        """`pieces` have parameters without elements, which get their places in the new weights, all 0. With `keep_shards` (stage 3) only
        this rank's shard of the weights is kept, except between `start_gathering` and `free`."""
        self.pieces, self.numel, self.num_decayed = pieces, numel, num_decayed
        self.shard, self.replicate = shard, replicate
        self.keeps_shards = keep_shards and shard.size > 1
        device = pieces[0].parameter.device
        size = numel // shard.size
        self.range = (shard.rank * size, (shard.rank + 1) * size)
        self.weights = torch.empty(numel, dtype=dtype, device=device)
        self.weight_shard = torch.zeros(size, dtype=dtype, device=device) if self.keeps_shards else self.weights.zero_()[slice(*self.range)]
        self.master = self.weight_shard if dtype == torch.float32 else torch.zeros(size, dtype=torch.float32, device=device)
        self.gradient: Tensor | None = None
        self.gradient_shard: Tensor | None = None
        self.is_alone = shard.size == replicate.size == 1
        self._own: dict[str, Tensor] = {}
        self._filled: set[str] = set()
        self._fresh: set[str] = set()
        self._gathering: Pending | None = None
        for piece in pieces:
            # By `.data`, so that autograd does not take the weights' update or arrival for a change of what it saved.
            piece.parameter.data = self.weights[piece.begin : piece.end].view(piece.box.sizes)
        self.free()

    @property
    def is_full(self) -> bool:
        """Whether the gradient of every parameter has come since the bucket was emptied."""
        return len(self._filled) == len(self.pieces)

    def add(self, piece: Piece, gradient: Tensor) -> None:
        """Take a parameter's gradient over, adding to an earlier micro-batch's."""
        assert piece.name not in self._filled, piece.name  # else a reduction might be under way without it
        if self.is_alone:
            earlier = self._own.get(piece.name)
            self._own[piece.name] = gradient if earlier is None else earlier.float().add_(gradient)
            self._filled.add(piece.name)
            return
        if self.gradient is None:
            self.gradient = torch.empty(self.numel, dtype=torch.float32, device=gradient.device)
            self._fresh = {other.name for other in self.pieces}
        target = self.gradient[piece.begin : piece.end].view(gradient.shape)
        if piece.name in self._fresh:
            self._fresh.discard(piece.name)
            target.copy_(gradient)
        else:
            target.add_(gradient)
        self._filled.add(piece.name)

    def forget(self) -> None:
        """Drop the gradient."""
        self.gradient = self.gradient_shard = None
        self._own.clear()
        self._filled.clear()

    @property
    def has_gradient(self) -> bool:
        """Whether a step's gradient is there, reduced."""
        return bool(self._own) or self.gradient_shard is not None

    def gradients(self) -> Iterator[Part]:
        """This rank's shard of the reduced gradient, by runs of parameters: fp32, or as backward made it where the rank is alone."""
        if self.gradient_shard is not None:
            yield from self.parts(self.gradient_shard)
        for piece in self.pieces:
            if piece.name in self._own:
                yield Part(piece, 0, piece.end - piece.begin, self._own[piece.name].flatten())

    def take_gradients(self) -> Iterator[tuple[slice, Tensor, bool]]:
        """The reduced gradient in few long runs, which are forgotten as they are taken: where each lies in this rank's shard, its fp32
        values, and whether it is of matrices."""
        for piece in self.pieces:
            if (gradient := self._own.pop(piece.name, None)) is not None:
                yield slice(piece.begin, piece.end), gradient.float().flatten(), len(piece.box.shape) >= 2
        if self.gradient_shard is not None:
            size = self.range[1] - self.range[0]
            border = min(max(self.num_decayed - self.range[0], 0), size)
            for run, decayed in ((slice(0, border), True), (slice(border, size), False)):
                yield run, self.gradient_shard[run], decayed
            self.gradient_shard = None

    def begin_micro_batch(self) -> None:
        """From now on the gradients of another backward come."""
        self._filled.clear()

    def start_reduction(self) -> Reduction:
        """Give the gradient away, 0 where none came, to be summed over the holders of shards."""
        if self.gradient is None:
            self.gradient, self._fresh = torch.zeros(self.numel, dtype=torch.float32, device=self.master.device), set()
        end = 0
        for piece in self.pieces:  # between the parameters, and where none came, the sum must be 0
            self.gradient[end : piece.begin] = 0
            if piece.name in self._fresh:
                self.gradient[piece.begin : piece.end] = 0
            end = piece.end
        self.gradient[end:] = 0
        whole, self.gradient = self.gradient, None
        return Reduction(self, whole, start_reduce_scatter(whole, self.shard))

    def publish(self) -> None:
        """After an update of the master: round it to the weights, and start gathering them from all shards."""
        if self.master is not self.weight_shard:
            self.weight_shard.copy_(self.master)
        if self.keeps_shards:
            self.free()
        elif self.shard.size > 1:
            self._gathering = start_all_gather(self.weight_shard, self.weights, self.shard)

    def finish_gathering(self) -> None:
        """Wait until the weights are whole."""
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None

    def start_gathering(self) -> None:
        """Make room for the whole weights and ask the others for their shards, unless that is done."""
        storage = self.weights.untyped_storage()
        if self.keeps_shards and storage.size() == 0:
            storage.resize_(self.numel * self.weights.element_size())
            self._gathering = start_all_gather(self.weight_shard, self.weights, self.shard)

    def free(self) -> None:
        """Give the room of the whole weights back, once nothing arrives there any more (stage 3)."""
        if self.keeps_shards:
            self.finish_gathering()
            self.weights.untyped_storage().resize_(0)

    def fill(self, piece: Piece, values: Tensor) -> None:
        """Set a parameter to fp32 values in the shape of its box."""
        flat = values.flatten()
        if not self.keeps_shards:
            self.weights[piece.begin : piece.end] = flat
        begin, end = max(piece.begin, self.range[0]), min(piece.end, self.range[1])
        if begin < end:
            for target in (self.weight_shard, self.master):
                target[begin - self.range[0] : end - self.range[0]] = flat[begin - piece.begin : end - piece.begin]

    def parts(self, shard: Tensor) -> Iterator[Part]:
        """The runs of parameters that a tensor like the master [n/s] holds."""
        for piece in self.pieces:
            begin, end = max(piece.begin, self.range[0]), min(piece.end, self.range[1])
            if begin < end:
                yield Part(piece, begin - piece.begin, end - piece.begin, shard[begin - self.range[0] : end - self.range[0]])


class ShardedParameters:
    """All parameters of a model in buckets, and the traffic of their gradients."""

    def __init__(self, model: nn.Module, mesh: Mesh, *, dtype: torch.dtype, device: torch.device, bucket_numel: int = BUCKET_NUMEL) -> None:
        """`model` is on the meta device with global shapes; afterwards it has this rank's parts, zero, on `device`."""
        self.mesh, self.stage = mesh, mesh.layout.zero
        self.buckets: list[Bucket] = []
        self.is_mtp: list[bool] = []
        self._unit_buckets: dict[str, list[Bucket]] = {}
        for (names, kind, mtp), unit in _grouped(model, mesh, by_unit=self.stage == 3, bucket_numel=bucket_numel):
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
                piece.parameter.register_post_accumulate_grad_hook(self._taker(bucket, piece, unit))
        self._active: list[Bucket] = []
        self._last = False
        self._num_passed = 0
        """Of the active buckets, those whose turn to be reduced has come in this backward."""
        self._started: deque[Reduction] = deque()
        self._replicating: list[tuple[Bucket, Pending]] = []
        for name, buffer in list(model.named_buffers()):
            model.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], torch.zeros_like(buffer, device=device))
        self._units = _Units(model, self._unit_buckets) if self.stage == 3 else None

    def fill(self, values: Callable[[Piece], Tensor]) -> None:
        """Set every parameter: `values` of a piece are fp32, in the shape of its box."""
        for bucket in self.buckets:
            for piece in bucket.pieces:
                bucket.fill(piece, values(piece))

    def begin_step(self, *, mtp: bool) -> None:
        """Before a step's first micro-batch; without `mtp` its modules do not run and their buckets stay as they are."""
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
        """After an update: the weights follow the masters."""
        for bucket in self._active:
            bucket.forget()
            bucket.publish()
        for bucket in self._active:
            bucket.finish_gathering()

    def _taker(self, bucket: Bucket, piece: Piece, unit: str) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient, parameter.grad = parameter.grad, None
            bucket.add(piece, gradient)
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


class _Units:
    """Stage 3: each layer's weights are whole only while it computes, those of the next one on their way; embedding, last norm and head
    stay whole from the first forward after an update to the next update. MTP modules run where the forward has targets."""

    def __init__(self, model: nn.Module, buckets: dict[str, list[Bucket]]) -> None:
        self.names = [name for name in buckets if name != "root"][::-1]  # as forward goes
        self.buckets, self.in_backward = buckets, dict.fromkeys(self.names, False)
        self.num_running = len(self.names)
        model.register_forward_pre_hook(self._begin_forward, with_kwargs=True)
        for name in self.names:
            part = model.get_submodule(name)
            part.register_forward_pre_hook(self._before(name))
            part.register_forward_hook(self._behind(name))

    def _begin_forward(self, module: nn.Module, args: object, named: dict[str, object]) -> None:
        self.num_running = sum(named.get("targets") is not None or not name.startswith("mtp.") for name in self.names)
        self._whole("root")

    def _whole(self, name: str) -> None:
        buckets = self.buckets.get(name, [])  # not every model has a root
        for bucket in buckets:
            bucket.start_gathering()
        for bucket in buckets:
            bucket.finish_gathering()

    def _ask(self, name: str, *, step: int) -> None:
        place = self.names.index(name) + step
        if 0 <= place < self.num_running:
            for bucket in self.buckets[self.names[place]]:
                bucket.start_gathering()

    def _before(self, name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: object) -> None:
            self._whole(name)
            if not self.in_backward[name]:
                self._ask(name, step=1)

        return before

    def _behind(self, name: str) -> Callable[..., None]:
        def behind(module: nn.Module, args: object, output: tuple[Tensor, object]) -> None:
            if self.in_backward[name]:
                return  # recomputed: backward is about to need the weights
            if output[0].requires_grad:
                output[0].register_hook(lambda gradient: self._enter_backward(name))
            for bucket in self.buckets[name]:
                bucket.free()

        return behind

    def _enter_backward(self, name: str) -> None:
        self.in_backward[name] = True
        self._whole(name)
        self._ask(name, step=-1)

    def leave_backward(self, name: str) -> None:
        """The gradient of one of the part's buckets is full. A parameter's gradient comes from the operation that reads its weight, so
        when all have come no weight is needed any more."""
        if name in self.in_backward and all(bucket.is_full for bucket in self.buckets[name]):
            self._leave(name)

    def end_backward(self) -> None:
        """Behind a backward: also parts that got no gradient for some parameter have left."""
        for name in self.names:
            self._leave(name)

    def _leave(self, name: str) -> None:
        self.in_backward[name] = False
        for bucket in self.buckets[name]:
            bucket.free()


def _grouped(
    model: nn.Module, mesh: Mesh, *, by_unit: bool, bucket_numel: int
) -> Iterable[tuple[tuple[list[str], str, bool], str]]:
    """The names of each bucket's parameters, its holders, whether it belongs to MTP modules, and its unit; in the order of backward."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def numel(name: str) -> int:
        return math.prod(local_box(name, shapes[name], mesh.layout, mesh.rank).sizes)

    def unit(name: str) -> str:
        parts = name.split(".")
        layered = parts[0] in ("layers", "mtp") and parts[2] != "norm"  # an MTP module's last norm runs behind it
        return ".".join(parts[:2]) if layered else "root" if by_unit else parts[0]

    open_buckets: dict[tuple[str, bool], list[str]] = {}
    closed: list[tuple[tuple[list[str], str, bool], str]] = []

    def close(key: tuple[str, bool], of: str) -> None:
        closed.append(((open_buckets.pop(key), *key), of))

    backward = sorted(list(shapes)[::-1], key=lambda name: unit(name) == "root") if by_unit else list(shapes)[::-1]
    for of, names in itertools.groupby(backward, unit):
        for name in names:
            open_buckets.setdefault((holders(name, mesh.layout), name.startswith("mtp.")), []).append(name)
        for key, held in list(open_buckets.items()):
            if by_unit or sum(map(numel, held)) >= bucket_numel:
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
