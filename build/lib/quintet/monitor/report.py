"""The report of a run: one self-contained HTML page with its figures, curves, samples and recipe, and no script in it."""

from __future__ import annotations

import html
import io
import itertools
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

from quintet.errors import DataError
from quintet.monitor.meter import smoothed
from quintet.monitor.metrics import Evaluated, Event, Record, Saved, read_events
from quintet.monitor.units import count, duration, num_bytes

# Colours that matplotlib draws with and the page replaces, so that the plots follow the reader's light or dark theme.
_INK, _GRID = "#010203", "#040506"
_SERIES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05", "#0a0b06")
_THEME = {_INK: "var(--ink)", _GRID: "var(--grid)"} | {colour: f"var(--series-{i})" for i, colour in enumerate(_SERIES)}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "quintet",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.prop_cycle": cycler(color=_SERIES),
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}

_POINTS = 800
"""Points that a drawn curve has at most; more are averaged."""


def write_report(run_directory: Path, *, recipe_toml: str, samples: Sequence[tuple[str, str]]) -> Path:
    """Write `run_directory`/report.html from its metrics.jsonl, and return its path.

    `samples` are pairs of a prompt and the text that the model continued it with. Raises DataError where there are no metrics.
    """
    events = read_events(run_directory / "metrics.jsonl")
    records = [event for event in events if isinstance(event, Record)]
    if not records:
        raise DataError(f"{run_directory / 'metrics.jsonl'} holds no record; a report needs at least one step")
    with matplotlib.rc_context(_STYLE):
        sections = [
            ("Figures", _figures(events, records)),
            ("Loss", _loss_plot(records, [event for event in events if isinstance(event, Evaluated)])),
            ("Expert load", _expert_plot(records) if records[-1].expert_load else "<p>This model has no routed experts.</p>"),
            ("Speed", _speed_plot(records)),
            ("Optimizer", _optimizer_plot(records)),
            ("Samples", _samples(samples)),
            ("Recipe", f"<pre>{html.escape(recipe_toml)}</pre>"),
        ]
    path = run_directory / "report.html"
    temporary = path.with_suffix(".html.part")
    temporary.write_text(_page(title=run_directory.resolve().name, sections=sections), encoding="utf-8")
    temporary.replace(path)
    return path


# Tables and text


def _figures(events: list[Event], records: list[Record]) -> str:
    last = records[-1]
    saved = [event for event in events if isinstance(event, Saved)]
    mfu = [record.mfu for record in records if record.mfu is not None]
    rows = [
        ("Steps", f"{last.step:,} of {last.num_steps:,}"),
        ("Tokens", f"{count(last.tokens)} ({last.tokens:,})"),
        ("Training time", duration(sum(record.seconds for record in records))),
        ("Training loss, smoothed", f"{smoothed([record.main_loss for record in records])[-1]:.4f} nats per token"),
        ("Throughput, median", f"{count(statistics.median(record.tokens_per_second for record in records))} tokens/s"),
        ("MFU, median", f"{statistics.median(mfu):.1%}" if mfu else "peak not known"),
        ("Peak memory", num_bytes(max(record.peak_memory_bytes for record in records))),
        ("Expert load, CV at the end", f"{last.expert_load_cv:.3f}" if last.expert_load else "no routed experts"),
        ("Checkpoints", f"{len(saved)}, the last of {num_bytes(saved[-1].num_bytes)} at step {saved[-1].step:,}" if saved else "none"),
    ]
    held_out = [event for event in events if isinstance(event, Evaluated)]
    return _table(("", ""), rows, kind="facts") + (_held_out(held_out[-1]) if held_out else "")


def _held_out(evaluated: Evaluated) -> str:
    rows = [
        (
            source,
            evaluated.domains.get(source, ""),
            f"{loss:.4f}",
            f"{math.exp(min(loss, 700)):.4g}",
            f"{evaluated.bits_per_byte[source]:.4f}" if source in evaluated.bits_per_byte else "",
            f"{evaluated.tokens[source]:,}" if source in evaluated.tokens else "",
        )
        for source, loss in evaluated.losses.items()
    ]
    head = ("Source", "Domain", "Loss (nats/token)", "Perplexity", "Bits per byte", "Tokens")
    return f"<h3>Held out, after step {evaluated.step:,}</h3>" + _table(head, rows, kind="wide")


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, kind: str) -> str:
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    top = "<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>" if any(head) else ""
    return f'<div class="scroll"><table class="{kind}">{top}{cells}</table></div>'


def _samples(samples: Sequence[tuple[str, str]]) -> str:
    if not samples:
        return "<p>No samples were drawn.</p>"
    return "".join(f'<pre><span class="prompt">{html.escape(prompt)}</span>{html.escape(text)}</pre>' for prompt, text in samples)


# Plots


def _loss_plot(records: list[Record], held_out: list[Evaluated]) -> str:
    figure = _figure(height=3.6)
    axes = figure.subplots()
    steps, losses = [r.step for r in records], [r.main_loss for r in records]
    axes.plot(*_thin(steps, losses), alpha=0.3, linewidth=1, label="training")
    axes.plot(*_thin(steps, smoothed(losses)), color=_SERIES[0], label="training, smoothed")
    for i, source in enumerate(dict.fromkeys(source for event in held_out for source in event.losses)):
        points = [(event.step, event.losses[source]) for event in held_out if source in event.losses]
        axes.plot(*zip(*points, strict=True), "o-", color=_SERIES[1 + i % 5], markersize=4, label=f"held out: {source}")
    axes.set(xlabel="step", ylabel="nats per token")
    axes.legend()
    return _svg(figure, "loss", "Cross-entropy of the next token over the steps")


def _expert_plot(records: list[Record]) -> str:
    figure = _figure(height=3.4)
    curve, heat = figure.subplots(1, 2, width_ratios=(3, 4))
    steps = [r.step for r in records]
    curve.plot(*_thin(steps, [r.expert_load_cv for r in records]), label="CV, mean over layers")
    curve.plot(*_thin(steps, [r.max_violation for r in records]), label="worst overload (MaxVio)")
    curve.set(title="Imbalance over the steps (0 is balanced)", xlabel="step")
    curve.set_ylim(bottom=0)
    curve.legend()
    last = records[-max(1, len(records) // 10) :]
    layers = [_relative([r.expert_load[i] for r in last]) for i in range(len(last[-1].expert_load))]
    bound = max(1.0, *(abs(value - 1) for layer in layers for value in layer))
    # The middle of the map is the balanced load.
    image = heat.imshow(layers, cmap="RdBu_r", vmin=1 - bound, vmax=1 + bound, aspect="auto", interpolation="nearest")
    heat.set(title="Load / mean load, last tenth of the run", xlabel="expert", ylabel="MoE layer")
    heat.grid(False)
    heat.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=heat).outline.set_visible(False)  # type: ignore[operator]
    return _svg(figure, "experts", "Balance of the routed experts")


def _relative(loads: list[tuple[float, ...]]) -> list[float]:
    """Each expert's load summed over the records, over the experts' mean."""
    totals = [sum(shares) for shares in zip(*loads, strict=True)]
    mean = sum(totals) / len(totals)
    return [total / mean if mean else 1.0 for total in totals]


def _speed_plot(records: list[Record]) -> str:
    figure = _figure(height=2.8)
    panels = figure.subplots(1, 2)
    steps = [r.step for r in records]
    _curve(panels[0], steps, [r.tokens_per_second for r in records], title="Tokens per second", noisy=True)
    if any(r.mfu is not None for r in records):
        _curve(
            panels[1], steps, [math.nan if r.mfu is None else 100 * r.mfu for r in records], title="MFU, % of the measured peak", noisy=True
        )
    else:
        _curve(panels[1], steps, list(itertools.accumulate(r.seconds for r in records)), title="Training time, seconds")
    for axes in panels:
        axes.set_ylim(bottom=0)
    return _svg(figure, "speed", "Throughput over the steps")


def _optimizer_plot(records: list[Record]) -> str:
    figure = _figure(height=2.8)
    panels = figure.subplots(1, 2)
    steps = [r.step for r in records]
    _curve(panels[0], steps, [r.grad_norm for r in records], title="Gradient norm before clipping", noisy=True)
    _curve(panels[1], steps, [r.learning_rate for r in records], title="Learning rate")
    panels[1].set_ylim(bottom=0)
    return _svg(figure, "optimizer", "Gradient norm and learning rate over the steps")


def _curve(axes: Axes, steps: list[int], values: list[float], *, title: str, noisy: bool = False) -> None:
    axes.plot(*_thin(steps, values), alpha=0.3 if noisy else 1.0, linewidth=1 if noisy else None)
    if noisy:
        axes.plot(*_thin(steps, smoothed(values)), color=_SERIES[0])
    axes.set(title=title, xlabel="step")


def _figure(*, height: float) -> Figure:
    return Figure(figsize=(9.6, height), layout="constrained")


def _thin(x: list[int], y: list[float]) -> tuple[list[float], list[float]]:
    """The curve in at most `_POINTS` points, each the mean of its neighbours; what is not finite leaves a gap."""
    size = math.ceil(len(x) / _POINTS)
    pieces = [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]
    finite = [(sum(xs) / len(xs), [v for v in ys if math.isfinite(v)]) for xs, ys in pieces]
    return [x for x, _ in finite], [sum(ys) / len(ys) if ys else math.nan for _, ys in finite]


def _svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an <svg> element in the page's colours; `name` keeps its ids apart from those of the page's other figures."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r' id="', f' id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    for colour, variable in _THEME.items():
        text = text.replace(colour, variable)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)


# The page


def _page(*, title: str, sections: list[tuple[str, str]]) -> str:
    body = "".join(f"<section><h2>{html.escape(head)}</h2>{content}</section>" for head, content in sections)
    name = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{name} · Quintet</title><style>{_CSS}</style></head>\n<body><main><h1>{name}</h1>{body}</main></body></html>\n"
    )


_CSS = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --ink: #24292f; --soft: #667079; --grid: #dfe3e8;
  --series-0: #2f6fdb; --series-1: #d9480f; --series-2: #2b8a3e; --series-3: #9c36b5; --series-4: #b08900; --series-5: #0b7285; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171a; --card: #1c2024; --ink: #dfe4e9; --soft: #98a2ac; --grid: #363d44;
    --series-0: #6ea8fe; --series-1: #ff8f5a; --series-2: #69c77e; --series-3: #d08ae6; --series-4: #e3bd4a; --series-5: #56c2d6; }
  image { filter: brightness(0.85); }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.9rem; margin: 0 0 1.5rem; }
h2 { font-size: 1.15rem; margin: 0 0 .8rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .5rem; }
section { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; padding: 1.2rem; margin-bottom: 1.2rem; }
svg { width: 100%; height: auto; display: block; }
svg text { font-family: system-ui, sans-serif !important; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .3rem 1.2rem .3rem 0; text-align: left; border-bottom: 1px solid var(--grid); white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
th, .facts td:first-child { color: var(--soft); font-weight: normal; }
pre { background: var(--page); border: 1px solid var(--grid); border-radius: 6px; padding: .8rem; margin: 0 0 .8rem;
  overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, monospace; }
pre:last-child { margin-bottom: 0; }
.prompt { font-weight: bold; color: var(--series-0); }
"""
