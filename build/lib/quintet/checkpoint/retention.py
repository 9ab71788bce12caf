"""Which checkpoints stay: the newest few, each one at a round step, the best few, and those that somebody pinned."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from quintet.checkpoint.durable import TemporaryDirectory, failure, sync_directory, write_file
from quintet.checkpoint.load import PIN, Found, list_checkpoints
from quintet.checkpoint.manifest import NAME, step_of
from quintet.checkpoint.place import Place, Remote
from quintet.spec.run import Checkpoint


def keep(checkpoints: Sequence[Found], settings: Checkpoint) -> dict[int, str]:
    """The steps that stay, each with its reasons: pinned, the newest `keep_last`, each multiple of `keep_every`, and the `keep_best` of
    lowest held-out loss (of equal ones the newer); and those that any of these refers to."""
    newest = sorted(checkpoints, key=lambda found: found.step)[-settings.keep_last :]
    judged = sorted((found.loss, -found.step) for found in checkpoints if found.loss is not None)
    rules: list[tuple[str, Callable[[Found], bool]]] = [
        ("pinned", lambda found: found.pinned),
        ("newest", lambda found: found in newest),
        ("round", lambda found: settings.keep_every is not None and found.step % settings.keep_every == 0),
        ("best", lambda found: (found.loss, -found.step) in judged[: settings.keep_best]),
    ]
    reasons = {found.step: ", ".join(name for name, holds in rules if holds(found)) for found in checkpoints}
    kept = {step: reason for step, reason in reasons.items() if reason}
    for found in checkpoints:
        for step in found.refers_to if found.step in kept else ():
            kept.setdefault(step, f"step {found.step} refers to it")
    return kept


def prune(root: Place, settings: Checkpoint, *, only_tell: bool = False) -> list[Place]:
    """Remove the whole checkpoints under `root` that `keep` does not name, and return them, oldest first; or only return them.

    The newest whole one always stays, damaged ones and unknown names are not touched. A checkpoint leaves its name at once, before its
    files go, manifest first: no loader ever sees half of one. In a store also goes what is left of earlier saves that came to nothing.
    Raises CheckpointError if the file system refuses.
    """
    whole = [found for found in list_checkpoints(root) if found.problem is None]
    kept = keep(whole, settings)
    gone = [found.path for found in whole if found.step not in kept]
    for path in gone if not only_tell else ():
        try:
            _remove(path)
        except OSError as error:
            raise failure(error, doing=f"removing {path}") from None
    if isinstance(root, Remote) and whole and not only_tell:
        _sweep(root, before=whole[-1].step)
    return gone


def pin(directory: Place) -> None:
    """Let a checkpoint stay whatever the rules say. Raises CheckpointError if the file system refuses."""
    if isinstance(directory, Remote):
        _refusable(directory, lambda: (directory / PIN).write(b"pinned\n"))
    else:
        _refusable(directory, lambda: os.path.lexists(directory / PIN) or write_file(directory / PIN, b""))


def unpin(directory: Place) -> None:
    """Take a pin back. Raises CheckpointError if the file system refuses."""
    if isinstance(directory, Remote):
        _refusable(directory, lambda: (directory / PIN).remove())
    else:
        _refusable(directory, lambda: (directory / PIN).unlink(missing_ok=True))


def _refusable(directory: Place, act: Callable[[], object]) -> None:
    try:
        act()
        if isinstance(directory, Path):
            sync_directory(directory)
    except OSError as error:
        raise failure(error, doing=f"pinning {directory}") from None


def _remove(path: Place) -> None:
    if isinstance(path, Remote):
        for name in sorted(path.entries(), key=lambda name: name != NAME):
            (path / name).remove()
        return
    grave = TemporaryDirectory(path.parent, f"removed-{path.name}")
    try:
        inside = grave.path / path.name
        path.rename(inside)
        sync_directory(path.parent)
        (inside / NAME).unlink()
        shutil.rmtree(inside)
    finally:
        grave.close()


def _sweep(root: Remote, *, before: int) -> None:
    """Remove what is left of saves of earlier steps that have no manifest, and of removals that were cut off."""
    try:
        for name in root.entries():
            step = step_of(name)
            if step is not None and step < before and NAME not in (root / name).entries():
                _remove(root / name)
    except OSError as error:
        raise failure(error, doing=f"sweeping {root}") from None
