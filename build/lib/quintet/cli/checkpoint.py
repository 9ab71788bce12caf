"""`quintet checkpoint`: look at checkpoints, prove them whole, compare, keep, remove and rewrite them."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from quintet.checkpoint.manifest import step_of
from quintet.checkpoint.place import Place, Remote, place
from quintet.cli.bar import Bar
from quintet.cli.options import Switch, read
from quintet.errors import CheckpointError, UsageError
from quintet.monitor.units import count, num_bytes
from quintet.spec import parse
from quintet.spec.run import Checkpoint

Action = Literal["list", "inspect", "diff", "verify", "prune", "pin", "unpin", "convert"]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Look at checkpoints and take care of them: list, inspect, verify, prune, pin and unpin take one path, diff and convert two."""

    action: tyro.conf.Positional[Action]
    """list: all of a run, and why each is kept. inspect: what one holds. diff: where two differ. verify: hash every byte of one, or of
    all of a run. prune: remove what the rules do not keep. pin, unpin: keep one whatever the rules say. convert: write one anew under
    the folder OTHER."""
    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")]
    """A run's directory (where one checkpoint is meant: its newest), or a checkpoint's; in a store, the URL of the folder of a run's
    checkpoints, or of one of them."""
    other: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="OTHER")] = None
    """diff: the run or checkpoint to compare with. convert: the folder to write under."""
    codec: Literal["planes", "raw"] = "raw"
    """convert: how floats are stored."""
    keep_last: int | None = None
    """prune: instead of the recipe's checkpoint.keep_last."""
    keep_every: int | None = None
    """prune: instead of the recipe's checkpoint.keep_every."""
    keep_best: int | None = None
    """prune: instead of the recipe's checkpoint.keep_best."""
    dry_run: Switch = False
    """prune: only say what would be removed."""
    json: Switch = False
    """list, inspect: print JSON."""


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    given = read(Arguments, arguments, command="checkpoint")
    if (given.other is None) == (given.action in ("diff", "convert")):
        takes = "needs a second path, OTHER" if given.other is None else f"takes one path, not also {given.other}"
        raise UsageError(f"quintet checkpoint {given.action} {takes}; see: quintet checkpoint --help")
    ACTIONS[given.action](given)
    return 0


def list_(given: Arguments) -> None:
    """Print the checkpoints of a run."""
    from quintet.checkpoint.load import list_checkpoints
    from quintet.checkpoint.retention import keep

    found = list_checkpoints(_folder(given.path))
    reasons = keep([each for each in found if each.problem is None], _rules(given))
    if given.json:
        rows = [asdict(each) | {"path": str(each.path), "kept": reasons.get(each.step)} for each in found]
        print(json.dumps(rows, indent=2))
        return
    table = Table("step", "size", "held-out loss", "manifest", "kept as", box=None, pad_edge=False)
    for each in found:
        loss = "" if each.loss is None else f"{each.loss:.4f}"
        state = reasons.get(each.step, "the next prune removes it") if each.problem is None else f"DAMAGED: {each.problem}"
        table.add_row(f"{each.step:,}", num_bytes(each.num_bytes), loss, each.digest[:12], state)
    Console().print(table)


def inspect(given: Arguments) -> None:
    """Print what a checkpoint holds."""
    from quintet.checkpoint.contents import kinds
    from quintet.checkpoint.load import read_manifest

    path = _one(given.path)
    manifest = read_manifest(path)
    rows = kinds(manifest)
    if given.json:
        facts = {"path": str(path), "step": manifest.step, "digest": manifest.digest, "values": manifest.values}
        print(json.dumps({**facts, "files": [asdict(file) for file in manifest.files], "kinds": list(map(asdict, rows))}, indent=2))
        return
    table = Table("tensors", "dtype", "number", "elements", "stored", "bytes an element", box=None, pad_edge=False)
    for row in rows:
        each = f"{row.stored_bytes / max(row.numel, 1):.2f}"
        table.add_row(row.name, row.dtype, str(row.num_tensors), count(row.numel), num_bytes(row.stored_bytes), each)
    console = Console()
    console.print(f"{path}: step {manifest.step:,}, manifest {manifest.digest}", highlight=False, soft_wrap=True)
    console.print(table)
    for name, value in manifest.values.items():
        console.print(f"{name}: {value}", markup=False, highlight=False, soft_wrap=True)
    plain, stored = sum(row.plain_bytes for row in rows), sum(row.stored_bytes for row in rows)
    console.print(f"{num_bytes(stored)} stored of {num_bytes(plain)} ({stored / max(plain, 1):.1%})", highlight=False)


def diff(given: Arguments) -> None:
    """Print where two checkpoints differ."""
    from quintet.checkpoint.contents import differences

    assert given.other is not None
    one, two = _one(given.path), _one(given.other)
    with Bar(f"comparing {one} with {two}") as bar:
        lines = list(differences(one, two, on_progress=bar))
    print("\n".join(lines) if lines else "no difference")


def verify(given: Arguments) -> None:
    """Hash every byte, and tell of each checkpoint whether it is whole. Raises CheckpointError if one is not."""
    from quintet.checkpoint import load

    paths = [each.path for each in load.list_checkpoints(_folder(given.path))] if _is_run(given.path) else [place(given.path)]
    if not paths:
        raise CheckpointError(f"{given.path} has no checkpoint yet")
    problems: list[str] = []
    for path in paths:
        try:
            with Bar(f"verifying {path}") as bar:
                manifest = load.verify(path, on_progress=bar)
            size = num_bytes(sum(file.size for file in manifest.files))
            print(f"{path}: whole, {len(manifest.tensors)} tensors, {size}, manifest {manifest.digest[:12]}")
        except CheckpointError as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise CheckpointError("\n".join(problems))


def prune(given: Arguments) -> None:
    """Remove what the rules do not keep, and print it."""
    from quintet.checkpoint import retention
    from quintet.train.directory import held

    root = _folder(given.path)
    if given.dry_run:
        gone = retention.prune(root, _rules(given), only_tell=True)
    else:
        with held(where) if isinstance(where := place(given.path), Path) else nullcontext():
            gone = retention.prune(root, _rules(given))
    for path in gone:
        print(f"{'would remove' if given.dry_run else 'removed'} {path}")
    if not gone:
        print("nothing to remove")


def pin(given: Arguments) -> None:
    """Keep a checkpoint whatever the rules say."""
    from quintet.checkpoint import load, retention

    load.read_manifest(_one(given.path))
    retention.pin(_one(given.path))
    print(f"pinned {_one(given.path)}")


def unpin(given: Arguments) -> None:
    """Leave a checkpoint to the rules."""
    from quintet.checkpoint import retention

    retention.unpin(_one(given.path))
    print(f"unpinned {_one(given.path)}")


def convert(given: Arguments) -> None:
    """Write a checkpoint anew."""
    from quintet.checkpoint import contents

    assert given.other is not None
    source = _one(given.path)
    with Bar(f"converting {source}") as bar:
        made = contents.convert(source, place(given.other), codec=given.codec, on_progress=bar)
    print(f"wrote {made}")


ACTIONS: dict[str, Callable[[Arguments], Any]] = {
    "list": list_,
    "inspect": inspect,
    "diff": diff,
    "verify": verify,
    "prune": prune,
    "pin": pin,
    "unpin": unpin,
    "convert": convert,
}


def _is_run(path: str) -> bool:
    where = place(path)
    if isinstance(where, Remote):
        return step_of(where.name) is None
    return (where / "recipe.toml").is_file() and not (where / "manifest.json").exists()


def _folder(path: str) -> Place:
    """Where the checkpoints of a run are."""
    from quintet.train.directory import checkpoints

    if not _is_run(path):
        raise UsageError(f"{path} is not a run's directory; name runs/NAME")
    where = place(path)
    return where if isinstance(where, Remote) else checkpoints(where, parse.read(where / "recipe.toml"))


def _one(path: str) -> Place:
    from quintet.train.trained import find_checkpoint

    return find_checkpoint(place(path))


def _rules(given: Arguments) -> Checkpoint:
    """The run's own rules of retention with those that are given instead."""
    from quintet.checkpoint.load import read_extra
    from quintet.train.trained import find_checkpoint

    instead = {name: getattr(given, name) for name in ("keep_last", "keep_every", "keep_best")}
    where = place(given.path)
    own = read_extra(find_checkpoint(where), "recipe.toml") if isinstance(where, Remote) else (where / "recipe.toml").read_text()
    return replace(parse.loads(own, origin=given.path).checkpoint, **{k: v for k, v in instead.items() if v is not None})
