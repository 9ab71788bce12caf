"""`quintet train`: a recipe, the options that replace its values, and a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from quintet.cli.describe import foreseen, run_figures, run_tables, warn
from quintet.cli.options import Overrides, Recipe, Switch, read_with_recipe
from quintet.cli.tell import speaks_for_all
from quintet.spec import parse
from quintet.spec.run import Run
from quintet.train.foresee import doubts


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train a model as a recipe says; every value of the recipe is an option."""

    recipe: Recipe
    """A recipe in TOML, the first argument."""
    run: Overrides
    """One training run."""
    dry_run: Switch = False
    """Print the run with its size, cost and schedule, and stop."""


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    given = read_with_recipe(Arguments, arguments, command="train")
    if given.dry_run:
        return show(given.run) if speaks_for_all() else 0
    return train(given.run, recipe=given.recipe)


def show(run: Run) -> int:
    """Print the resolved run, its figures, and what would stop it here; that is no error, for the run may be meant for elsewhere."""
    print(parse.dumps(run))
    Console().print(run_tables(run_figures(run)))
    warn(foreseen(run))
    return 0


def train(run: Run, *, recipe: Path) -> int:
    """Prepare what is not prepared yet, beside what earlier runs may depend on, then train on it."""
    from quintet.cli.prepare import prepare
    from quintet.cli.together import together
    from quintet.train import directory

    def first() -> Run:
        directory.refuse_existing(run)
        warn(doubts(run))
        prepared = prepare(run, Console(stderr=True), recipe=recipe, on_other="beside")
        if prepared.directory == Path(run.data.directory).expanduser():
            return run
        return replace(run, data=replace(run.data, directory=str(prepared.directory)))

    return together(run, directory.of(run), first=first, resume=False)
