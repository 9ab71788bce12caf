"""What a checkpoint holds, by kinds of tensors; where two differ; and one rewritten in another form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from quintet.checkpoint.agreement import Company
from quintet.checkpoint.load import OnProgress, Stored, read_extra
from quintet.checkpoint.manifest import ITEM_SIZE, Codec, Manifest, Tensor
from quintet.checkpoint.pieces import Box, Later
from quintet.checkpoint.place import Place
from quintet.checkpoint.plan import Item, Plan, Whole
from quintet.checkpoint.save import Job, write
from quintet.checkpoint.store import Threads


@dataclass(frozen=True, kw_only=True)
class Kind:
    """All tensors that are called alike: the model's, or one of the optimizer's states."""

    name: str
    """`model`, `optimizer.exp_avg`, ..."""
    dtype: str
    """torch's name."""
    num_tensors: int
    """How many."""
    numel: int
    """Their elements."""
    plain_bytes: int
    """Bytes of the elements as they are."""
    stored_bytes: int
    """Bytes in the data files."""


def kinds(manifest: Manifest) -> list[Kind]:
    """The kinds of a checkpoint's tensors in the order of its names."""
    found: dict[tuple[str, str], list[Tensor]] = {}
    for name, tensor in manifest.tensors.items():
        parts = name.split(".")
        found.setdefault((".".join(parts[: 2 if parts[0] == "optimizer" else 1]), tensor.dtype), []).append(tensor)
    return [
        Kind(
            name=name,
            dtype=dtype,
            num_tensors=len(tensors),
            numel=sum(math.prod(tensor.shape) for tensor in tensors),
            plain_bytes=sum(math.prod(tensor.shape) * ITEM_SIZE[dtype] for tensor in tensors),
            stored_bytes=sum(piece.length for tensor in tensors for piece in tensor.pieces),
        )
        for (name, dtype), tensors in found.items()
    ]


def differences(one: Place, two: Place, *, on_progress: OnProgress = lambda done, total: None) -> Iterator[str]:
    """A line for each thing in which two checkpoints differ; tensors are compared bit by bit, one at a time.

    Raises CheckpointError for one that is damaged.
    """
    left, right = Stored(one), Stored(two)
    yield from _different_values(left.manifest, right.manifest)
    for name in sorted(left.keys() ^ right.keys()):
        yield f"{name}: only in {one if name in left else two}"
    common = sorted(left.keys() & right.keys())
    for done, name in enumerate(common):
        on_progress(done, len(common))
        here, there = left.manifest.tensors[name], right.manifest.tensors[name]
        if str(here) != str(there):
            yield f"{name}: {here} and {there}"
        elif line := _difference(left[name], right[name]):
            yield f"{name}: {line}"


def _different_values(left: Manifest, right: Manifest) -> Iterator[str]:
    if left.step != right.step:
        yield f"step: {left.step} and {right.step}"
    for name in sorted(left.values.keys() | right.values.keys()):
        here, there = left.values.get(name), right.values.get(name)
        if here != there:
            yield f"{name}: {here} and {there}"


def _difference(one: torch.Tensor, two: torch.Tensor) -> str | None:
    """How much of two tensors of one shape and dtype differs, or None where no bit does."""
    itemsize = one.dtype.itemsize
    bits = (one.reshape(-1).view(torch.uint8).view(-1, itemsize) != two.reshape(-1).view(torch.uint8).view(-1, itemsize)).any(1)
    count = int(bits.sum())
    if not count:
        return None
    line = f"{count:,} of {one.numel():,} elements differ"
    if one.dtype.is_floating_point:
        wide, other = one.double(), two.double()
        line += f", by {float((wide - other).norm() / other.norm().clamp(min=1e-300)):.3g} of its norm"
    return line


def convert(source: Place, root: Place, *, codec: Codec, on_progress: OnProgress = lambda done, total: None) -> Place:
    """Write a checkpoint anew under another root, piece by piece, in one data file, with another codec; returns it.

    Raises CheckpointError as `load` and `save` do.
    """
    stored = Stored(source)
    manifest = stored.manifest
    twins = {tensor.rounded_from: name for name, tensor in manifest.tensors.items() if tensor.rounded_from is not None}
    items = tuple(
        Item(name, (piece.offsets, piece.sizes), twins.get(name))
        for name, tensor in manifest.tensors.items()
        if tensor.rounded_from is None
        for piece in tensor.pieces
    )
    wholes = {name: Whole(tensor.dtype, tensor.shape, tensor.rounded_from) for name, tensor in manifest.tensors.items()}
    extras = {file.path: read_extra(source, file.path) for file in manifest.files if file.blake3 is not None}
    tensors = watched({name: stored.later(name) for name in stored}, items, on_progress)
    job = Job(step=manifest.step, tensors=tensors, values=manifest.values, plan=Plan(items, wholes), extras=extras, codec=codec)
    return write_alone(job, root, doing=f"converting {source}")


def write_alone(job: Job, root: Place, *, doing: str) -> Place:
    """Write what one process has, and read it back. Raises CheckpointError."""
    with Threads() as threads:
        return write(job, root, company=Company(doing=doing, alone=True), threads=threads, read_back=True)


def watched(tensors: Mapping[str, Later], items: Sequence[Item], on_progress: OnProgress) -> dict[str, Later]:
    """The same tensors; each element of an item that is asked for counts."""
    total, done = sum(math.prod(item.box[1]) for item in items), 0
    counted = {item.name for item in items}

    def reader(name: str) -> Callable[[Box], torch.Tensor]:
        def read(box: Box) -> torch.Tensor:
            nonlocal done
            if name in counted:
                on_progress(done, total)
                done += math.prod(box[1])
            return tensors[name].read(box)

        return read

    return {name: Later(later.shape, dtype=later.dtype, read=reader(name)) for name, later in tensors.items()}
