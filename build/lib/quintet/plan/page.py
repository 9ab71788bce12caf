"""A plan as one HTML page that needs nothing else: memory, timeline, roofline, scaling, trade-offs, terms and assumptions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from html import escape

from quintet.errors import SpecError
from quintet.plan import draw
from quintet.plan.block_time import rate
from quintet.plan.estimate import Estimate, cost, goodput, utilization
from quintet.plan.explain import explain
from quintet.plan.memory import RankMemory
from quintet.plan.rates import product_seconds
from quintet.plan.rehearse import rehearse
from quintet.plan.setup import SIZE
from quintet.plan.software import Software
from quintet.schedule.clock import Timeline

GIGA = 1e9
COLOURS = ("#4c78d0", "#8fabe3", "#3f9b5f", "#86c59c", "#59b8b0", "#e08a3c", "#efbd8a", "#b279a2", "#d6a5c9", "#b4b9c0", "#d6d9dd", "#777")
WIDTH, HEIGHT, MARGIN = 860, 300, 56
STYLE = (
    "body{font-family:system-ui,sans-serif;margin:24px auto;max-width:1000px;color:#222;line-height:1.45}table{border-collapse:collapse}"
    "td,th{padding:2px 10px;text-align:right;border-bottom:1px solid #eee}td:first-child,th:first-child{text-align:left}"
    "pre{background:#f6f7f9;padding:10px;overflow-x:auto;font-size:12px}figure{margin:8px 0 24px;overflow-x:auto}"
    "summary{cursor:pointer;font-weight:600}.dim{color:#777}"
)
SELECT = (
    "const one=document.getElementById('chosen');const show=()=>document.querySelectorAll('section')"
    ".forEach((part,index)=>{part.hidden=index!==one.selectedIndex});one.onchange=show;show()"
)


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """The best setup of each size, for a batch that grows with the devices, and for one that does not."""

    weak: Sequence[Estimate]
    strong: Sequence[Estimate]


def page(chosen: Estimate, others: Sequence[Estimate], *, title: str, scaling: Scaling | None, notes: Sequence[str] = ()) -> str:
    """`chosen` in full; the other candidates, which were computed beside it, can be selected in its place."""
    found = [chosen, *(other for other in others if other.setup != chosen.setup)]
    names = [f"{number}: {one.setup.layout}, micro-batch {one.setup.micro_batch}" for number, one in enumerate(found, 1)]
    options = "".join(f"<option>{escape(name)}</option>" for name in names)
    parts = [
        f'<!doctype html><html lang="en"><meta '
        f'charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style><h1>{escape(title)}</h1>',
        *(f"<p>{escape(note)}</p>" for note in notes),
        "<h2>Candidates</h2>",
        _candidates(found),
        _figure("time and memory of the candidates, by their number; filled: no other is better in both (lower left)", pareto(found)),
        f"<h2>One of them</h2><p><label>layout <select id=chosen>{options}</select></label></p>",
        *(f"<section{' hidden' * (index > 0)}>{_one(one)}</section>" for index, one in enumerate(found)),
    ]
    if scaling:
        parts += ["<h2>Scaling</h2>", _figure("tokens per second of all devices, the best layout of each size", scaling_plot(scaling))]
    parts += ["<h2>Assumptions</h2>", _assumptions(chosen.setup.software, chosen), f"<script>{SELECT}</script></html>", ""]
    return "\n".join(parts)


def _one(found: Estimate) -> str:
    """All about one candidate."""
    capacity = f"the line is the device's {found.cluster.gpu.memory_bytes / GIGA:.1f} GB"
    parts = [
        _summary(found),
        "<h3>Memory of each pipeline rank</h3>",
        _figure(capacity, memory_bars(found)),
        "<h3>Timeline</h3>",
        _timeline(found, capacity),
        "<h3>Roofline</h3>",
        _figure("products of a layer at the rate that is planned; the lines are reachable peak and memory bandwidth", roofline(found)),
        "<h3>Every figure</h3>",
        _terms(found),
    ]
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
    names = ("", "layout", "schedule", "micro-batch", "recompute", "step", "memory", "bubble", "bound by")
    rows = []
    for number, one in enumerate(found, 1):
        setup = one.setup
        schedule = setup.schedule + (f" x {setup.chunks}" if setup.schedule.startswith("interleaved") else "")
        cells = (
            str(number),
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


def _timeline(found: Estimate, capacity: str) -> str:
    try:
        few = min(found.setup.num_microbatches, max(2 * found.setup.layout.pp, 8))
        simulation = rehearse(found, num_microbatches=few)
    except SpecError as reason:
        return f"<p class=dim>{escape(str(reason))}</p>"
    caption = f"{few} of {found.setup.num_microbatches} micro-batches, simulated"
    over_time = _figure(f"memory meanwhile; {capacity}", memory_over_time(found, simulation.timeline))
    return _figure(caption, draw.svg(simulation.timeline, width=WIDTH)) + over_time


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


def memory_over_time(found: Estimate, timeline: Timeline) -> str:
    """Bytes of the first, the fullest and the last rank: what it always holds, and activations from each forward's begin until its
    backward, or what that put off, ends. What comes and goes within an op is counted as if it were always there."""
    shown = sorted({0, found.memory.index(found.fullest), len(found.memory) - 1})
    capacity = found.cluster.gpu.memory_bytes / GIGA
    top, body = 1.05 * max(capacity, found.fullest.total / GIGA), _axes("seconds", "GB")
    _ticks(body, [(0.25 * part * top, f"{0.25 * part * top:.0f}") for part in range(1, 4)], 0.0, top)
    edge = _place(capacity, 0.0, top, HEIGHT - MARGIN / 2, 20)
    body.append(f'<line x1="{MARGIN}" x2="{WIDTH - 30}" y1="{edge:.1f}" y2="{edge:.1f}" stroke="#c33" stroke-dasharray="4 3"/>')
    for number, rank in enumerate(shown):
        held, points = found.memory[rank], list[str]()
        for seconds, share in _in_flight(timeline, rank):
            x = _place(seconds, 0.0, timeline.makespan, MARGIN, WIDTH - 30)
            gigabytes = (held.total - held.activations * (1 - share)) / GIGA
            points.append(f"{x:.1f},{_place(gigabytes, 0.0, top, HEIGHT - MARGIN / 2, 20):.1f}")
        colour = ("#4c78d0", "#e08a3c", "#3f9b5f")[number]
        body.append(f'<polyline fill="none" stroke="{colour}" points="{" ".join(points)}"/>')
        body.append(_text(WIDTH - 30, HEIGHT - MARGIN / 2 - 8 - 14 * number, f"rank {rank}", anchor="end", fill=colour))
    return _svg(body)


def _in_flight(timeline: Timeline, rank: int) -> list[tuple[float, float]]:
    """Corners of a curve: seconds, and the share of the rank's peak of activations that it then keeps."""
    changes = []
    for work, start, end in zip(timeline.schedule.table[rank], timeline.starts[rank], timeline.ends[rank], strict=True):
        changes += [(start, 1) if kind == "F" else (end, -1) for kind, _, _ in work.ops if kind != "I"]
    corners, kept = [(0.0, 0)], 0
    for seconds, change in sorted(changes, key=lambda one: (one[0], one[1])):
        corners += [(seconds, kept), (seconds, kept + change)]
        kept += change
    peak = max(kept for _, kept in corners) or 1
    return [(seconds, kept / peak) for seconds, kept in corners] + [(timeline.makespan, 0.0)]


def _axes(x_label: str, y_label: str) -> list[str]:
    bottom = HEIGHT - MARGIN / 2
    return [
        f'<line x1="{MARGIN}" y1="{bottom}" x2="{WIDTH - 10}" y2="{bottom}" stroke="#999"/>',
        f'<line x1="{MARGIN}" y1="10" x2="{MARGIN}" y2="{bottom}" stroke="#999"/>',
        _text(WIDTH - 10, bottom + 20, x_label, anchor="end"),
        _text(MARGIN + 4, 14, y_label),
    ]


def _ticks(body: list[str], ticks: Sequence[tuple[float, str]], low: float, high: float, *, along: bool = False) -> None:
    """Numbers at the vertical axis, or `along` the horizontal one."""
    for value, label in ticks:
        if along:
            body.append(_text(_place(value, low, high, MARGIN, WIDTH - 30), HEIGHT - MARGIN / 2 + 14, label, anchor="middle"))
        else:
            body.append(_text(MARGIN - 6, _place(value, low, high, HEIGHT - MARGIN / 2, 20) + 4, label, anchor="end"))


def _place(value: float, low: float, high: float, start: float, end: float) -> float:
    return start + (value - low) / (high - low or 1.0) * (end - start)


def pareto(found: Sequence[Estimate]) -> str:
    """Seconds of a step against memory; those that nothing beats in both are filled."""
    times, sizes = [one.seconds for one in found], [one.fullest.total / GIGA for one in found]
    body = _axes("step, s", "memory of the fullest rank, GB")
    low_t, high_t = _wider(times)
    low_m, high_m = _wider(sizes)
    _ticks(body, [(t, f"{t:.3g}" if high_t - low_t > 0.1 * t else f"{t:.4g}") for t in (min(times), max(times))], low_t, high_t, along=True)
    _ticks(body, [(m, f"{m:.1f}") for m in (min(sizes), max(sizes))], low_m, high_m)
    for number, (one, seconds, size) in enumerate(zip(found, times, sizes, strict=True), 1):
        beaten = any(t <= seconds and s <= size and (t, s) != (seconds, size) for t, s in zip(times, sizes, strict=True))
        x, y = _place(seconds, low_t, high_t, MARGIN, WIDTH - 30), _place(size, low_m, high_m, HEIGHT - MARGIN / 2, 20)
        fill = "#fff" if beaten else "#4c78d0"
        title = f"<title>{escape(str(one.setup.layout))} {one.setup.schedule}: {seconds:.3f} s, {size:.1f} GB</title>"
        body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}" stroke="#4c78d0">{title}</circle>')
        body.append(_text(x + 8, y + 4 + 10 * (number % 2), str(number)))
    return _svg(body)


def _wider(values: Sequence[float]) -> tuple[float, float]:
    """A range with some room around the values."""
    room = 0.15 * (max(values) - min(values)) or 0.05 * max(values)
    return min(values) - room, max(values) + room


def roofline(found: Estimate) -> str:
    """Each product of a layer by its operations per byte and the rate that is planned, on logarithmic axes."""
    setup, gpu = found.setup, found.cluster.gpu
    peak = (gpu.peak.of(setup.precision) or gpu.peak.bf16) * (gpu.reachable.of(setup.precision) or gpu.reachable.bf16)
    points = sorted(_products(found), key=lambda point: point[1])
    ridge = peak / gpu.memory_bandwidth
    low, high = math.log(min(ridge, *(i for _, i, _ in points)) / 4), math.log(max(ridge, *(i for _, i, _ in points)) * 2)
    top = math.log(max(peak, *(r for _, _, r in points)) * 1.5)
    bottom = math.log(min(math.exp(low) * gpu.memory_bandwidth, *(r for _, _, r in points)) / 1.5)

    def at(intensity: float, rate: float) -> tuple[float, float]:
        return (
            _place(math.log(intensity), low, high, MARGIN, WIDTH - 30),
            _place(math.log(rate), bottom, top, HEIGHT - MARGIN / 2, 20),
        )

    corners = [at(math.exp(low), math.exp(low) * gpu.memory_bandwidth), at(ridge, peak), at(math.exp(high), peak)]
    body = _axes("operations per byte", f"Tera-operations per second, {setup.precision}")
    speeds = [(math.log(value), f"{value / 1e12:,.0f}" if value > 1e13 else f"{value / 1e12:.2g}") for value in (peak, peak / 4, peak / 16)]
    _ticks(body, speeds, bottom, top)
    _ticks(body, [(math.log(value), f"{value:,.0f}") for value in (ridge, ridge * 4, ridge / 2)], low, high, along=True)
    body.append(f'<polyline fill="none" stroke="#3f9b5f" stroke-width="2" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in corners)}"/>')
    for index, (name, intensity, speed) in enumerate(points):
        x, y = at(intensity, speed)
        title = f"<title>{name}: {intensity:.0f} operations per byte, {speed / 1e12:.4g} Tera-operations per second</title>"
        body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#e08a3c">{title}</circle>')
        body.append(_text(x - 4, y + 18 + 13 * (index % 6), name))
    return _svg(body)


def _products(found: Estimate) -> list[tuple[str, float, float]]:
    """Of the products of a layer and the head: name, operations per byte, operations per second as planned."""
    setup, cluster = found.setup, found.cluster
    a, layout = setup.architecture, setup.layout
    experts = tuple((p, setup.tokens * layout.expert_tp / layout.tp * a.experts_per_token, layout.expert_tp) for p in a.expert)
    others = (*a.attention, *a.dense, *a.shared, *a.head)
    plain = tuple((p, setup.tokens / (layout.tp if p.split == "tokens" else 1), layout.tp) for p in others)
    points = []
    for p, rows, ways in (*plain, *experts):
        count = max(1, a.num_experts // layout.ep) if p in a.expert else 1
        n, k = p.outputs / (ways if p.split == "columns" else 1), p.inputs / (ways if p.split == "rows" else 1)
        size = max(1.0, SIZE[setup.precision if p.low or setup.precision == "fp32" else "bf16"])
        flops, moved = 2 * rows * n * k, size * (rows * (n + k) + count * n * k)
        if cluster.eager is not None:
            call = cluster.eager.grouped if p in a.expert else cluster.eager.product
            seconds = call.seconds(calls=count, flops=flops, num_bytes=moved)
        else:
            seconds = product_seconds(
                rows / count,
                n,
                k,
                rate=rate(cluster, setup.precision if p.low else "bf16", setup.software),
                bandwidth=cluster.gpu.memory_bandwidth * setup.software.memory,
                cores=cluster.gpu.num_cores,
                size=size,
                ramp=setup.software.ramp,
                count=count,
            )
        points.append((p.name, flops / moved, setup.software.pace * flops / seconds))
    return points


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
