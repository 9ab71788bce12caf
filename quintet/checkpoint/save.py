"""Saving: a checkpoint appears under its name whole and on disk, or not at all.

The protocol (the only one of five that survived every crash state of its model: temporary directory, files synced, manifest last,
directory synced, rename, parent synced, then the caller is told):

1. sweep what dead processes left;
2. each rank writes its pieces into a data file of its own in a new `.tmp-...` directory, and syncs it;
3. rank 0, once all have done so, writes the extra files and then the manifest;
4. it syncs the directory, renames it to `step-00000100`, and syncs the parent.

An object store knows no renaming, and no half-written object. There the data files get names that no other attempt has, in the final
folder, and a checkpoint is what has a manifest: that comes last, and only where none is.
"""

from __future__ import annotations

import itertools
import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quintet.checkpoint.agreement import Company
from quintet.checkpoint.durable import FileWriter, TemporaryDirectory, failure, sweep, sync_directory
from quintet.checkpoint.exchange import verify_data
from quintet.checkpoint.load import read_manifest, verify
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
from quintet.checkpoint.pieces import Later, Pieces, boxes_here, cut, dtype_name, meet, tensors_of, values_of, within
from quintet.checkpoint.place import AT_ONCE, ATTEMPT, FILE, Place, Remote, RemoteWriter, described, store
from quintet.checkpoint.plan import Item, Plan, make_plan
from quintet.checkpoint.store import Known, Source, Threads, drop_from_cache, write_pieces
from quintet.errors import CheckpointError


def save(
    state: Mapping[str, Any],
    root: Place,
    *,
    step: int,
    extras: Mapping[str, str] | None = None,
    rounded: Mapping[str, str] | None = None,
    codec: Codec = "planes",
) -> Place:
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
    tensors: Mapping[str, torch.Tensor | Pieces | Later]
    values: Values
    plan: Plan
    extras: Mapping[str, str]
    codec: Codec
    base: int | None = None
    """The step of the checkpoint that this one may refer to."""
    known: Known | None = None
    """What this rank wrote of it; empty where later ones may refer to this one, None where nobody refers to anybody."""
    wrote: Callable[[list[tuple[str, Piece]]], None] = lambda pieces: None
    """Hears of the pieces of this rank, once all is saved, where they refer to nothing."""


def write(job: Job, root: Place, *, company: Company, threads: Threads, read_back: bool = False) -> Place:
    """Write a planned state as `save` does; with `read_back` every rank reads what it wrote from the disk again before it counts."""
    attempt = _RemoteAttempt(root, job) if isinstance(root, Remote) else _Attempt(root, job)
    try:
        told, base_is_there = company.lead(lambda: (attempt.begin(), job.base is not None and _is_there(root, job.base)))
        job = job if base_is_there or not job.known else replace(job, base=None, known={})
        share = list[_Share]()

        def write_share() -> _Share:
            files = (attempt.data_file(told, number) for number in itertools.count(company.rank, company.size))
            share.append(_write_share(files, job, threads, read_back=read_back))
            return share[0]

        company.collect(write_share, attempt.commit)
    finally:
        attempt.close()
    if job.known is not None and not job.known:
        job.wrote(share[0].pieces)
    return attempt.final


def _is_there(root: Place, step: int) -> bool:
    """Whether a checkpoint is whole, as far as a look at its files tells."""
    try:
        read_manifest(root / directory_name(step))
    except CheckpointError:
        return False
    return True


@dataclass(frozen=True)
class _Share:
    """What a rank has written."""

    files: list[File]
    pieces: list[tuple[str, Piece]]


def _write_share(places: Iterator[Place], job: Job, threads: Threads, *, read_back: bool) -> _Share:
    """Write this rank's items: into one file of a folder; into several objects of a store, some of which go up at a time."""
    first = next(places)
    if isinstance(first, Path):
        shares = [_write_file(first, job, job.plan.items, threads)]
    else:
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="upload") as uploads:
            begun = [
                uploads.submit(_write_file, place, job, items, threads)
                for place, items in zip(itertools.chain([first], places), _divided(job), strict=False)
            ]
            try:
                shares = [upload.result() for upload in begun]
            finally:
                uploads.shutdown(cancel_futures=True)
    share = _Share([file for each in shares for file in each.files], [piece for each in shares for piece in each.pieces])
    own = {file.path for file in share.files}
    if read_back and own:
        if isinstance(first, Path):
            drop_from_cache(first)
        verify_data(first.parent, [piece for _, piece in share.pieces if piece.file in own], threads)
    return share


def _divided(job: Job) -> Iterator[list[Item]]:
    """This rank's items, of at most `FILE` bytes each time; larger ones are cut."""
    items, size = list[Item](), 0
    for item in job.plan.items:
        itemsize = ITEM_SIZE[job.plan.tensors[item.name].dtype]
        for box in cut(item.box, FILE // itemsize):
            more = math.prod(box[1]) * itemsize
            if items and size + more > FILE:
                yield items
                items, size = [], 0
            items.append(replace(item, box=box))
            size += more
    if items:
        yield items


def _write_file(path: Place, job: Job, items: Sequence[Item], threads: Threads) -> _Share:
    def write_all(writer: FileWriter | RemoteWriter) -> _Share:
        pieces = write_pieces(writer, _sources(job, items), job.codec, threads, job.known)
        return _Share([writer.file] if writer.size else [], pieces)

    if isinstance(path, Remote):
        share = path.upload(write_all)
    else:
        with FileWriter(path, hashed=False) as writer:
            share = write_all(writer)
    if not share.files:
        path.remove() if isinstance(path, Remote) else path.unlink()
    return share


def _sources(job: Job, items: Iterable[Item]) -> Iterator[Source]:
    """What items store."""
    for item in items:
        twin = None if item.twin is None else (item.twin, held(job.tensors[item.twin], item))
        yield Source(item.name, item.box, held(job.tensors[item.name], item), twin)


def held(value: torch.Tensor | Pieces | Later, item: Item) -> torch.Tensor:
    """The view of an item's box in what is here of a tensor."""
    if isinstance(value, Later):
        return value.read(item.box)
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

    def begin(self) -> str:
        """What the other ranks must know."""
        if self.root.is_dir():
            sweep(self.root)
        self._temporary = TemporaryDirectory(self.root, self.final.name)
        return str(self._temporary.path)

    def data_file(self, told: str, number: int) -> Path:
        """Where a rank writes."""
        return Path(told) / f"data-{number:05d}.bin"

    def commit(self, shares: list[_Share]) -> None:
        """From what all ranks have written to a checkpoint."""
        assert self._temporary is not None
        files = [store(self._temporary.path / name, text.encode()) for name, text in self.job.extras.items()]
        whole = _manifest(self.root, self.job, shares, files)
        store(self._temporary.path / NAME, dumps(whole))
        if not os.path.lexists(self.final) or not _is_saved(self.final, whole, self._set_aside):
            self._temporary.move_to(self.final)

    def _set_aside(self) -> None:
        aside = (self.final.with_name(f"{self.final.name}.corrupt-{i}") for i in itertools.count())
        os.rename(self.final, next(path for path in aside if not os.path.lexists(path)))
        sync_directory(self.root)

    def close(self) -> None:
        """Leave nothing behind."""
        if self._temporary is not None:
            try:
                self._temporary.close()
            except OSError as error:
                raise failure(error, doing=f"removing {self._temporary.path}") from None


class _RemoteAttempt:
    """One save to an object store."""

    def __init__(self, root: Remote, job: Job) -> None:
        self.root, self.job = root, job
        self.final = root / directory_name(job.step)
        self._token: str | None = None

    def begin(self) -> str:
        """What the other ranks must know."""
        self._token = secrets.token_hex(4)
        self.final.make_folder()
        return self._token

    def data_file(self, told: str, number: int) -> Remote:
        """Where a rank writes."""
        return self.final / f"data-{number:05d}-{told}.bin"

    def commit(self, shares: list[_Share]) -> None:
        """From what all ranks have written to a checkpoint."""
        files = [described(name, text.encode()) for name, text in self.job.extras.items()]
        whole = _manifest(self.root, self.job, shares, files)
        if NAME in self.final.entries() and _is_saved(self.final, whole, self._set_aside):
            return
        for name, text in self.job.extras.items():
            store(self.final / name, text.encode())
        there, wanted = self.final.entries(), {file.path: file.size for file in whole.files if file.holder is None}
        if any(there.get(name) != size for name, size in wanted.items()):
            raise CheckpointError(f"{self.final}: what was just written is not there; give each run a folder that no other one writes to")
        try:
            (self.final / NAME).create(dumps(whole))
        except FileExistsError:
            raise CheckpointError(f"{self.final} was saved by somebody else meanwhile; give each run a folder of its own") from None
        self._token = None
        for name in there.keys() - wanted.keys():  # of attempts that came to nothing
            if there[name] is not None and not name.startswith("."):
                (self.final / name).remove()

    def _set_aside(self) -> None:
        taken = self.root.entries()
        aside = next(name for i in itertools.count() if (name := f"{self.final.name}.corrupt-{i}") not in taken)
        there = [name for name, size in self.final.entries().items() if size is not None and not name.endswith(f"-{self._token}.bin")]
        (self.root / aside).make_folder()
        for name in sorted(there, key=lambda name: name != NAME):
            (self.final / name).move_to(self.root / aside / name)

    def close(self) -> None:
        """Remove what did not become a checkpoint."""
        if self._token is not None:
            try:
                there = self.final.entries()
                for name in there:
                    if name.endswith(f"-{self._token}.bin"):
                        (self.final / name).remove()
                if all(name.endswith(f"-{self._token}.bin") for name in there):
                    self.final.remove_folder()
            except OSError as error:
                raise failure(error, doing=f"removing what is left at {self.final}") from None


def _manifest(root: Place, job: Job, shares: list[_Share], files: list[File]) -> Manifest:
    pieces: dict[str, list[Piece]] = {}
    for name, piece in (found for share in shares for found in share.pieces):
        pieces.setdefault(name, []).append(piece)
    tensors = {
        name: Tensor(dtype=whole.dtype, shape=whole.shape, pieces=tuple(pieces.get(name, ())), rounded_from=whole.rounded_from)
        for name, whole in job.plan.tensors.items()
    }
    data = [file for share in shares for file in share.files]
    data += _referred(root, job, {piece.file for share in shares for _, piece in share.pieces if "/" in piece.file})
    return Manifest(step=job.step, files=(*data, *files), tensors=tensors, values=job.values)


def _referred(root: Place, job: Job, names: set[str]) -> list[File]:
    """The files of the base that are referred to."""
    if not names:
        return []
    assert job.base is not None
    holder = directory_name(job.base)
    return [replace(file, path=f"{holder}/{file.path}") for file in read_manifest(root / holder).files if f"{holder}/{file.path}" in names]


def _is_saved(final: Place, whole: Manifest, set_aside: Callable[[], None]) -> bool:
    """Whether there is just this already; another content is an error, a damaged one is moved aside."""
    try:
        there = verify(final)
    except CheckpointError:
        set_aside()
        return False
    if _content_of(there) != _content_of(whole):
        raise CheckpointError(
            f"{final} exists already, is whole, and holds other content; a step is never overwritten: remove or rename it, or save under "
            "another directory"
        )
    return True


def _content_of(manifest: Manifest) -> Manifest:
    """The manifest without what is an attempt's own in the names of its data files."""
    own = {file.path: ATTEMPT.sub(r"\1\2", file.path) for file in manifest.files}
    tensors = {
        name: replace(tensor, pieces=tuple(replace(piece, file=own[piece.file]) for piece in tensor.pieces))
        for name, tensor in manifest.tensors.items()
    }
    return replace(manifest, files=tuple(replace(file, path=own[file.path]) for file in manifest.files), tensors=tensors)
