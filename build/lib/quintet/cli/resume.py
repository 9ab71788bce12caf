"""`quintet resume`: continue a run from its newest checkpoint, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from quintet.checkpoint.manifest import step_of
from quintet.cli.options import RunPath, read, unset
from quintet.errors import CheckpointError, UsageError
from quintet.spec import parse
from quintet.spec.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Continue a run from its newest complete checkpoint, as if it had not stopped."""

    run: RunPath
    """The run's directory."""
    layout: Layout = field(default_factory=Layout)
    """Degrees of parallelism from now on; what is not given stays as it was."""


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    known = _recipe(arguments)
    default = None if known is None else replace(unset(Arguments), layout=parse.read(known).layout)
    given = read(Arguments, arguments, command="resume", default=default)
    if step_of(given.run.resolve().name) is not None:
        run_directory = given.run.parent.parent
        raise UsageError(f"{given.run} is a checkpoint; name its run, which goes on from its newest one: quintet resume {run_directory}")
    recipe = given.run / "recipe.toml"
    if not recipe.is_file():
        raise CheckpointError(f"{given.run} is not a run: it has no recipe.toml; name a directory that `quintet train` made")
    from quintet.cli.together import together

    saved, layout = parse.read(recipe), given.layout
    if layout.cut == saved.layout.cut and layout.num_stages != saved.layout.num_stages:
        layout = replace(layout, cut=None)  # of other stages
    if layout.schedule_file == saved.layout.schedule_file and layout.pp != saved.layout.pp:
        layout = replace(layout, schedule_file=None)  # of other ranks
    run = replace(saved, layout=layout)
    return together(run, given.run, first=lambda: run, resume=True)


def _recipe(arguments: Sequence[str]) -> Path | None:
    """The recipe of the first run among the words."""
    found = (Path(word) / "recipe.toml" for word in arguments if not word.startswith("-"))
    return next((path for path in found if path.is_file()), None)
