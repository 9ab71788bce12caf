"""Which checkpoints stay: the newest few, each one at a round step, the best few, and those that somebody pinned."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from quintet.checkpoint.durable import TemporaryDirectory, failure, sync_directory, write_file
from quintet.checkpoint.load import PIN, Found, list_checkpoints
from quintet.checkpoint.manifest import NAME
from quintet.spec.run import Checkpoint


def keep(checkpoints: Sequence[Found], settings: Checkpoint) -> dict[int, str]:
    """The steps that stay, each with its reasons: pinned, the newest `keep_last`, each multiple of `keep_every`, and the `keep_best` of
    lowest held-out loss (of equal ones the newer)."""
    newest = sorted(checkpoints, key=lambda found: found.step)[-settings.keep_last :]
    judged = sorted((found.loss, -found.step) for found in checkpoints if found.loss is not None)
    rules: list[tuple[str, Callable[[Found], bool]]] = [
        ("pinned", lambda found: found.pinned),
        ("newest", lambda found: found in newest),
        ("round", lambda found: settings.keep_every is not None and found.step % settings.keep_every == 0),
        ("best", lambda found: (found.loss, -found.step) in judged[: settings.keep_best]),
    ]
    reasons = {found.step: ", ".join(name for name, holds in rules if holds(found)) for found in checkpoints}
    return {step: reason for step, reason in reasons.items() if reason}


def prune(root: Path, settings: Checkpoint, *, only_tell: bool = False) -> list[Path]:
    """Remove the whole checkpoints under `root` that `keep` does not name, and return them, oldest first; or only return them.

    The newest whole one always stays, damaged ones and unknown names are not touched. A checkpoint leaves its name at once, before its
    files go, manifest first: no loader ever sees half of one. Raises CheckpointError if the file system refuses.
    """
    whole = [found for found in list_checkpoints(root) if found.problem is None]
    kept = keep(whole, settings)
    gone = [found.path for found in whole if found.step not in kept]
    for path in gone if not only_tell else ():
        try:
            _remove(path)
        except OSError as error:
            raise failure(error, doing=f"removing {path}") from None
    return gone


def pin(directory: Path) -> None:
    """Let a checkpoint stay whatever the rules say. Raises CheckpointError if the file system refuses."""
    _at_pin(directory, lambda path: os.path.lexists(path) or write_file(path, b""))


def unpin(directory: Path) -> None:
    """Take a pin back. Raises CheckpointError if the file system refuses."""
    _at_pin(directory, lambda path: path.unlink(missing_ok=True))


def _at_pin(directory: Path, act: Callable[[Path], object]) -> None:
    try:
        act(directory / PIN)
        sync_directory(directory)
    except OSError as error:
        raise failure(error, doing=f"pinning {directory}") from None


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
