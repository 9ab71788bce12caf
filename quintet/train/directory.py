"""A run's directory: the names in it, making it, and holding it against a second trainer. Imports no torch."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quintet.checkpoint.durable import failure
from quintet.checkpoint.manifest import step_of
from quintet.checkpoint.place import Place, Remote, entries, place
from quintet.data.prepare import Prepared, obstacle_to
from quintet.data.tokenizer import Tokenizer
from quintet.errors import DataError, UsageError
from quintet.spec import parse
from quintet.spec.run import Run

RECIPE, TOKENIZER, CHECKPOINTS, METRICS, LOCK = "recipe.toml", "tokenizer.json", "checkpoints", "metrics.jsonl", ".lock"
"""Names in a run's directory; the first two stand in each checkpoint too."""
SHARED_SECONDS = 10.0
"""How long a network file system may hide a new directory from another node."""


def checkpoints(directory: Path, run: Run) -> Place:
    """Where the checkpoints of the run in `directory` are. Raises UsageError for a URL that this installation cannot reach."""
    if run.checkpoint.directory is None:
        return directory / CHECKPOINTS
    root = place(os.path.expanduser(run.checkpoint.directory)) / run.name
    if isinstance(root, Remote):
        root.system()
    return root


def refuse_existing(run: Run) -> None:
    """Raise UsageError if the run's directory exists, for a run is never overwritten, or if a look tells that it cannot be made."""
    if run.folder.exists():
        raise UsageError(
            f"{run.folder} exists already and is not overwritten; continue it with: quintet resume {run.folder}, or choose another --name"
        )
    if obstacle := obstacle_to(run.folder):
        raise UsageError(
            f"cannot make the run's directory {run.folder}: {obstacle} is no folder that may be written; choose another --directory"
        )
    _refuse_others(checkpoints(run.folder, run))


def _refuse_others(root: Place) -> None:
    """Raise UsageError if another run has left checkpoints there: its would be taken for this one's."""
    try:
        names = entries(root) if isinstance(root, Remote) or root.is_dir() else {}
    except OSError as error:
        raise failure(error, doing=f"listing {root}") from None
    if any(step_of(name) is not None for name in names):
        raise UsageError(f"{root} holds the checkpoints of another run; choose another --name or another --checkpoint.directory")


def create(run: Run, tokenizer: Tokenizer) -> Path:
    """Make the run's directory with its recipe and tokenizer, whole or not at all. Raises UsageError if it exists or cannot be made."""
    refuse_existing(run)
    directory = run.folder
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        (temporary / RECIPE).write_text(parse.dumps(run))
        tokenizer.save(temporary / TOKENIZER)
        temporary.rename(directory)
    except OSError as error:
        raise UsageError(f"cannot make the run's directory {directory}: {error.strerror}; choose another --directory") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def rewrite_recipe(directory: Path, run: Run) -> None:
    """Put the run as it is now in the place of its recipe, whole. Raises UsageError if the file system refuses."""
    new = directory / f".{RECIPE}.{os.getpid()}"
    try:
        new.write_text(parse.dumps(run))
        new.replace(directory / RECIPE)
    except OSError as error:
        raise UsageError(f"cannot write {directory / RECIPE}: {error.strerror}; free some space, or correct its permissions") from None
    finally:
        new.unlink(missing_ok=True)


def shared(run: Run) -> Path:
    """The directory that rank 0 has made, as another rank sees it, network file systems given some seconds. Raises UsageError."""
    deadline = time.monotonic() + SHARED_SECONDS
    while not (run.folder / RECIPE).is_file():
        if time.monotonic() > deadline:
            raise UsageError(
                f"{run.folder.absolute()}, which rank 0 has made, is not there on {socket.gethostname()}; all nodes must see one "
                "--directory, for example on a network file system"
            )
        time.sleep(0.1)
    return run.folder


def refuse_other_tokenizer(own: Tokenizer, prepared: Prepared, *, recipe: Path | None = None) -> None:
    """Raise DataError if the data's tokenizer is not the model's `own`: every id would mean another word.

    The remedy names `recipe`, by default the one beside the model's tokenizer.
    """
    recipe = recipe or Path(own.origin).with_name(RECIPE)
    if own.fingerprint != prepared.tokenizer.fingerprint:
        raise DataError(
            f"{prepared.directory} was prepared with another tokenizer ({prepared.tokenizer.fingerprint[:12]}) than the model's "
            f"({own.fingerprint[:12]}, {own.origin}); set data.tokenizer in {recipe} to {own.origin} and data.directory to "
            f"a folder of its own, then run: quintet prepare {recipe}"
        )


def is_held(directory: Path) -> bool:
    """Whether a process trains in the run's directory, as far as its file system tells this machine."""
    try:
        with (directory / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Hold the run's directory; a second trainer on it gets UsageError. The lock ends with the process, however that ends."""
    if not (directory / RECIPE).is_file():
        raise UsageError(f"{directory} is not a run's directory: it has no {RECIPE}")
    with (directory / LOCK).open("a+") as file:
        for wait in (0.05, 0.0):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if not wait:
                    raise UsageError(f"another process is training in {directory}; wait for it, or stop it first") from None
                time.sleep(wait)  # somebody may just be asking (`is_held`)
        yield
