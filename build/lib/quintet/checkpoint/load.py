"""Loading: the newest whole checkpoint is found, its bytes are verified, and it fills just the model that it belongs to."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quintet.checkpoint.agreement import Company
from quintet.checkpoint.durable import failure
from quintet.checkpoint.exchange import verify_data
from quintet.checkpoint.manifest import NAME, Manifest, Tensor, loads, step_of
from quintet.checkpoint.pieces import Box, Later, Pieces, box_at, dtype_name, tensors_of
from quintet.checkpoint.place import ATTEMPT, Place, Remote, content, entries, require_folder
from quintet.checkpoint.reading import read, stages
from quintet.checkpoint.store import DataFiles, Spent, Threads, verify_file
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

    path: Place
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
    refers_to: tuple[int, ...] = ()
    """Steps of the earlier checkpoints whose files it uses too."""


def list_checkpoints(root: Place) -> list[Found]:
    """Every checkpoint under `root` by ascending step, damaged ones with their problem; other names are left out."""
    try:
        names = entries(root) if isinstance(root, Remote) or root.is_dir() else {}
    except OSError as error:
        raise failure(error, doing=f"listing {root}") from None
    found = [_found(root / name, step) for name in names if (step := step_of(name)) is not None]
    return sorted((each for each in found if each is not None), key=lambda each: each.step)


def latest(root: Place, *, verify_content: bool = False, report: Callable[[str], None] = _LOG.warning) -> Place:
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


def candidates(root: Place, report: Callable[[str], None]) -> list[Place]:
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


def none_whole(root: Place, problems: Iterable[str]) -> CheckpointError:
    """The error where all checkpoints are damaged, each with its reason."""
    listing = "\n  ".join(problems)
    return CheckpointError(f"no checkpoint under {root} is whole; restore one from a copy, or start a new run:\n  {listing}")


def read_manifest(directory: Place) -> Manifest:
    """The manifest of a complete checkpoint: it is read, and every file is there with its size, and none besides.

    Raises CheckpointError. The content of the files is not read: see `verify`. Hidden files are ignored.
    """
    return _checked(directory)[0]


def _checked(directory: Place) -> tuple[Manifest, bytes]:
    """The manifest and its bytes, once the directory has been found to hold what it names."""
    try:
        require_folder(directory)
        data = content(directory / NAME)
        there = entries(directory)
        if isinstance(directory, Remote):  # another attempt's, which came to nothing or will
            there = {name: size for name, size in there.items() if not ATTEMPT.fullmatch(name) or name.encode() in data}
        manifest = _manifest(directory, data)
        _check_files(there, manifest)
        _check_referred(directory, manifest)
    except FileNotFoundError as error:
        raise CheckpointError(f"{Path(error.filename or NAME).name} is missing") from None
    except OSError as error:
        raise failure(error, doing=f"reading {directory}") from None
    return manifest, data


def _manifest(directory: Place, data: bytes) -> Manifest:
    manifest = loads(data)
    step = step_of(directory.name)
    if step is not None and step != manifest.step:
        raise CheckpointError(f"{NAME} is of step {manifest.step}, but the directory's name is {directory.name}")
    return manifest


OnProgress = Callable[[float, float], None]
"""Hears how much of what total is done."""


def verify(directory: Place, *, on_progress: OnProgress = lambda done, total: None) -> Manifest:
    """`read_manifest`, and every byte of every file has been hashed, by several threads. Raises CheckpointError."""
    manifest = read_manifest(directory)
    texts = sum(file.size for file in manifest.files if file.blake3 is not None)
    total = texts + sum(piece.length for tensor in manifest.tensors.values() for piece in tensor.pieces)
    done, lock = 0, threading.Lock()

    def count(more: int) -> None:
        nonlocal done
        with lock:
            done += more
            on_progress(done, total)

    _verify_texts(directory)
    count(texts)
    try:
        with Threads(reading=directory) as threads:
            verify_data(directory, [piece for tensor in manifest.tensors.values() for piece in tensor.pieces], threads, on_bytes=count)
    except OSError as error:
        raise failure(error, doing=f"reading {directory}") from None
    return manifest


def read_extra(directory: Place, name: str) -> str:
    """The text file that was stored beside the tensors under `name`, verified. Raises CheckpointError if it is absent or damaged."""
    manifest = read_manifest(directory)
    known = [file.path for file in manifest.files if file.blake3 is not None]
    if name not in known:
        raise CheckpointError(f"{directory} holds no {name}{did_you_mean(name, known)}; it holds {', '.join(known)}")
    _verify_file(directory, manifest, name)
    return content(directory / name).decode()


def load(
    state: Mapping[str, Any],
    directory: Place,
    *,
    strict: bool = True,
    elsewhere: Callable[[str], bool] = lambda name: False,
    spent: Spent | None = None,
) -> dict[str, Any]:
    """Fill the tensors of `state` in place from a checkpoint; all ranks of the default process group, where there is one, call it
    together.

    state: tensors by name, of any device, whole or a rank's Pieces; and names of plain values, with anything in their place.
    elsewhere: whether a tensor of the checkpoint that `state` does not name is another rank's to load.
    spent: counts the seconds of this rank's threads: `read`, `verify`, `decode`, `place`.

    Returns all plain values of the checkpoint. Only blocks that hold something of what is wanted are read, each by one of the ranks that
    want it, which sends it to the others; and each rank verifies what it uses before it is used. No tensor is touched before names, shapes
    and dtypes have been compared. Raises, on all ranks, CheckpointError for a checkpoint of another model (a name of `state` that is
    missing, another shape or dtype, and, if `strict`, a tensor of the checkpoint that neither `state` nor `elsewhere` knows); and
    DamagedError for damage: then some tensors hold what is not to be used.
    """
    tensors = tensors_of(state)
    company = Company(doing=f"loading {directory}")
    own: list[Manifest] = []  # rank 0 has read it already

    def look() -> bytes:
        manifest, data = _checked(directory)
        own.append(manifest)
        return data

    data = company.lead(look)
    manifest = own[0] if own else _manifest(directory, data)

    def compare() -> None:
        foreign = {name for name in manifest.tensors.keys() - tensors.keys() if not strict or elsewhere(name)}
        _check_fit(directory, manifest, tensors, values=state.keys() - tensors.keys(), foreign=foreign)

    company.share(compare)
    _fill(tensors, directory, manifest, company, spent)
    return manifest.values


def _fill(
    tensors: Mapping[str, torch.Tensor | Pieces], directory: Place, manifest: Manifest, company: Company, spent: Spent | None = None
) -> None:
    with Threads(num_ranks=company.size, reading=directory) as threads, DataFiles(directory, spent) as files:
        for stage in stages(manifest, tensors):
            read(stage, files, threads, company)


class Stored(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint, each read when it is asked for; only the last one is kept. Raises CheckpointError, as `load` does.

    names: the mapping's own names -> the checkpoint's; by default all under their own.
    """

    def __init__(self, directory: Place, names: Mapping[str, str] | None = None) -> None:
        self.manifest = read_manifest(directory)
        self._directory = directory
        self._names = names if names is not None else {name: name for name in self.manifest.tensors}
        self._last: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._last:
            self._last = {}  # before there are two
            self._last = {name: self.box(name, box_at((), self.shape(name)))}
        return self._last[name]

    def box(self, name: str, box: Box) -> torch.Tensor:
        """A box of a tensor, of which no more is read than that."""
        stored = self._names[name]
        dtype = getattr(torch, self.manifest.tensors[stored].dtype)
        part = torch.empty(box[1], dtype=dtype)
        company = Company(doing=f"loading {self._directory}", alone=True)
        _fill({stored: Pieces(self.shape(name), [(box[0], part)], dtype=dtype)}, self._directory, self.manifest, company)
        return part

    def later(self, name: str) -> Later:
        """A tensor whose boxes are read when they are asked for."""
        dtype = getattr(torch, self.manifest.tensors[self._names[name]].dtype)
        return Later(self.shape(name), dtype=dtype, read=lambda box: self.box(name, box))

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self.manifest.tensors[self._names[name]].shape

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _found(path: Place, step: int) -> Found | None:
    """What is at a checkpoint's name; None for what of a save in a store never became one, for it has no manifest."""
    try:
        there = entries(path) if isinstance(path, Remote) or path.is_dir() else {}
    except OSError as error:
        raise failure(error, doing=f"listing {path}") from None
    if isinstance(path, Remote) and NAME not in there:
        return None
    pinned = PIN in there
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
        num_bytes=sum(file.size for file in manifest.files if file.holder is None),
        digest=manifest.digest,
        refers_to=tuple(sorted({step_of(file.holder) or 0 for file in manifest.files if file.holder is not None})),
    )


def _problem(path: Place, check: Callable[[Place], Manifest]) -> str | None:
    try:
        check(path)
    except CheckpointError as error:
        return str(error)
    return None


def _verify_texts(directory: Place) -> Manifest:
    manifest = read_manifest(directory)
    for file in manifest.files:
        if file.blake3 is not None:
            _verify_file(directory, manifest, file.path)
    return manifest


def _verify_file(directory: Place, manifest: Manifest, name: str) -> None:
    try:
        verify_file(directory, next(file for file in manifest.files if file.path == name))
    except OSError as error:
        raise failure(error, doing=f"reading {directory / name}") from None


def _check_files(there: Mapping[str, int | None], manifest: Manifest) -> None:
    for file in manifest.files:
        if file.holder is not None:
            continue
        if file.path not in there:
            raise CheckpointError(f"{file.path} is missing")
        if there[file.path] is None:
            raise CheckpointError(f"{file.path} is not a plain file")
        if there[file.path] != file.size:
            raise CheckpointError(f"{file.path} has {there[file.path]} bytes instead of {file.size}")
    known = {NAME, *(file.path for file in manifest.files)}
    if extra := sorted(name for name in there if name not in known and not name.startswith(".")):
        raise CheckpointError(f"{_enumerate(extra)} does not belong to it: the manifest does not name it")


def _check_referred(directory: Place, manifest: Manifest) -> None:
    for holder in {file.holder for file in manifest.files if file.holder is not None}:
        beside = directory.parent / holder
        require_folder(beside)
        there = entries(beside)
        for file in manifest.files:
            if file.holder == holder and there.get(file.path.partition("/")[2]) != file.size:
                raise CheckpointError(f"{file.path}, which it refers to, is missing or has another size than {file.size} bytes")


def _check_fit(
    directory: Place, manifest: Manifest, tensors: Mapping[str, torch.Tensor | Pieces], *, values: Iterable[str], foreign: set[str]
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
