"""Loading: the newest whole checkpoint is found, its bytes are verified, and it fills just the model that it belongs to."""

from __future__ import annotations

import logging
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quintet.checkpoint import codec as codecs
from quintet.checkpoint.agreement import Company
from quintet.checkpoint.durable import failure, open_regular
from quintet.checkpoint.manifest import BLOCK, ITEM_SIZE, NAME, Manifest, Piece, Tensor, loads, step_of
from quintet.checkpoint.pieces import Box, Pieces, boxes_here, dtype_name, meet, run_of_boxes, tensors_of, within
from quintet.checkpoint.store import Block, DataFiles, Threads, fill, flat_memory, verify_data, verify_file
from quintet.errors import CheckpointError, did_you_mean

_LOG = logging.getLogger(__name__)
_LISTED = 8
PIN = ".pinned"
"""A hidden file in a checkpoint's directory, which lets it stay."""
LOSS = "held_out_loss"
"""The plain value that retention compares."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A directory that has a checkpoint's name."""

    path: Path
    """The directory."""
    step: int
    """The step that its name says."""
    problem: str | None
    """Why it cannot be loaded, or None."""
    pinned: bool
    """Whether it stays whatever the rules of retention say."""
    loss: float | None = None
    """Mean held-out loss, where it was evaluated at its step."""
    num_bytes: int = 0
    """Size of its files."""
    digest: str = ""
    """BLAKE3 of the manifest, which is over every other hash."""


def list_checkpoints(root: Path) -> list[Found]:
    """Every checkpoint under `root` by ascending step, damaged ones with their problem; other names are left out."""
    steps = [(step, path) for path in (root.iterdir() if root.is_dir() else ()) if (step := step_of(path.name)) is not None]
    return [_found(path, step) for step, path in sorted(steps)]


def latest(root: Path, *, verify_content: bool = False, report: Callable[[str], None] = _LOG.warning) -> Path:
    """The newest checkpoint under `root` that is complete, or with `verify_content` also unchanged in every byte.

    Each newer one that is passed over is told to `report` with its reason. Raises CheckpointError if there is none, listing the damaged.
    """
    problems: list[str] = []
    for found in reversed(list_checkpoints(root)):
        problem = found.problem
        if problem is None and verify_content:
            problem = _problem(found.path, verify)
        if problem is None:
            for passed in problems:
                report(f"passed over a damaged checkpoint: {passed}")
            return found.path
        problems.append(f"{found.path}: {problem}")
    if problems:
        raise none_whole(root, problems)
    raise CheckpointError(f"no checkpoint under {root}; a run writes one every checkpoint.every steps, at its end and on a signal")


def candidates(root: Path, report: Callable[[str], None]) -> list[Path]:
    """The checkpoints under `root` that are complete, newest first, their text files unchanged; of tensors nothing has been read.

    Others are told to `report` with their reasons. Raises CheckpointError if there are only such.
    """
    checked = [(found, found.problem or _problem(found.path, _verify_texts)) for found in reversed(list_checkpoints(root))]
    problems = [f"{found.path}: {problem}" for found, problem in checked if problem]
    if problems and len(problems) == len(checked):
        raise none_whole(root, problems)
    for problem in problems:
        report(f"passed over a damaged checkpoint: {problem}")
    return [found.path for found, problem in checked if not problem]


def none_whole(root: Path, problems: Iterable[str]) -> CheckpointError:
    """The error where all checkpoints are damaged, each with its reason."""
    listing = "\n  ".join(problems)
    return CheckpointError(f"no checkpoint under {root} is whole; restore one from a copy, or start a new run:\n  {listing}")


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a complete checkpoint: it is read, and every file is there with its size, and none besides.

    Raises CheckpointError. The content of the files is not read: see `verify`. Hidden files are ignored.
    """
    try:
        if directory.is_symlink():
            raise CheckpointError(f"{directory} is a symbolic link; name the checkpoint itself")
        if not directory.is_dir():
            raise CheckpointError(f"no checkpoint at {directory}")
        manifest = loads(_content(directory / NAME))
        step = step_of(directory.name)
        if step is not None and step != manifest.step:
            raise CheckpointError(f"{NAME} is of step {manifest.step}, but the directory's name is {directory.name}")
        _check_files(directory, manifest)
    except FileNotFoundError as error:
        raise CheckpointError(f"{Path(error.filename).name} is missing") from None
    except OSError as error:
        raise failure(error, doing=f"reading {directory}") from None
    return manifest


OnProgress = Callable[[float, float], None]
"""Hears how much of what total is done."""


def verify(directory: Path, *, on_progress: OnProgress = lambda done, total: None) -> Manifest:
    """`read_manifest`, and every byte of every file has been hashed, by several threads. Raises CheckpointError."""
    manifest = read_manifest(directory)
    total = sum(file.size for file in manifest.files)
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        on_progress(done, total)

    _verify_texts(directory)
    count(sum(file.size for file in manifest.files if file.blake3 is not None))
    try:
        with Threads() as threads:
            verify_data(directory, [piece for tensor in manifest.tensors.values() for piece in tensor.pieces], threads, on_bytes=count)
    except OSError as error:
        raise failure(error, doing=f"reading {directory}") from None
    return manifest


def read_extra(directory: Path, name: str) -> str:
    """The text file that was stored beside the tensors under `name`, verified. Raises CheckpointError if it is absent or damaged."""
    manifest = read_manifest(directory)
    known = [file.path for file in manifest.files if file.blake3 is not None]
    if name not in known:
        raise CheckpointError(f"{directory} holds no {name}{did_you_mean(name, known)}; it holds {', '.join(known)}")
    _verify_file(directory, manifest, name)
    return _content(directory / name).decode()


def load(
    state: Mapping[str, Any], directory: Path, *, strict: bool = True, elsewhere: Callable[[str], bool] = lambda name: False
) -> dict[str, Any]:
    """Fill the tensors of `state` in place from a checkpoint; all ranks of the default process group, where there is one, call it
    together.

    state: tensors by name, of any device, whole or a rank's Pieces; and names of plain values, with anything in their place.
    elsewhere: whether a tensor of the checkpoint that `state` does not name is another rank's to load.

    Returns all plain values of the checkpoint. Only blocks that hold something of what is wanted are read, and each is verified before it
    is used. No tensor is touched before names, shapes and dtypes have been compared. Raises, on all ranks, CheckpointError for a checkpoint
    of another model (a name of `state` that is missing, another shape or dtype, and, if `strict`, a tensor of the checkpoint that neither
    `state` nor `elsewhere` knows); and DamagedError for damage: then some tensors hold what is not to be used.
    """
    tensors = tensors_of(state)
    company = Company(doing=f"loading {directory}")
    values: dict[str, Any] = {}

    def fill_all() -> None:
        manifest = read_manifest(directory)
        foreign = {name for name in manifest.tensors.keys() - tensors.keys() if not strict or elsewhere(name)}
        _check_fit(directory, manifest, tensors, values=state.keys() - tensors.keys(), foreign=foreign)
        values.update(manifest.values)
        with Threads(num_ranks=company.size) as threads, DataFiles(directory) as files:
            for stage in _stages(manifest, tensors):
                _read(stage, files, threads)

    company.collect(fill_all)
    return values


class Stored(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint, each read when it is asked for; only the last one is kept. Raises CheckpointError, as `load` does.

    names: the mapping's own names -> the checkpoint's; by default all under their own.
    """

    def __init__(self, directory: Path, names: Mapping[str, str] | None = None) -> None:
        self.manifest = read_manifest(directory)
        self._directory = directory
        self._names = names if names is not None else {name: name for name in self.manifest.tensors}
        self._last: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self._names[name]
        if name not in self._last:
            self._last = {}  # before there are two
            tensor = torch.empty(self.shape(name), dtype=getattr(torch, self.manifest.tensors[stored].dtype))
            load({stored: tensor}, self._directory, strict=False)
            self._last = {name: tensor}
        return self._last[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self.manifest.tensors[self._names[name]].shape

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class _Wish:
    """A box of a tensor that a piece shall fill, and whether its elements are rounded on the way."""

    box: Box
    tensor: torch.Tensor
    rounds: bool


@dataclass(frozen=True)
class _Reading:
    """A piece, and what it fills."""

    piece: Piece
    dtype: str
    wishes: list[_Wish]


def _stages(manifest: Manifest, tensors: Mapping[str, torch.Tensor | Pieces]) -> Iterator[list[_Reading]]:
    """What is read, in two stages: what lies before what is rounded, all that is stored; then what of the rounded is stored itself."""
    wishes: dict[str, list[_Wish]] = {}
    for name, value in tensors.items():
        saved = manifest.tensors[name]
        for offsets, tensor in boxes_here(value).items():
            box = (offsets, tuple(tensor.shape))
            wishes.setdefault(name, []).append(_Wish(box, tensor, False))
            if saved.rounded_from is not None:
                wishes.setdefault(saved.rounded_from, []).append(_Wish(box, tensor, True))
    for later in (False, True):
        yield [
            _Reading(piece, manifest.tensors[name].dtype, touched)
            for name, wished in wishes.items()
            for piece in manifest.tensors[name].pieces
            if (manifest.tensors[name].rounded_from is not None) == later
            and (touched := [wish for wish in wished if meet(wish.box, (piece.offsets, piece.sizes))])
        ]


def _read(readings: list[_Reading], files: DataFiles, threads: Threads) -> None:
    """Read the blocks that hold something of what is wished for, in the order in which they lie on the disk."""
    readings = sorted(readings, key=lambda reading: (reading.piece.file, reading.piece.offset))
    files.open(reading.piece.file for reading in readings)
    rows = threads.in_order(lambda reading: (reading, files.blocks(reading.piece)), readings)
    jobs = (job for reading, blocks in rows for block in blocks if (job := _job(reading, block)))

    def soon() -> Iterator[_Job]:
        for job in jobs:
            files.will_read(job.reading.piece, job.block)
            yield job

    for _ in threads.in_order(lambda job: job.run(files), soon()):
        pass


def _job(reading: _Reading, block: Block) -> _Job | None:
    """What is to be done with a block, or None where nothing of it is wanted."""
    piece, begin = reading.piece, block.number * BLOCK
    end = min(begin + BLOCK, piece.numel)
    runs = [_moved(box, piece.offsets) for box in run_of_boxes(piece.sizes, begin, end)]
    hits = [(wish, run, shared) for wish in reading.wishes for run in runs if (shared := meet(wish.box, run))]
    return _Job(reading, block, (begin, end), runs, hits) if hits else None


@dataclass(frozen=True)
class _Job:
    """A block of elements `begin` to `end` of a piece, the boxes that it consists of, and of them what each wish wants."""

    reading: _Reading
    block: Block
    range: tuple[int, int]
    runs: list[Box]
    hits: list[tuple[_Wish, Box, Box]]

    def run(self, files: DataFiles) -> None:
        """Read, verify, decode and fill."""
        memory, dtype = self._in_place(), self.reading.dtype
        data = files.elements(self.reading.piece, self.block, dtype, memory)
        parts = {False: self._parts(torch.from_numpy(data).view(getattr(torch, dtype)))}
        if any(wish.rounds for wish, _, _ in self.hits):
            parts[True] = self._parts(torch.from_numpy(codecs.rounded(data)).view(torch.bfloat16))
        for wish, run, shared in self.hits:
            if memory is None or wish.rounds or wish.box != self._box:
                fill(within(shared, wish.box[0], wish.tensor), within(shared, run[0], parts[wish.rounds][run]))

    @property
    def _box(self) -> Box:
        return self.reading.piece.offsets, self.reading.piece.sizes

    def _in_place(self) -> codecs.Bytes | None:
        """The memory of the one who wants the whole piece as it is: there the block can be put at once."""
        wishes = [wish for wish in self.reading.wishes if wish.box == self._box and not wish.rounds]
        memory = flat_memory(wishes[0].tensor) if len(wishes) == 1 else None
        size = ITEM_SIZE[self.reading.dtype]
        return None if memory is None else memory[self.range[0] * size : self.range[1] * size]

    def _parts(self, values: torch.Tensor) -> dict[Box, torch.Tensor]:
        """The block's elements [numel] -> by the boxes that it consists of."""
        lengths = [math.prod(sizes) for _, sizes in self.runs]
        return {run: part.view(run[1]) for run, part in zip(self.runs, values.split(lengths), strict=True)}


def _moved(box: Box, by: tuple[int, ...]) -> Box:
    return tuple(a + b for a, b in zip(box[0], by, strict=True)), box[1]


def _found(path: Path, step: int) -> Found:
    pinned = os.path.lexists(path / PIN)
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return Found(path=path, step=step, problem=str(error), pinned=pinned)
    loss = manifest.values.get(LOSS)
    return Found(
        path=path,
        step=step,
        problem=None,
        pinned=pinned,
        loss=float(loss) if isinstance(loss, int | float) else None,
        num_bytes=sum(file.size for file in manifest.files),
        digest=manifest.digest,
    )


def _problem(path: Path, check: Callable[[Path], Manifest]) -> str | None:
    try:
        check(path)
    except CheckpointError as error:
        return str(error)
    return None


def _content(path: Path) -> bytes:
    fd = open_regular(path)
    with os.fdopen(fd, "rb") as file:
        return file.read()


def _verify_texts(directory: Path) -> Manifest:
    manifest = read_manifest(directory)
    for file in manifest.files:
        if file.blake3 is not None:
            _verify_file(directory, manifest, file.path)
    return manifest


def _verify_file(directory: Path, manifest: Manifest, name: str) -> None:
    try:
        verify_file(directory, next(file for file in manifest.files if file.path == name))
    except OSError as error:
        raise failure(error, doing=f"reading {directory / name}") from None


def _check_files(directory: Path, manifest: Manifest) -> None:
    for file in manifest.files:
        status = os.lstat(directory / file.path)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{file.path} is not a plain file")
        if status.st_size != file.size:
            raise CheckpointError(f"{file.path} has {status.st_size} bytes instead of {file.size}")
    known = {NAME, *(file.path for file in manifest.files)}
    if extra := sorted(name for name in os.listdir(directory) if name not in known and not name.startswith(".")):
        raise CheckpointError(f"{_enumerate(extra)} does not belong to it: the manifest does not name it")


def _check_fit(
    directory: Path, manifest: Manifest, tensors: Mapping[str, torch.Tensor | Pieces], *, values: Iterable[str], foreign: set[str]
) -> None:
    saved = manifest.tensors
    here = {name: str(Tensor(dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape), pieces=())) for name, tensor in tensors.items()}
    different = [f"{name} ({saved[name]} there, {here[name]} here)" for name in here if name in saved and str(saved[name]) != here[name]]
    absent = [name for name in here if name not in saved] + [name for name in values if name not in manifest.values]
    missing = [name + did_you_mean(name, saved.keys() - here.keys()) for name in sorted(absent)[:_LISTED]] + sorted(absent)[_LISTED:]
    unexpected = sorted(saved.keys() - here.keys() - foreign)
    lines = [
        f"{label}: {_enumerate(names)}"
        for label, names in (
            ("another shape or dtype", different),
            ("missing in the checkpoint", missing),
            ("in the checkpoint but not in this model", unexpected),
        )
        if names
    ]
    if lines:
        raise CheckpointError(
            f"{directory} is not a checkpoint of this model; resume with the recipe that it was saved with, or start a new run:\n  "
            + "\n  ".join(lines)
        )
    if meta := [name for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor) and tensor.is_meta]:
        raise CheckpointError(f"{_enumerate(meta)} has no memory to load into: it is on the meta device; materialize it first")


def _enumerate(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
