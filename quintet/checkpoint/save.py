"""Saving: a checkpoint appears under its name whole and on disk, or not at all.

The protocol (the only one of five that survived every crash state of its model: temporary directory, files synced, manifest last,
directory synced, rename, parent synced, then the caller is told):

1. sweep what dead processes left;
2. write the tensors' files into a new `.tmp-...` directory, each synced;
3. write the extra files and then the manifest;
4. sync the directory, rename it to `step-00000100`, sync the parent.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_saver as dcp

from quintet.checkpoint.durable import TemporaryDirectory, failure, sweep, sync_directory, write_file
from quintet.checkpoint.load import verify
from quintet.checkpoint.manifest import ITEM_SIZE, NAME, Manifest, check_file_name, check_value, directory_name, dumps
from quintet.checkpoint.pieces import Pieces
from quintet.checkpoint.store import SaveValues, Writer, dtype_name, phases
from quintet.errors import CheckpointError


def save(state: Mapping[str, Any], root: Path, *, step: int, extras: Mapping[str, str] | None = None) -> Path:
    """Save `state` as the checkpoint of `step` under `root`; all ranks of a process group call it together.

    state: tensors (DTensors and Pieces are saved by shards, others once) and plain values (None, bool, int, finite float, str, list,
        dict) by name.
    extras: text files that are stored beside the tensors, by file name.

    Returns the checkpoint's directory, `root/step-00000100`. If that step is there already, whole and with the same content, nothing
    changes; if it is there but damaged, it is moved aside to `step-00000100.corrupt-0`. Raises CheckpointError if the state cannot be
    saved, if another content has this step already, or if the file system refuses: then the temporary directory is removed and earlier
    checkpoints are untouched.
    """
    _check(state, step, extras or {})
    attempt = _Attempt(root, step, extras or {})
    try:
        with phases(f"saving {attempt.final}"):
            dcp.save(dict(state), storage_writer=Writer(step=step, begin=attempt.begin, commit=attempt.commit), planner=SaveValues())
    finally:
        attempt.close()
    return attempt.final


def _check(state: Mapping[str, Any], step: int, extras: Mapping[str, str]) -> None:
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

    def __init__(self, root: Path, step: int, extras: Mapping[str, str]) -> None:
        self.root, self.extras = root, extras
        self.final = root / directory_name(step)
        self._temporary: TemporaryDirectory | None = None

    def begin(self) -> Path:
        if self.root.is_dir():
            sweep(self.root)
        self._temporary = TemporaryDirectory(self.root, self.final.name)
        return self._temporary.path

    def commit(self, manifest: Manifest) -> None:
        assert self._temporary is not None
        extras = [write_file(self._temporary.path / name, text.encode()) for name, text in self.extras.items()]
        whole = Manifest(step=manifest.step, files=(*manifest.files, *extras), tensors=manifest.tensors, values=manifest.values)
        write_file(self._temporary.path / NAME, dumps(whole))
        if not os.path.lexists(self.final) or not self._is_saved(whole):
            self._temporary.move_to(self.final)

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
