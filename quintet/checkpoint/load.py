"""Loading: the newest whole checkpoint is found, its bytes are verified, and it fills just the model that it belongs to."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_loader as dcp

from quintet.checkpoint.durable import failure, open_regular
from quintet.checkpoint.manifest import NAME, Manifest, Tensor, loads, step_of
from quintet.checkpoint.pieces import Pieces
from quintet.checkpoint.store import LoadTensors, Reader, dtype_name, phases, verify_file
from quintet.errors import CheckpointError, did_you_mean

_LOG = logging.getLogger(__name__)
_LISTED = 8


@dataclass(frozen=True, kw_only=True)
class Found:
    """A directory that has a checkpoint's name."""

    path: Path
    """The directory."""
    step: int
    """The step that its name says."""
    problem: str | None
    """Why it cannot be loaded, or None."""


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
        listing = "\n  ".join(problems)
        raise CheckpointError(f"no checkpoint under {root} is whole; restore one from a copy, or start a new run:\n  {listing}")
    raise CheckpointError(f"no checkpoint under {root}; a run writes one every checkpoint.every steps, at its end and on a signal")


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a complete checkpoint: it is read, and every file is there with its size, and none besides.

    Raises CheckpointError. The content of the files is not read: see `verify`. Hidden files are ignored.
    """
    try:
        if directory.is_symlink():
            raise CheckpointError(f"{directory} is a symbolic link; name the checkpoint itself")
        if not directory.is_dir():
            raise CheckpointError(f"no checkpoint at {directory}")
        manifest = loads(_read(directory / NAME))
        step = step_of(directory.name)
        if step is not None and step != manifest.step:
            raise CheckpointError(f"{NAME} is of step {manifest.step}, but the directory's name is {directory.name}")
        _check_files(directory, manifest)
    except FileNotFoundError as error:
        raise CheckpointError(f"{Path(error.filename).name} is missing") from None
    except OSError as error:
        raise failure(error, doing=f"reading {directory}") from None
    return manifest


def verify(directory: Path) -> Manifest:
    """`read_manifest`, and every byte of every file has been hashed. Raises CheckpointError."""
    manifest = read_manifest(directory)
    for file in manifest.files:
        _verify_file(directory, manifest, file.path)
    return manifest


def read_extra(directory: Path, name: str) -> str:
    """The text file that was stored beside the tensors under `name`, verified. Raises CheckpointError if it is absent or damaged."""
    manifest = read_manifest(directory)
    known = [file.path for file in manifest.files]
    if name not in known:
        raise CheckpointError(f"{directory} holds no {name}{did_you_mean(name, known)}; it holds {', '.join(known)}")
    _verify_file(directory, manifest, name)
    return _read(directory / name).decode()


def load(
    state: Mapping[str, Any], directory: Path, *, strict: bool = True, elsewhere: Callable[[str], bool] = lambda name: False
) -> dict[str, Any]:
    """Fill the tensors of `state` in place from a checkpoint; all ranks of a process group call it together.

    state: tensors by name, of any device and sharding (DTensor, or Pieces); and names of plain values, with anything in their place.
    elsewhere: whether a tensor of the checkpoint that `state` does not name is another rank's to load.

    Returns all plain values of the checkpoint. No tensor is touched before names, shapes, dtypes and the hash of every needed file have
    been verified. Raises CheckpointError for damage, and for a checkpoint of another model: a name of `state` that is missing, another
    shape or dtype, and, if `strict`, a tensor of the checkpoint that `state` does not name.
    """
    manifest = read_manifest(directory)
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor | Pieces)}
    foreign = {name for name in manifest.tensors.keys() - tensors.keys() if not strict or elsewhere(name)}
    _check_fit(directory, manifest, tensors, values=state.keys() - tensors.keys(), foreign=foreign)
    with phases(f"loading {directory}"):
        dcp.load(tensors, storage_reader=Reader(directory, manifest), planner=LoadTensors())
    return manifest.values


def _found(path: Path, step: int) -> Found:
    return Found(path=path, step=step, problem=_problem(path, read_manifest))


def _problem(path: Path, check: Callable[[Path], Manifest]) -> str | None:
    try:
        check(path)
    except CheckpointError as error:
        return str(error)
    return None


def _read(path: Path) -> bytes:
    fd = open_regular(path)
    with os.fdopen(fd, "rb") as file:
        return file.read()


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
