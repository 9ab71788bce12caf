"""`quintet evaluate`: the loss of a trained model on held-out documents, per source."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from quintet.cli.bar import Bar
from quintet.cli.options import ModelPath, Switch, read
from quintet.monitor.metrics import Evaluated


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure the loss of a trained model on held-out documents, per source and domain."""

    model: ModelPath
    """A run's directory (its newest checkpoint), or a checkpoint's; in a store, the URL of the folder of a run's checkpoints, or of one."""
    json: Switch = False
    """Print JSON."""


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    given = read(Arguments, arguments, command="evaluate")
    from quintet.checkpoint.place import place
    from quintet.evaluate.perplexity import evaluate

    with Bar(f"evaluating {given.model}") as bar:
        evaluated = evaluate(place(given.model), on_progress=bar)
    if given.json:
        print(json.dumps(asdict(evaluated), indent=2))
    else:
        Console().print(table(evaluated))
    return 0


def table(evaluated: Evaluated) -> Table:
    """The losses for a person."""
    rows = Table(box=None, pad_edge=False, padding=(0, 2), header_style="dim")
    for name in ("source", "domain", "nats/token", "perplexity", "bits/byte", "tokens"):
        rows.add_column(name, justify="left" if name in ("source", "domain") else "right")
    for source, loss in evaluated.losses.items():
        rows.add_row(
            source,
            evaluated.domains[source],
            f"{loss:.4f}",
            f"{math.exp(min(loss, 700)):.4g}",
            f"{evaluated.bits_per_byte[source]:.4f}",
            f"{evaluated.tokens[source]:,}",
        )
    return rows
