"""`quintet resume`: continue a run from its newest checkpoint, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

from quintet.checkpoint.manifest import step_of
from quintet.cli.options import RunPath, read
from quintet.errors import CheckpointError, UsageError
from quintet.spec import parse


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Continue a run from its newest complete checkpoint, as if it had not stopped."""

    run: RunPath
    """The run's directory."""


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    given = read(Arguments, arguments, command="resume")
    if step_of(given.run.resolve().name) is not None:
        run_directory = given.run.parent.parent
        raise UsageError(f"{given.run} is a checkpoint; name its run, which goes on from its newest one: quintet resume {run_directory}")
    recipe = given.run / "recipe.toml"
    if not recipe.is_file():
        raise CheckpointError(f"{given.run} is not a run: it has no recipe.toml; name a directory that `quintet train` made")
    from quintet.cli.together import together

    run = parse.read(recipe)
    return together(run, given.run, first=lambda: run, resume=True)
