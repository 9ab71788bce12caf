"""What a checkpoint holds, by kinds of tensors; where two differ; and one rewritten in another form."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from quintet.checkpoint.agreement import Company
from quintet.checkpoint.load import OnProgress, Stored, read_extra, read_manifest
from quintet.checkpoint.manifest import ITEM_SIZE, Codec, Manifest, Tensor
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
    """Write a checkpoint anew under another root, tensor by tensor, in one data file, with another codec; returns it.

    Raises CheckpointError as `load` and `save` do.
    """
    manifest = read_manifest(source)
    stored = _Watched(Stored(source), on_progress)
    twins = {tensor.rounded_from: name for name, tensor in manifest.tensors.items() if tensor.rounded_from is not None}
    items = [
        Item(name, ((0,) * len(tensor.shape), tensor.shape), twins.get(name))
        for name, tensor in manifest.tensors.items()
        if tensor.rounded_from is None and 0 not in tensor.shape
    ]
    wholes = {name: Whole(tensor.dtype, tensor.shape, tensor.rounded_from) for name, tensor in manifest.tensors.items()}
    extras = {file.path: read_extra(source, file.path) for file in manifest.files if file.blake3 is not None}
    plan = Plan(tuple(items), wholes)
    with Threads() as threads:
        job = Job(step=manifest.step, tensors=stored, values=manifest.values, plan=plan, extras=extras, codec=codec)
        return write(job, root, company=Company(doing=f"converting {source}"), threads=threads, read_back=True)


class _Watched(Mapping[str, torch.Tensor]):
    """The same tensors; each one that is asked for counts."""

    def __init__(self, stored: Stored, on_progress: OnProgress) -> None:
        self._stored, self._on_progress, self._asked = stored, on_progress, 0

    def __getitem__(self, name: str) -> torch.Tensor:
        self._asked += 1
        self._on_progress(self._asked, len(self._stored))
        return self._stored[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
