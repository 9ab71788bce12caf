"""`quintet info`: what a recipe, a run or a Hugging Face model is, in figures."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.table import Table

from quintet.checkpoint import hub_config, hub_stored
from quintet.checkpoint.manifest import step_of
from quintet.checkpoint.place import Place, Remote, entries, place
from quintet.cli.describe import foreseen, model_figures, model_tables, run_figures, run_tables, warn
from quintet.cli.options import Switch, read
from quintet.errors import UsageError
from quintet.monitor.metrics import Evaluated, Record, read_events
from quintet.monitor.status import read_status
from quintet.spec import parse
from quintet.train.directory import RECIPE, checkpoints, is_held
from quintet.train.foresee import doubts


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Describe a recipe, a run or a Hugging Face model: parameters, operations, memory, schedule, and where a run stands."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")]
    """A recipe (.toml), a run's directory, a directory in Hugging Face's format, or the URL of the folder of a run's checkpoints in a
    store."""
    json: Switch = False
    """Print JSON."""


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    given = read(Arguments, arguments, command="info")
    figures = describe(place(given.path))
    if given.json:
        print(json.dumps(figures, indent=2))
    else:
        Console().print(tables(figures))
        warn(figures["warnings"])
    return 0


def describe(path: Place) -> dict[str, Any]:
    """The figures of whatever lies at `path`, with warnings. Raises UsageError for something else."""
    if isinstance(path, Remote):
        return stored_figures(path)
    if (path / "recipe.toml").is_file():
        run = parse.read(path / "recipe.toml")
        return {"kind": "run", "path": str(path), **run_figures(run), "progress": progress(path), "warnings": doubts(run)}
    if (path / hub_config.NAME).is_file():
        return hub_figures(path)
    if path.is_dir():
        raise UsageError(f"{path} holds neither a recipe.toml (a run) nor a {hub_config.NAME} (a Hugging Face model)")
    run = parse.read(path)
    return {"kind": "recipe", "path": str(path), **run_figures(run), "warnings": foreseen(run)}


def stored_figures(path: Remote) -> dict[str, Any]:
    """The figures of a run by its checkpoints in a store, or by one of them. Raises CheckpointError."""
    from quintet.checkpoint.load import latest, list_checkpoints, read_extra

    newest = path if step_of(path.name) is not None else latest(path)
    run = parse.loads(read_extra(newest, RECIPE), origin=f"{newest}/{RECIPE}")
    found = {"status": None, "last_record": None, "last_evaluation": None}
    steps = [each.step for each in list_checkpoints(newest.parent) if each.problem is None]
    return {"kind": "run", "path": str(path), **run_figures(run), "progress": {**found, "checkpoints": steps}, "warnings": doubts(run)}


def hub_figures(path: Path) -> dict[str, Any]:
    """The figures of a model in Hugging Face's format as its files hold it; without files, as its config.json says."""
    model = said = hub_config.to_model(hub_config.read(path), origin=str(path / hub_config.NAME))
    stored = hub_stored.names(path)
    warnings = [f"no safetensors in {path}: counted from {hub_config.NAME} alone"]
    if stored is not None:
        model = hub_stored.stored_model(said, stored)
        told = hub_stored.missing_modules(said, model)
        warnings = [told] if told else []
    figures = model_figures(model, sequence_length=min(4096, model.max_context))
    return {"kind": "hugging face", "path": str(path), **figures, "warnings": warnings}


def progress(run_directory: Path) -> dict[str, Any]:
    """Where a run stands: its status, last record, last evaluation and checkpoints."""
    status = read_status(run_directory)
    if status and status.verdict == "running" and not is_held(run_directory):
        remedy = f"quintet resume {shlex.quote(str(run_directory))}"
        told = "no process here trains it: it was ended before it could say how, or runs on another machine"
        status = replace(status, message=told, remedy=remedy)
    metrics = run_directory / "metrics.jsonl"
    events = read_events(metrics) if metrics.exists() else []
    record = next((event for event in reversed(events) if isinstance(event, Record)), None)
    evaluated = next((event for event in reversed(events) if isinstance(event, Evaluated)), None)
    recipe = run_directory / "recipe.toml"
    root = checkpoints(run_directory, parse.read(recipe)) if recipe.is_file() else run_directory / "checkpoints"
    names = entries(root) if isinstance(root, Remote) or root.is_dir() else {}
    return {
        "status": asdict(status) if status else None,
        "last_record": asdict(record) if record else None,
        "last_evaluation": asdict(evaluated) if evaluated else None,
        "checkpoints": sorted(step for name in names if (step := step_of(name)) is not None),
    }


def tables(figures: dict[str, Any]) -> RenderableType:
    """The figures for a person."""
    parts: list[RenderableType] = [Rule(f"{figures['kind']} {figures['path']}", align="left")]
    if "progress" in figures:
        parts.append(_progress_table(figures["progress"]))
    parts.append(run_tables(figures) if "phases" in figures else model_tables(figures))
    return Group(*parts)


def _progress_table(progress: dict[str, Any]) -> Table:
    status, record, evaluated = progress["status"], progress["last_record"], progress["last_evaluation"]
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column()
    if status:
        rows.add_row("status", f"{status['verdict']}: {status['message']}" + (f"; {status['remedy']}" if status["remedy"] else ""))
    if record:
        rows.add_row("training", f"step {record['step']:,}/{record['num_steps']:,}, loss {record['main_loss']:.4f}")
    if evaluated:
        losses = ", ".join(f"{source} {loss:.4f}" for source, loss in evaluated["losses"].items())
        rows.add_row("held out", f"{losses}, after step {evaluated['step']:,}")
    rows.add_row("checkpoints", ", ".join(f"step {step:,}" for step in progress["checkpoints"]) or "none")
    return rows
