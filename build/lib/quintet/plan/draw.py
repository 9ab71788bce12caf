"""Timelines as pictures: coloured letters for a terminal, SVG, and an HTML page around it."""

from __future__ import annotations

from html import escape

from rich.text import Text

from quintet.plan.simulate import Simulation
from quintet.schedule.clock import Timeline
from quintet.schedule.op import Op, Work

COLOURS = {"F": "#4c78d0", "B": "#3f9b5f", "I": "#59b8b0", "W": "#b4b9c0", "FB": "#e08a3c"}
"""By kind of work."""
OTHER = {"F": "#8fabe3", "B": "#86c59c", "I": "#a0d9d4", "W": "#d6d9dd", "FB": "#e08a3c"}
"""The same for a rank's other stage: the second half of a V, or DualPipe's second direction."""
NAMES = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient", "FB": "overlapped pair"}
LETTERS = {"F": "F", "B": "B", "I": "I", "W": "W", "FB": "X"}
ROW, BAR, LEFT, TOP = 22, 18, 64, 34
"""Pixels: a rank's row, the bar in it, the margins."""


def kinds(timeline: Timeline) -> list[str]:
    """The kinds of work that occur, in the order of the legend."""
    found = {work.kind for row in timeline.schedule.table for work in row}
    return [kind for kind in COLOURS if kind in found]


def terminal(timeline: Timeline, *, width: int) -> Text:
    """One line per rank, one letter per slice of time: what the rank does in most of the slice, or a dot where it idles. X is a pair."""
    num_ranks, margin = timeline.schedule.num_ranks, len(f"rank {timeline.schedule.num_ranks - 1} ")
    columns = max(10, width - margin)
    step = timeline.makespan / columns or 1.0
    text = Text(no_wrap=True, overflow="crop")
    for rank in range(num_ranks):
        text.append(f"rank {rank}".ljust(margin), style="dim")
        slices = _slices(timeline, rank, columns, step)
        for kind in slices:
            if kind is None:
                text.append("·", style="dim")
            else:
                text.append(LETTERS[kind], style=f"bold #101010 on {COLOURS[kind]}")
        text.append("\n")
    text.append(" " * margin)
    for kind in kinds(timeline):
        text.append(LETTERS[kind], style=f"bold #101010 on {COLOURS[kind]}")
        text.append(f" {NAMES[kind]}  ", style="dim")
    text.append(f"· idle   one letter is {seconds(step)}", style="dim")
    return text


def _slices(timeline: Timeline, rank: int, columns: int, step: float) -> list[str | None]:
    """The kind of work that fills most of each slice, if anything fills half of it."""
    filled: list[dict[str, float]] = [{} for _ in range(columns)]
    row = timeline.schedule.table[rank]
    for work, start, end in zip(row, timeline.starts[rank], timeline.ends[rank], strict=True):
        for column in range(int(start / step), min(columns, int(end / step) + 1)):
            share = min(end, (column + 1) * step) - max(start, column * step)
            filled[column][work.kind] = filled[column].get(work.kind, 0.0) + share
    return [max(one, key=lambda kind: one[kind]) if sum(one.values()) >= step / 2 else None for one in filled]


def svg(timeline: Timeline, *, width: int = 1200) -> str:
    """A picture whose bars name their op, start and length when pointed at; micro-batch numbers stand where they fit."""
    schedule = timeline.schedule
    height = TOP + ROW * schedule.num_ranks + 30
    scale = (width - LEFT - 10) / (timeline.makespan or 1.0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="ui-sans-serif, system-ui, sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _legend(timeline),
    ]
    for rank, row in enumerate(schedule.table):
        y = TOP + ROW * rank
        parts.append(f'<text x="8" y="{y + 13}" fill="#555">rank {rank}</text>')
        parts.append(f'<rect x="{LEFT}" y="{y}" width="{timeline.makespan * scale:.2f}" height="{BAR}" fill="#f3f4f6"/>')
        for work, start, end in zip(row, timeline.starts[rank], timeline.ends[rank], strict=True):
            parts.append(_bar(timeline, rank, work, start, end, scale, y))
    parts.append(_axis(timeline.makespan, scale, TOP + ROW * schedule.num_ranks + 4))
    return "\n".join([*parts, "</svg>", ""])


def _bar(timeline: Timeline, rank: int, work: Work, start: float, end: float, scale: float, y: int) -> str:
    x, length = LEFT + start * scale, (end - start) * scale
    title = f"<title>{escape(str(work))}: {seconds(end - start)} from {seconds(start)}</title>"
    label = str(work.microbatch) if isinstance(work, Op) else f"{work.forward.microbatch}·{work.backward.microbatch}"
    fill = COLOURS[work.kind] if _is_own(timeline, rank, work) else OTHER[work.kind]
    box = f'<rect x="{x:.2f}" y="{y}" width="{length:.2f}" height="{BAR}" fill="{fill}" stroke="#fff" stroke-width="0.5">{title}</rect>'
    if length < 6.2 * len(label) + 2:
        return box
    return f'{box}<text x="{x + length / 2:.2f}" y="{y + 13}" text-anchor="middle" fill="#101010" pointer-events="none">{label}</text>'


def _is_own(timeline: Timeline, rank: int, work: Work) -> bool:
    """Whether the work belongs to the first stage and direction that the rank holds."""
    op = work.ops[0]
    return (timeline.schedule.direction(op.microbatch), op.stage) == timeline.schedule.stages[rank][0]


def _legend(timeline: Timeline) -> str:
    schedule = timeline.schedule
    title = f"{schedule.name}: {schedule.num_ranks} ranks, {schedule.num_microbatches} micro-batches"
    parts = [f'<text x="8" y="16" font-weight="600" fill="#222">{escape(title)}</text>']
    x = 8 + 7 * len(title) + 20
    for kind in kinds(timeline):
        parts.append(f'<rect x="{x}" y="7" width="11" height="11" fill="{COLOURS[kind]}"/>')
        parts.append(f'<text x="{x + 15}" y="16" fill="#555">{NAMES[kind]}</text>')
        x += 34 + 6 * len(NAMES[kind])
    return "".join(parts)


def _axis(makespan: float, scale: float, y: int) -> str:
    parts = []
    for i in range(11):
        tick, anchor = makespan * i / 10, "end" if i == 10 else "middle"
        parts.append(f'<text x="{LEFT + tick * scale:.1f}" y="{y + 14}" text-anchor="{anchor}" fill="#777">{seconds(tick)}</text>')
    return "".join(parts)


def html(simulations: list[Simulation]) -> str:
    """A page that needs nothing else, with one picture per simulation, all on one scale of time."""
    longest = max((simulation.makespan for simulation in simulations), default=1.0) or 1.0
    parts = ['<!doctype html><html lang="en"><meta charset="utf-8"><title>Pipeline schedules</title>']
    parts.append("<style>body{font-family:system-ui,sans-serif;margin:24px;color:#222}figure{margin:0 0 24px}</style>")
    for simulation in simulations:
        width = round(LEFT + 10 + 1200 * simulation.makespan / longest)
        kept = f"{max(simulation.peak_activations):.4g}"
        caption = f"step {seconds(simulation.makespan)}, bubble {simulation.mean_bubble:.1%}, activations {kept}"
        parts.append(f"<figure><figcaption>{escape(caption)}</figcaption>{svg(simulation.timeline, width=width)}</figure>")
    return "\n".join([*parts, "</html>", ""])


def seconds(value: float) -> str:
    """A time with three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return "0 s" if value == 0 else f"{value / 1e-9:.3g} ns"
