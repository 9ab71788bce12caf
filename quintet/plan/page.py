"""A plan as one HTML page that needs nothing else: memory, timeline, roofline, scaling, trade-offs, terms and assumptions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from html import escape

from quintet.errors import SpecError
from quintet.plan import draw
from quintet.plan.estimate import Estimate, cost, goodput, utilization
from quintet.plan.explain import explain
from quintet.plan.memory import RankMemory
from quintet.plan.rehearse import rehearse
from quintet.plan.setup import SIZE
from quintet.plan.software import Software

GIGA = 1e9
COLOURS = ("#4c78d0", "#8fabe3", "#3f9b5f", "#86c59c", "#59b8b0", "#e08a3c", "#efbd8a", "#b279a2", "#d6a5c9", "#b4b9c0", "#d6d9dd", "#777")
WIDTH, HEIGHT, MARGIN = 860, 300, 56
STYLE = (
    "body{font-family:system-ui,sans-serif;margin:24px auto;max-width:1000px;color:#222;line-height:1.45}table{border-collapse:collapse}"
    "td,th{padding:2px 10px;text-align:right;border-bottom:1px solid #eee}td:first-child,th:first-child{text-align:left}"
    "pre{background:#f6f7f9;padding:10px;overflow-x:auto;font-size:12px}figure{margin:8px 0 24px;overflow-x:auto}"
    "summary{cursor:pointer;font-weight:600}.dim{color:#777}"
)


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """The best setup of each size, for a batch that grows with the devices, and for one that does not."""

    weak: Sequence[Estimate]
    strong: Sequence[Estimate]


def page(chosen: Estimate, others: Sequence[Estimate], *, title: str, scaling: Scaling | None, notes: Sequence[str] = ()) -> str:
    """`chosen` in full, beside the other candidates."""
    parts = [
        f'<!doctype html><html lang="en"><meta '
        f'charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style><h1>{escape(title)}</h1>',
        _summary(chosen),
        *(f"<p>{escape(note)}</p>" for note in notes),
        "<h2>Candidates</h2>",
        _candidates([chosen, *(other for other in others if other.setup != chosen.setup)]),
        _figure("Time and memory of the candidates (lower left is better)", pareto([chosen, *others])),
        "<h2>Memory of each pipeline rank</h2>",
        _figure(f"the line is the device's {chosen.cluster.gpu.memory_bytes / GIGA:.1f} GB", memory_bars(chosen)),
        "<h2>Timeline</h2>",
        _timeline(chosen),
        "<h2>Roofline</h2>",
        _figure("products of a layer, by operations per byte; the lines are reachable peak and memory bandwidth", roofline(chosen)),
    ]
    if scaling:
        parts += ["<h2>Scaling</h2>", _figure("tokens per second of all devices, the best layout of each size", scaling_plot(scaling))]
    parts += ["<h2>Every figure</h2>", _terms(chosen), "<h2>Assumptions</h2>", _assumptions(chosen.setup.software, chosen), "</html>", ""]
    return "\n".join(parts)


def _summary(found: Estimate) -> str:
    used, good, per_trillion = utilization(found), goodput(found), cost(found, tokens=1e12)
    rows = [
        (
            "layout",
            f"{found.setup.layout}, {found.setup.schedule}, micro-batch {found.setup.micro_batch}, recompute {found.setup.recompute}",
        ),
        ("step", f"{found.seconds:.3f} s, {found.tokens_per_second:,.0f} tokens/s per device"),
        ("MFU", f"{used.mfu_causal:.1%} causal, {used.mfu_full:.1%} full attention, against bf16; {used.mfu_own:.1%} against its own peak"),
        (
            "memory",
            f"{found.fullest.total / GIGA:.1f} GB of {found.cluster.gpu.memory_bytes / GIGA:.1f}: "
            f"{'fits' if found.fits else 'does not fit'}",
        ),
        ("bubble", f"{found.bubble:.1%}"),
        ("bound by", found.bound),
        (
            "goodput",
            f"{good.share:.1%}; a failure every {good.seconds_between_failures / 3600:,.1f} h, a checkpoint every "
            f"{good.checkpoint_every:,.0f} s",
        ),
        (
            "per trillion tokens",
            f"{per_trillion.device_hours:,.0f} device-hours, ${per_trillion.dollars:,.0f}, {per_trillion.megawatt_hours:,.0f} MWh",
        ),
    ]
    return (
        "<table>"
        + "".join(f"<tr><td>{escape(name)}</td><td style='text-align:left'>{escape(text)}</td></tr>" for name, text in rows)
        + "</table>"
    )


def _candidates(found: Sequence[Estimate]) -> str:
    names = ("layout", "schedule", "micro-batch", "recompute", "step", "memory", "bubble", "bound by")
    rows = []
    for one in found:
        setup = one.setup
        schedule = setup.schedule + (f" x {setup.chunks}" if setup.schedule.startswith("interleaved") else "")
        cells = (
            str(setup.layout),
            schedule if setup.layout.pp > 1 else "",
            str(setup.micro_batch),
            setup.recompute,
            f"{one.seconds:.3f} s",
            f"{one.fullest.total / GIGA:.1f} GB",
            f"{one.bubble:.1%}",
            one.bound,
        )
        rows.append("".join(f"<td>{escape(cell)}</td>" for cell in cells))
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _timeline(found: Estimate) -> str:
    try:
        few = min(found.setup.num_microbatches, max(2 * found.setup.layout.pp, 8))
        simulation = rehearse(found, num_microbatches=few)
    except SpecError as reason:
        return f"<p class=dim>{escape(str(reason))}</p>"
    return _figure(f"{few} of {found.setup.num_microbatches} micro-batches, simulated", draw.svg(simulation.timeline, width=WIDTH))


def _terms(found: Estimate) -> str:
    blocks = []
    for group in ("time", "block", "memory"):
        blocks.append(f"<details><summary>{group}</summary><pre>{escape(explain(found, group))}</pre></details>")
    return "".join(blocks)


def _assumptions(software: Software, found: Estimate) -> str:
    rows = [
        (f"software {software.name}: {field.name}", str(getattr(software, field.name)))
        for field in fields(software)
        if field.name != "name"
    ]
    gpu = found.cluster.gpu
    rows += [
        (
            f"{gpu.name}: peak in bf16",
            f"{gpu.peak.bf16 / 1e12:,.0f} TFLOP/s, reachable {gpu.reachable.bf16:.1%}, sustained {gpu.sustained:.1%} of that",
        ),
        (
            f"{gpu.name}: link and network",
            f"{found.cluster.link.effective / GIGA:.0f} and {found.cluster.network.effective / GIGA:.0f} GB/s per device",
        ),
        ("domain of fast links", f"{found.cluster.domain} devices"),
        ("failures", f"{found.cluster.failures_per_device_year} per device and year"),
        ("rent", f"${gpu.dollars_per_hour} per device-hour (assumed)"),
    ]
    return "<table>" + "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows) + "</table>"


def _figure(caption: str, svg: str) -> str:
    return f"<figure><figcaption class=dim>{escape(caption)}</figcaption>{svg}</figure>"


def _svg(body: Iterable[str], *, width: int = WIDTH, height: int = HEIGHT) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-size="11" '
        f'font-family="ui-sans-serif, system-ui, sans-serif">{"".join(body)}</svg>'
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", fill: str = "#555") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}">{escape(text)}</text>'


def memory_bars(found: Estimate) -> str:
    """A stacked bar per pipeline rank."""
    names = [field.name for field in fields(RankMemory) if any(getattr(rank, field.name) for rank in found.memory)]
    row, left = 18, 60
    capacity = found.cluster.gpu.memory_bytes
    longest = max(capacity, *(rank.total for rank in found.memory))
    scale = (WIDTH - left - 70) / longest
    body = []
    for index, rank in enumerate(found.memory):
        x, y = float(left), 44 + row * index
        body.append(_text(4, y + 12, f"rank {index}"))
        for name in names:
            width = getattr(rank, name) * scale
            colour = COLOURS[names.index(name) % len(COLOURS)]
            title = f"<title>{name.replace('_', ' ')} {getattr(rank, name) / GIGA:.2f} GB</title>"
            body.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{row - 3}" fill="{colour}">{title}</rect>')
            x += width
        body.append(_text(x + 4, y + 12, f"{rank.total / GIGA:.1f}"))
    bottom = 44 + row * len(found.memory)
    body.append(
        f'<line x1="{left + capacity * scale:.1f}" x2="{left + capacity * scale:.1f}" y1="38" y2="{bottom}" '
        f'stroke="#c33" stroke-dasharray="4 3"/>'
    )
    x = 4.0
    for index, name in enumerate(names):
        at = 4 if x < WIDTH - 120 else 20
        body.append(f'<rect x="{x % (WIDTH - 120):.0f}" y="{at}" width="10" height="10" fill="{COLOURS[index % len(COLOURS)]}"/>')
        body.append(_text(x % (WIDTH - 120) + 14, at + 9, name.replace("_", " ")))
        x += 28 + 6.2 * len(name)
    return _svg(body, height=bottom + 8)


def _axes(x_label: str, y_label: str) -> list[str]:
    bottom = HEIGHT - MARGIN / 2
    return [
        f'<line x1="{MARGIN}" y1="{bottom}" x2="{WIDTH - 10}" y2="{bottom}" stroke="#999"/>',
        f'<line x1="{MARGIN}" y1="10" x2="{MARGIN}" y2="{bottom}" stroke="#999"/>',
        _text(WIDTH - 10, bottom + 20, x_label, anchor="end"),
        _text(MARGIN + 4, 14, y_label),
    ]


def _place(value: float, low: float, high: float, start: float, end: float) -> float:
    return start + (value - low) / (high - low or 1.0) * (end - start)


def pareto(found: Sequence[Estimate]) -> str:
    """Seconds of a step against memory; those that nothing beats in both are filled."""
    times, sizes = [one.seconds for one in found], [one.fullest.total / GIGA for one in found]
    body = _axes("step, s", "memory of the fullest rank, GB")
    low_t, high_t, low_m, high_m = 0.98 * min(times), 1.02 * max(times), 0.95 * min(sizes), 1.05 * max(sizes)
    for one, seconds, size in zip(found, times, sizes, strict=True):
        beaten = any(t <= seconds and s <= size and (t, s) != (seconds, size) for t, s in zip(times, sizes, strict=True))
        x, y = _place(seconds, low_t, high_t, MARGIN, WIDTH - 30), _place(size, low_m, high_m, HEIGHT - MARGIN / 2, 24)
        fill = "#fff" if beaten else "#4c78d0"
        title = f"<title>{escape(str(one.setup.layout))} {one.setup.schedule}: {seconds:.3f} s, {size:.1f} GB</title>"
        body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}" stroke="#4c78d0">{title}</circle>')
        body.append(_text(x + 8, y + 4, f"{seconds:.2f} s, {size:.0f} GB"))
    return _svg(body)


def roofline(found: Estimate) -> str:
    """Each product of a layer by its operations per byte, on logarithmic axes."""
    setup, gpu = found.setup, found.cluster.gpu
    a, tp, tokens = setup.architecture, setup.layout.tp, setup.tokens
    peak = (gpu.peak.of(setup.precision) or gpu.peak.bf16) * (gpu.reachable.of(setup.precision) or gpu.reachable.bf16)
    size = max(1.0, SIZE[setup.precision])
    points = []
    for p in (*a.attention, *a.dense, *a.shared, *a.head):
        rows = tokens / tp if p.split == "tokens" else tokens
        n, k = p.outputs / (tp if p.split == "columns" else 1), p.inputs / (tp if p.split == "rows" else 1)
        points.append((p.name, 2 * rows * n * k / (size * (rows * n + rows * k + n * k))))
    if a.num_experts:
        rows = tokens * setup.layout.expert_tp / tp * a.experts_per_token / max(1, a.num_experts // setup.layout.ep)
        for p in a.expert:
            points.append((p.name, 2 * rows * p.outputs * p.inputs / (size * (rows * p.outputs + rows * p.inputs + p.outputs * p.inputs))))
    ridge = peak / gpu.memory_bandwidth
    low, high = math.log(min(ridge, *(i for _, i in points)) / 4), math.log(max(ridge, *(i for _, i in points)) * 2)
    top = math.log(peak * 1.5)
    bottom = math.log(min(peak, math.exp(low) * gpu.memory_bandwidth) / 1.5)

    def at(intensity: float, rate: float) -> tuple[float, float]:
        return (
            _place(math.log(intensity), low, high, MARGIN, WIDTH - 20),
            _place(math.log(rate), bottom, top, HEIGHT - MARGIN / 2, 20),
        )

    corners = [at(math.exp(low), math.exp(low) * gpu.memory_bandwidth), at(ridge, peak), at(math.exp(high), peak)]
    body = _axes("operations per byte", f"operations per second, {setup.precision}")
    body.append(f'<polyline fill="none" stroke="#3f9b5f" stroke-width="2" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in corners)}"/>')
    for index, (name, intensity) in enumerate(points):
        x, y = at(intensity, min(peak, intensity * gpu.memory_bandwidth))
        body.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#e08a3c"><title>{name}: {intensity:.0f} operations per byte</title></circle>'
        )
        body.append(_text(x - 4, y + 16 + 12 * (index % 4), name))
    return _svg(body)


def scaling_plot(scaling: Scaling) -> str:
    """Tokens per second against devices, both logarithmic."""
    lines = (("weak", scaling.weak, "#4c78d0"), ("strong", scaling.strong, "#e08a3c"))
    points = {name: [(one.cluster.num_gpus, one.tokens_per_second * one.cluster.num_gpus) for one in found] for name, found, _ in lines}
    every = [point for found in points.values() for point in found]
    if not every:
        return "<p>nothing fits at any size</p>"
    xs, ys = [math.log(n) for n, _ in every], [math.log(speed) for _, speed in every]
    body = _axes("devices", "tokens/s")
    for name, _, colour in lines:
        placed = [
            (_place(math.log(n), min(xs), max(xs), MARGIN + 20, WIDTH - 90), _place(math.log(v), min(ys), max(ys), HEIGHT - MARGIN, 30))
            for n, v in points[name]
        ]
        body.append(f'<polyline fill="none" stroke="{colour}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in placed)}"/>')
        for (x, y), (n, speed) in zip(placed, points[name], strict=True):
            body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
            body.append(
                _text(
                    x + 6,
                    y + (12 if name == "strong" else -6),
                    f"{n:,}: {speed / 1e6:.2f}M" + (f" ({name})" if n == points[name][-1][0] else ""),
                )
            )
    return _svg(body)
