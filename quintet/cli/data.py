"""`quintet data explain RECIPE DOC`: which quality rules a document passes, and why."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from quintet.cli.options import Switch, read
from quintet.data.explain import Explanation, Finding, explain
from quintet.data.tokenizer import Tokenizer
from quintet.errors import DataError
from quintet.spec import parse
from quintet.spec.run import Data


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Say which quality rules of a recipe a document passes, and why: every rule's value beside its limits."""

    action: Annotated[tyro.conf.Positional[Literal["explain"]], tyro.conf.arg(metavar="explain")]
    """What to do."""
    recipe: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RECIPE.toml")]
    """Whose rules; without a section data.quality, the published defaults."""
    document: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DOC")]
    """A file, FILE.jsonl:LINE, or 'FILE.parquet:row NUMBER'."""
    source: str | None = None
    """The source whose rules and text_key count (default: the recipe's first)."""
    json: Switch = False
    """Print the findings as JSON."""


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code: 0 whether the document is kept or not."""
    given = read(Arguments, arguments, command="data")
    data = parse.read(given.recipe).data
    found = explain(data, given.document, source=given.source, tokenizer=_tokenizer(data))
    if given.json:
        findings = [asdict(finding) | {"passes": finding.passes} for finding in found.findings]
        print(json.dumps(asdict(found) | {"findings": findings, "reason": found.reason}, indent=2))
    else:
        Console().print(shown(found))
    return 0


def _tokenizer(data: Data) -> Tokenizer | None:
    """The recipe's tokenizer, or the one that was trained for it, if it is there."""
    if data.tokenizer is not None:
        return Tokenizer.from_file(data.tokenizer, remedy="correct data.tokenizer")
    with suppress(DataError):
        return Tokenizer.from_file(data.folder / "tokenizer.json")
    return None


def shown(found: Explanation) -> Group:
    """The findings for a person."""
    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="bold")
    for name in ("", "rule", "value", "limits", "what is measured"):
        table.add_column(name, justify="right" if name == "value" else "left", style="dim" if name.startswith("what") else "")
    for finding in found.findings:
        mark = Text("passes", style="green") if finding.passes else Text("drops", style="bold red")
        table.add_row(mark, finding.rule, f"{finding.value:.4g}", limits(finding), finding.meaning)
    verdict = f"dropped by {found.reason}" if found.reason else "kept"
    lines = [Text(f"{found.origin}: {verdict} by the rules of source {found.source}" if not found.reason else f"{found.origin}: {verdict}")]
    lines += [Text(f"changed before: {edit}") for edit in found.edits]
    lines += [Text(f"not asked: {found.without}")] if found.without else []
    return Group(*lines, table)


def limits(finding: Finding) -> str:
    """`at least 3, at most 10`."""
    pairs = (("at least", finding.low), ("at most", finding.high))
    return ", ".join(f"{word} {limit:g}" for word, limit in pairs if abs(limit) != float("inf"))
