"""The report of prepared data: one self-contained HTML page to read and argue with, without scripts.

Per source: what was read, kept and dropped; a bar per rule with its share, warned of above a tenth; examples of what each rule dropped,
with the value that it measured and its limits, and of what was kept; duplicates beside what was kept of them; what could not be read.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from pathlib import Path

from quintet.data.prepare import Prepared
from quintet.data.shards import write_file
from quintet.data.sources import REMEDIES
from quintet.data.statistics import WARNED_SHARE, Statistics

_EXPECTED_DUPLICATES = 0.05
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --dim: #6b6b6b; --grid: #dcdcdc; --paper: #fff; --bar: #4c78a8; --warn: #c44e52; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --dim: #a0a0a0; --grid: #3a3a3a; --paper: #161616; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { font-weight: 600; } h2 { border-top: 1px solid var(--grid); padding-top: 1.5rem; margin-top: 2.5rem; }
table { border-collapse: collapse; margin: 1rem 0; width: 100%; }
td, th { text-align: left; padding: .15rem .8rem .15rem 0; vertical-align: top; }
th { font-weight: 500; color: var(--dim); border-bottom: 1px solid var(--grid); } td.n, th.n { text-align: right; white-space: nowrap; }
.track { background: var(--grid); height: .7rem; min-width: 12rem; margin-top: .4rem; } .bar { background: var(--bar); height: 100%; }
.warn { color: var(--warn); } .warn .bar { background: var(--warn); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .6rem; font-size: 12px; }
pre { background: color-mix(in srgb, var(--ink) 6%, var(--paper)); }
.where { color: var(--dim); font-size: 13px; overflow-wrap: anywhere; }
"""


def write_report(prepared: Prepared) -> Path:
    """Write `report.html` into the prepared directory and return its path. Raises DataError if the disk refuses."""
    path = prepared.directory / "report.html"
    write_file(path, page({name: part.statistics for name, part in prepared.sources.items()}).encode())
    return path


def page(sources: Mapping[str, Statistics]) -> str:
    """The report as HTML."""
    body = "".join([_summary(sources), *(_source(name, statistics) for name, statistics in sources.items())])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Prepared data</title><style>{_STYLE}</style>'
        f"<body><h1>Prepared data</h1>{body}</body></html>\n"
    )


def _summary(sources: Mapping[str, Statistics]) -> str:
    rows = [
        [name, f"{s.read:,}", f"{_kept(s):,}", _percent(_kept(s), s.read), f"{s.tokens + s.held_out_tokens:,}", f"{s.num_bytes:,}"]
        for name, s in sources.items()
    ]
    table = _table(["source", "documents read", "kept", "share", "tokens", "bytes kept"], rows)
    warned = [
        f'<li class="warn">{html.escape(name)}: {html.escape(rule)} dropped {share:.1%} of the documents</li>'
        for name, s in sources.items()
        for rule, share in s.warnings.items()
    ]
    duplicates = [
        f'<li class="warn">{html.escape(name)}: {(s.exact_duplicates + s.near_duplicates) / max(s.read, 1):.1%} duplicates; diverse data '
        f"is expected to have less than {_EXPECTED_DUPLICATES:.0%}</li>"
        for name, s in sources.items()
        if s.exact_duplicates + s.near_duplicates > _EXPECTED_DUPLICATES * s.read
    ]
    notes = "".join(warned + duplicates)
    return table + (f"<ul>{notes}</ul>" if notes else "")


def _source(name: str, s: Statistics) -> str:
    parts = [f"<h2>{html.escape(name)}</h2>", _funnel(s)]
    if s.dropped:
        parts.append("<h3>Rules</h3><p>A document counts for the first rule that drops it; <em>alone</em> is what the rule would drop "
                     "without those before it.</p>")  # fmt: skip
        parts.append(_rules(s))
    if s.duplicate_pairs:
        rows = [[html.escape(pair.dropped), html.escape(pair.kept)] for pair in s.duplicate_pairs]
        parts.append("<h3>Some duplicates</h3>" + _table(["dropped", "kept instead"], rows, escaped=True))
    if s.skipped:
        rows = [
            [reason, f"{count:,}", "; ".join(s.skipped_examples.get(reason, ())), REMEDIES.get(reason, "")]
            for reason, count in s.skipped.items()
        ]
        parts.append("<h3>Not read</h3>" + _table(["reason", "documents", "such as", "remedy"], rows))
    parts += _samples(s)
    return "".join(parts)


def _funnel(s: Statistics) -> str:
    """What is left after each stage, as bars."""
    by_rules = s.emptied + sum(s.dropped.values())
    stages = [
        ("read", s.read),
        ("pass the rules", s.read - by_rules),
        ("after exact duplicates", s.read - by_rules - s.exact_duplicates),
        ("after near duplicates", _kept(s)),
        ("held out of them", s.held_out_documents),
    ]
    rows = [[name, f"{count:,}", _percent(count, s.read), _bar(count / max(s.read, 1))] for name, count in stages]
    return _table(["", "documents", "share", ""], rows, escaped=True)


def _rules(s: Statistics) -> str:
    rows = []
    for rule, count in s.dropped.items():
        share = count / max(s.read, 1)
        warn = share > WARNED_SHARE
        label = f'<span class="warn">{html.escape(rule)}</span>' if warn else html.escape(rule)
        rows.append([label, f"{count:,}", _percent(count, s.read), _percent(s.failed.get(rule, 0), s.read), _bar(share, warn=warn)])
    return _table(["rule", "dropped", "share", "alone", ""], rows, escaped=True)


def _samples(s: Statistics) -> Iterator[str]:
    for rule in sorted(s.samples, key=lambda rule: (rule != "", rule)):
        yield f"<h3>{html.escape(f'Dropped by {rule}' if rule else 'Some that were kept')}</h3>"
        for sample in s.samples[rule]:
            low, high = sample.limits
            limits = " ".join(f"{word} {limit:g}" for word, limit in (("at least", low), ("at most", high)) if limit is not None)
            measured = f" · {sample.value:.4g}, wanted {limits}" if sample.value is not None else ""
            yield f'<div class="where">{html.escape(sample.origin)}{measured}</div><pre>{html.escape(sample.excerpt)}</pre>'


def _kept(s: Statistics) -> int:
    return s.documents + s.held_out_documents


def _percent(part: int, whole: int) -> str:
    return f"{part / max(whole, 1):.1%}"


def _bar(share: float, *, warn: bool = False) -> str:
    return f'<div class="track{" warn" if warn else ""}"><div class="bar" style="width:{100 * min(max(share, 0), 1):.2f}%"></div></div>'


def _table(head: list[str], rows: list[list[str]], *, escaped: bool = False) -> str:
    """Rows of text, or of HTML if `escaped`; columns of numbers are set to the right."""

    def cell(text: str) -> str:
        number = text[:1].isdigit() and text.replace(",", "").replace(".", "").rstrip("%").isdigit()
        return f"<td{' class=n' if number else ''}>{text if escaped else html.escape(text)}</td>"

    header = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table><tr>{header}</tr>{body}</table>"
