"""`quintet prepare`: the text of a recipe as token shards, with bars while it works and statistics at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from quintet.cli.options import Overrides, Recipe, Switch, read_with_recipe
from quintet.data import prepare as data
from quintet.data.engine import Engine, EngineName, engine_of
from quintet.data.report import write_report
from quintet.data.sources import REMEDIES
from quintet.data.statistics import Statistics
from quintet.monitor.units import count, num_bytes
from quintet.spec.run import Run


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Turn the text of a recipe into token shards; what is already done is left as it is."""

    recipe: Recipe
    """A recipe in TOML, the first argument."""
    run: Overrides
    """One training run."""
    replace: Switch = False
    """Replace what was prepared in data.directory from other text or settings; runs that depend on it cannot go on then."""
    engine: EngineName = "local"
    """Who makes the parts: this machine's processes; Daft here; or Daft on a Ray cluster."""
    workers: int | None = None
    """Parts that are made at a time (default: the cores, where there is much text)."""
    address: str | None = None
    """Of the Ray cluster, such as ray://head:10001 (default: one started here)."""
    json: Switch = False
    """Print the statistics as JSON."""


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    given = read_with_recipe(Arguments, arguments, command="prepare")
    engine = engine_of(given.engine, workers=given.workers, address=given.address)
    console = Console(stderr=True)
    prepared = prepare(given.run, console, recipe=given.recipe, on_other="replace" if given.replace else "refuse", engine=engine)
    report = write_report(prepared)
    if given.json:
        print(json.dumps({name: asdict(part.statistics) for name, part in prepared.sources.items()}, indent=2))
    else:
        Console().print(statistics(prepared))
        console.print(f"report: {report}", markup=False, highlight=False, soft_wrap=True)
    return 0


def prepare(run: Run, console: Console, *, recipe: Path, on_other: data.OnOther = "refuse", engine: Engine | None = None) -> data.Prepared:
    """Prepare the run's data, with bars on `console` while there is work, and return it opened; see `data.prepare` for `on_other`."""
    with Bars(console) as bars:
        return data.prepare(
            run.data,
            vocab_size=run.model.vocab_size,
            seed=run.seed,
            on_other=on_other,
            recipe=recipe,
            engine=engine,
            progress=bars,
            on_message=bars.tell,
        )


class Bars:
    """One bar per source, drawn where the console is a terminal, and gone when all is done; elsewhere one line per source."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
        documents = TextColumn("{task.fields[documents]:,} documents")
        self._progress = Progress(*columns, documents, console=console, transient=True, disable=not console.is_terminal)
        self._tasks: dict[str, TaskID] = {}

    def start(self, name: str, num_bytes: int) -> None:
        self._tasks[name] = self._progress.add_task(name, total=num_bytes, documents=0)
        if not self._console.is_terminal:
            self.tell(f"preparing {name}")

    def advance(self, name: str, num_documents: int, num_bytes: int) -> None:
        task = self._tasks[name]
        documents = self._progress.tasks[self._progress.task_ids.index(task)].fields["documents"] + num_documents
        self._progress.update(task, advance=num_bytes, documents=documents)

    def tell(self, message: str) -> None:
        """Print a line, above the bars."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()


def statistics(prepared: data.Prepared) -> Group:
    """What became of every source, for a person: a column per source, and a line for each reason to skip documents."""
    columns = [_column(part.statistics) for part in prepared.sources.values()]
    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="bold")
    table.add_column("", style="dim", no_wrap=True)
    for name in prepared.sources:
        table.add_column(name, justify="right")
    for row in columns[0]:
        if row in _IF_ANY and all(column[row] == _IF_ANY[row] for column in columns):
            continue
        table.add_row(row, *(column[row] for column in columns))
    told = (line for name, part in prepared.sources.items() for line in (*_skipped(name, part.statistics), *_warned(name, part.statistics)))
    return Group(table, *map(Text, told))


def _warned(name: str, s: Statistics) -> Iterator[str]:
    for rule, share in s.warnings.items():
        yield f"warning: {rule} dropped {share:.1%} of the documents of {name}; look at the report's samples and at its limits"


_IF_ANY = {"dropped by rules": "0", "duplicates": "0 exact, 0 near"}
"""Rows that are left out where they say only this."""


def _skipped(name: str, s: Statistics) -> Iterator[str]:
    for reason, number in s.skipped.items():
        example = "".join(f", such as {place}" for place in s.skipped_examples.get(reason, ())[:1] if place != name)
        yield f"skipped in {name}: {number:,} {reason}{example}: {REMEDIES.get(reason, '')}"


def _column(s: Statistics) -> dict[str, str]:
    tokens = s.tokens + s.held_out_tokens
    return {
        "documents to train on": f"{s.documents:,}",
        "documents held out": f"{s.held_out_documents:,}",
        "tokens to train on": f"{s.tokens:,}",
        "tokens held out": f"{s.held_out_tokens:,}",
        "text": num_bytes(s.num_bytes),
        "bytes per token": f"{s.num_bytes / max(tokens, 1):.2f}",
        "unique tokens": f"{s.unique_tokens:,}",
        "median document": f"{s.length_percentiles[50]:,} tokens",
        "longest document": f"{s.length_percentiles[100]:,} tokens",
        "skipped": f"{sum(s.skipped.values()):,}",
        "dropped by rules": f"{s.emptied + sum(s.dropped.values()):,}",
        "duplicates": f"{s.exact_duplicates:,} exact, {s.near_duplicates:,} near",
        "work": "done before" if s.reused else f"{count(s.tokens_per_second)} tokens/s",
    }
