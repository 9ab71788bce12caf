"""Which checkpoints stay: the newest few, and each one at a round step."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from quintet.checkpoint.durable import TemporaryDirectory, failure, sync_directory
from quintet.checkpoint.load import list_checkpoints
from quintet.checkpoint.manifest import NAME


def keep(steps: Sequence[int], *, last: int, every: int | None) -> set[int]:
    """The steps that stay: the `last` (at least 1) newest, and each multiple of `every`."""
    newest = sorted(set(steps))[-max(last, 1) :]
    return {*newest, *(step for step in steps if every is not None and step % every == 0)}


def prune(root: Path, *, last: int, every: int | None) -> list[Path]:
    """Remove the whole checkpoints under `root` that `keep` does not name, and return them, oldest first.

    The newest whole one always stays, damaged ones and unknown names are not touched. A checkpoint leaves its name at once, before its
    files go, manifest first: no loader ever sees half of one. Raises CheckpointError if the file system refuses.
    """
    whole = [found for found in list_checkpoints(root) if found.problem is None]
    kept = keep([found.step for found in whole], last=last, every=every)
    gone = [found.path for found in whole if found.step not in kept]
    for path in gone:
        try:
            _remove(path)
        except OSError as error:
            raise failure(error, doing=f"removing {path}") from None
    return gone


def _remove(path: Path) -> None:
    grave = TemporaryDirectory(path.parent, f"removed-{path.name}")
    try:
        inside = grave.path / path.name
        path.rename(inside)
        sync_directory(path.parent)
        (inside / NAME).unlink()
        shutil.rmtree(inside)
    finally:
        grave.close()
