"""A bucket: parameters with the same holders one behind the other, with the gradient and the shard that a rank keeps of them.

Let s be the number of ranks that divide one set of shards among them (`shard`), and n the bucket's padded length. `replicate` are the
ranks whose shards are equal. See `parallel.zero` for when what is whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quintet.parallel.collectives import Group, Pending, start_all_gather, start_reduce_scatter
from quintet.spec.placement import Box


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

    def add(self, piece: Piece, gradient: Tensor, *, again: bool = False) -> None:
        """Take a parameter's gradient over, adding to an earlier micro-batch's; `again` if more may come of the same one."""
        assert again or piece.name not in self._filled, piece.name  # else a reduction might be under way without it
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
        self.finish_gathering()  # MTP modules that run no more never waited for the last ones
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
