"""Saving: a checkpoint appears under its name whole and on disk, or not at all.

The protocol (the only one of five that survived every crash state of its model: temporary directory, files synced, manifest last,
directory synced, rename, parent synced, then the caller is told):

1. sweep what dead processes left;
2. each rank writes its pieces into a data file of its own in a new `.tmp-...` directory, and syncs it;
3. rank 0, once all have done so, writes the extra files and then the manifest;
4. it syncs the directory, renames it to `step-00000100`, and syncs the parent.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quintet.checkpoint.agreement import Company
from quintet.checkpoint.durable import FileWriter, TemporaryDirectory, failure, sweep, sync_directory, write_file
from quintet.checkpoint.load import verify
from quintet.checkpoint.manifest import (
    ITEM_SIZE,
    NAME,
    Codec,
    File,
    Manifest,
    Piece,
    Tensor,
    Values,
    check_file_name,
    check_value,
    directory_name,
    dumps,
)
from quintet.checkpoint.pieces import Pieces, boxes_here, dtype_name, meet, tensors_of, values_of, within
from quintet.checkpoint.plan import Item, Plan, make_plan
from quintet.checkpoint.store import Source, Threads, drop_from_cache, is_rounding, verify_data, write_pieces
from quintet.errors import CheckpointError


def save(
    state: Mapping[str, Any],
    root: Path,
    *,
    step: int,
    extras: Mapping[str, str] | None = None,
    rounded: Mapping[str, str] | None = None,
    codec: Codec = "planes",
) -> Path:
    """Save `state` as the checkpoint of `step` under `root`; all ranks of the default process group, where there is one, call it together.

    state: tensors (a rank's Pieces of those that are spread over ranks; others, which are equal on all, once) and plain values (None, bool,
        int, finite float, str, list, dict; rank 0's count) by name.
    extras: text files that are stored beside the tensors, by file name.
    rounded: name of a bf16 tensor -> of the fp32 one that it is expected to be the rounding of; a box where it is so is not stored.

    Returns the checkpoint's directory, `root/step-00000100`. If that step is there already, whole and with the same content, nothing
    changes; if it is there but damaged, it is moved aside to `step-00000100.corrupt-0`. Raises CheckpointError, on all ranks, if the state
    cannot be saved, if another content has this step already, or if the file system refuses: then the temporary directory is removed and
    earlier checkpoints are untouched.
    """
    company = Company(doing=f"saving {root / directory_name(step)}")
    company.share(lambda: check(state, step, extras or {}))
    plan = make_plan(state, rounded or {}, company)
    job = Job(step=step, tensors=tensors_of(state), values=values_of(state), plan=plan, extras=extras or {}, codec=codec)
    with Threads(num_ranks=company.size) as threads:
        return write(job, root, company=company, threads=threads)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one save writes."""

    step: int
    tensors: Mapping[str, torch.Tensor | Pieces]
    values: Values
    plan: Plan
    extras: Mapping[str, str]
    codec: Codec


def write(job: Job, root: Path, *, company: Company, threads: Threads, read_back: bool = False) -> Path:
    """Write a planned state as `save` does; with `read_back` every rank reads what it wrote from the disk again before it counts."""
    attempt = _Attempt(root, job)
    try:
        directory = Path(company.lead(lambda: str(attempt.begin())))
        path = directory / f"data-{company.rank:05d}.bin"
        company.collect(lambda: _write_share(path, job, threads, read_back=read_back), attempt.commit)
    finally:
        attempt.close()
    return attempt.final


@dataclass(frozen=True)
class _Share:
    """What a rank has written."""

    file: File | None
    pieces: list[tuple[str, Piece]]


def _write_share(path: Path, job: Job, threads: Threads, *, read_back: bool) -> _Share:
    with FileWriter(path, hashed=False) as writer:
        pieces = write_pieces(writer, _sources(job, threads), job.codec, threads)
    if not pieces:
        path.unlink()
        return _Share(None, [])
    if read_back:
        drop_from_cache(path)
        verify_data(path.parent, [piece for _, piece in pieces], threads)
    return _Share(writer.file, pieces)


def _sources(job: Job, threads: Threads) -> Iterator[Source]:
    """What this rank's items store: the twin of an item only where it is not its rounding."""
    for item in job.plan.items:
        tensor = held(job.tensors[item.name], item)
        yield Source(item.name, item.box, tensor)
        if item.twin is not None:
            twin = held(job.tensors[item.twin], item)
            if not is_rounding(tensor, twin, threads):
                yield Source(item.twin, item.box, twin)


def held(value: torch.Tensor | Pieces, item: Item) -> torch.Tensor:
    """The view of an item's box in what is here of a tensor."""
    for offsets, tensor in boxes_here(value).items():
        if meet((offsets, tuple(tensor.shape)), item.box) == item.box:
            return within(item.box, offsets, tensor)
    raise AssertionError(item)


def check(state: Mapping[str, Any], step: int, extras: Mapping[str, str]) -> None:
    """Raise CheckpointError for a state that cannot be saved."""
    if not 0 <= step < 10**18:
        raise CheckpointError(f"step ({step}) must lie between 0 and 10^18 - 1")
    for name in extras:
        if check_file_name(name).endswith(".bin"):
            raise CheckpointError(f"{name!r} cannot be stored beside a checkpoint: names that end in .bin are its own")
    for name, value in state.items():
        if isinstance(value, Pieces):
            for tensor in value.boxes.values():
                assert tensor.dtype == value.dtype and dtype_name(tensor.dtype) in ITEM_SIZE
        elif not isinstance(value, torch.Tensor):
            check_value(value, name=name)
        elif value.layout != torch.strided or value.is_quantized or value.is_meta or dtype_name(value.dtype) not in ITEM_SIZE:
            raise CheckpointError(
                f"tensor {name!r} ({value.dtype}, {value.layout}, on {value.device}) cannot be saved: only dense, materialized tensors of "
                f"{', '.join(ITEM_SIZE)} can"
            )


class _Attempt:
    """One save on the coordinator: its temporary directory, and how it becomes the final one."""

    def __init__(self, root: Path, job: Job) -> None:
        self.root, self.job = root, job
        self.final = root / directory_name(job.step)
        self._temporary: TemporaryDirectory | None = None

    def begin(self) -> Path:
        if self.root.is_dir():
            sweep(self.root)
        self._temporary = TemporaryDirectory(self.root, self.final.name)
        return self._temporary.path

    def commit(self, shares: list[_Share]) -> None:
        assert self._temporary is not None
        files = [share.file for share in shares if share.file is not None]
        files += [write_file(self._temporary.path / name, text.encode()) for name, text in self.job.extras.items()]
        whole = self._manifest(shares, files)
        write_file(self._temporary.path / NAME, dumps(whole))
        if not os.path.lexists(self.final) or not self._is_saved(whole):
            self._temporary.move_to(self.final)

    def _manifest(self, shares: list[_Share], files: list[File]) -> Manifest:
        pieces: dict[str, list[Piece]] = {}
        for name, piece in (found for share in shares for found in share.pieces):
            pieces.setdefault(name, []).append(piece)
        tensors = {
            name: Tensor(dtype=whole.dtype, shape=whole.shape, pieces=tuple(pieces.get(name, ())), rounded_from=whole.rounded_from)
            for name, whole in self.job.plan.tensors.items()
        }
        return Manifest(step=self.job.step, files=tuple(files), tensors=tensors, values=self.job.values)

    def _is_saved(self, whole: Manifest) -> bool:
        """Whether the final directory holds just this; another content is an error, a damaged one is moved aside."""
        try:
            there = verify(self.final)
        except CheckpointError:
            aside = (self.final.with_name(f"{self.final.name}.corrupt-{i}") for i in itertools.count())
            os.rename(self.final, next(path for path in aside if not os.path.lexists(path)))
            sync_directory(self.root)
            return False
        if there != whole:
            raise CheckpointError(
                f"{self.final} exists already, is whole, and holds other content; a step is never overwritten: remove or rename it, or "
                "save under another directory"
            )
        return True

    def close(self) -> None:
        if self._temporary is not None:
            try:
                self._temporary.close()
            except OSError as error:
                raise failure(error, doing=f"removing {self._temporary.path}") from None
