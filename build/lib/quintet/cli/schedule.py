"""`quintet schedule`: what a pipeline schedule would do, simulated, beside its formula and the other schedules; drawn and traced."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from quintet.cli.options import Switch, read
from quintet.errors import SpecError, UsageError
from quintet.plan import costs as plan_costs
from quintet.plan import draw
from quintet.plan.break_even import break_even
from quintet.plan.construct import Found, search
from quintet.plan.costs import Costs
from quintet.plan.formulas import Formula, formula
from quintet.plan.simulate import Simulation, simulate
from quintet.plan.trace import chrome
from quintet.schedule import NAMES, Schedule, build, check
from quintet.schedule.text import dumps
from quintet.schedule.text import read as read_schedule


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Simulate a pipeline schedule: step time, bubble, exposed communication and activations, beside formulas and other schedules."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="|".join((*NAMES, "search", "FILE.json")))] = "dualpipev"
    """The schedule; `search` constructs one for the costs; a file holds one that --save has written."""
    ranks: int = 8
    """Pipeline ranks, P."""
    microbatches: int = 16
    """Micro-batches of a step, M, over both directions."""
    chunks: int = 2
    """Stages per rank of the interleaved schedules."""
    costs: str = "equal"
    """equal, deepseek-v3, deepseek-v3-trace, a .toml file, or words such as forward=0.05,backward_input=0.06,weight=0.04,pair=0.8."""
    memory: float | None = None
    """For search: the most activations that a rank keeps, in micro-batches of its share (default: P + 1, as DualPipe)."""
    seconds: float = 20.0
    """For search: how long."""
    seed: int = 0
    """For search: where its random choices begin."""
    once: Switch = False
    """For search: hold every parameter once."""
    alone: Switch = False
    """Leave out the other schedules."""
    order: Switch = False
    """Print every rank's ops in order, and nothing else."""
    program: Switch = False
    """The same with the messages between ranks."""
    svg: Path | None = None
    """Write the timeline as a picture."""
    html: Path | None = None
    """Write a page with the timelines of all schedules in the table."""
    trace: Path | None = None
    """Write a trace for ui.perfetto.dev or chrome://tracing."""
    save: Path | None = None
    """Write the schedule itself, to be given as FILE.json later."""
    json: Switch = False
    """Print the figures as JSON."""


_MOST_OPS = 2_000_000
"""Ranks times micro-batches of a named schedule: minutes of work."""


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    given = read(Arguments, arguments, command="schedule")
    console = Console()
    costs = plan_costs.read(given.costs)
    schedule, notes = schedule_of(given, costs)
    if given.name not in NAMES or given.program:  # named ones are proven by tests; simulating finds what cannot finish
        checked = check(schedule)
    if given.order or given.program:
        if given.svg or given.html or given.trace or given.save:
            write(given, [simulate(schedule, costs)])
        print(checked.program if given.program else schedule)
        return 0
    first = simulate(schedule, costs)
    others, refused = ([], []) if given.alone else compare(schedule, costs, chunks=given.chunks)
    simulations = [first, *others]
    write(given, simulations)
    if given.json:
        print(json.dumps([figures(simulation) for simulation in simulations], indent=2))
        return 0
    console.print(table(simulations, width=console.width))
    for reason in refused:
        console.print(f"left out: {reason}", style="dim", highlight=False)
    console.print(anatomy(first), highlight=False)
    for line in [*notes, *gains(simulations)]:
        console.print(line, highlight=False)
    console.print(draw.terminal(first.timeline, width=console.width), soft_wrap=True)
    return 0


def schedule_of(given: Arguments, costs: Costs) -> tuple[Schedule, list[str]]:
    """The schedule that was asked for by name, from a file or by search, and what is to be said about it."""
    if given.name == "search":
        if not 0 < given.seconds < math.inf:
            raise UsageError(f"--seconds ({given.seconds}) must be above 0 and finite")
        memory = given.ranks + 1.0 if given.memory is None else given.memory
        found = search(given.ranks, given.microbatches, costs, memory=memory, seconds=given.seconds, seed=given.seed, once=given.once)
        return found.simulation.timeline.schedule, told(found, memory)
    if given.name.endswith(".json"):
        kept = read_schedule(Path(given.name))
        size = f"{kept.num_ranks} ranks and {kept.num_microbatches} micro-batches"
        return kept, [f"{given.name} is for {size}, whatever --ranks and --microbatches say"]
    if given.ranks * given.microbatches > _MOST_OPS:
        raise UsageError(f"--ranks ({given.ranks}) times --microbatches ({given.microbatches}) must be at most {_MOST_OPS:,}")
    return build(given.name, given.ranks, given.microbatches, chunks=given.chunks), []


def told(found: Found, memory: float) -> list[str]:
    """What a search found, in words."""
    step, named = found.simulation.makespan, found.named
    above = f"{step / found.bound - 1:.1%} above {found.bound:.4g} s, which nothing on its routes can beat"
    lines = [f"found in {found.tried} attempts: {step:.4g} s, {above}"]
    if named and named.timeline.schedule is not found.simulation.timeline.schedule:
        name, more = named.timeline.schedule.name, f"{named.makespan:.4g} s, {named.makespan / step - 1:.1%} more"
        lines.append(f"the best named schedule with at most {memory:g} activations is {name}: {more}")
    return lines


def compare(schedule: Schedule, costs: Costs, *, chunks: int) -> tuple[list[Simulation], list[str]]:
    """All other named schedules at the same ranks, micro-batches and costs, and why some are left out."""
    found, refused = [], []
    ranks, microbatches = schedule.num_ranks, schedule.num_microbatches
    for name in NAMES:
        if name != schedule.name:
            try:
                found.append(simulate(build(name, ranks, microbatches, chunks=chunks), costs))
            except SpecError as error:
                refused.append(str(error))
    return found, refused


def formula_of(simulation: Simulation) -> Formula:
    """The formula of a simulated schedule at its costs."""
    share = plan_costs.share_of_rank(simulation.costs)
    return formula(
        simulation.timeline.schedule, simulation.costs, pair=plan_costs.pair_seconds(simulation.costs, share, share, stages_per_rank=1)
    )


def figures(simulation: Simulation) -> dict[str, Any]:
    """A simulation in plain values: seconds, shares and, with `activation_bytes` 1, micro-batches."""
    schedule, published = simulation.timeline.schedule, formula_of(simulation)
    return {
        "schedule": schedule.name,
        "ranks": schedule.num_ranks,
        "stages": schedule.num_stages,
        "microbatches": schedule.num_microbatches,
        "step_seconds": simulation.makespan,
        "bubble": simulation.mean_bubble,
        "bubble_per_rank": simulation.bubble,
        "bubble_seconds": simulation.anatomy["bubble"],
        "formula": {"text": published.text, "bubble_seconds": published.bubble, "activations": published.activations},
        "exposed_p2p_seconds_per_rank": simulation.exposed_p2p,
        "exposed_all_to_all_seconds_per_rank": simulation.exposed_all_to_all,
        "peak_activations_per_rank": simulation.peak_activations,
        "copies_of_parameters": published.parameters,
        "anatomy_seconds": simulation.anatomy,
    }


def table(simulations: list[Simulation], *, width: int) -> Table:
    """One row per schedule, the first one's in bold; a narrow terminal gets the figures that matter most."""
    rows = Table(box=None, pad_edge=False, padding=(0, 1), header_style="dim")
    shown = [name for name in _COLUMNS if width >= _WIDTH.get(name, 0)]
    for name in shown:
        rows.add_column(name, justify="left" if name in ("schedule", "formula") else "right", no_wrap=True)
    for index, simulation in enumerate(simulations):
        published = formula_of(simulation)
        rows.add_row(*(_COLUMNS[name](simulation, published) for name in shown), style="bold" if index == 0 else "")
    return rows


def _seconds(value: float | None) -> str:
    return "" if value is None else draw.seconds(value)


def _expected(simulation: Simulation, published: Formula) -> str:
    known = published.activations
    return "" if known is None else f"{known * simulation.costs.activation_bytes:.4g}"


_COLUMNS: dict[str, Callable[[Simulation, Formula], str]] = {
    "schedule": lambda simulation, _: simulation.timeline.schedule.name,
    "step": lambda simulation, _: _seconds(simulation.makespan),
    "efficiency": lambda simulation, _: f"{1 - simulation.mean_bubble:.1%}",
    "bubble": lambda simulation, _: _seconds(simulation.anatomy["bubble"]),
    "published": lambda _, published: _seconds(published.bubble),
    "formula": lambda _, published: published.text,
    "exposed p2p": lambda simulation, _: _seconds(max(simulation.exposed_p2p)),
    "exposed a2a": lambda simulation, _: _seconds(max(simulation.exposed_all_to_all)),
    "activations": lambda simulation, _: f"{max(simulation.peak_activations):.4g}",
    "(published)": _expected,
    "params": lambda _, published: f"{published.parameters}x",
}


_WIDTH = {"formula": 135, "(published)": 135, "exposed p2p": 100, "exposed a2a": 100, "params": 75, "published": 75, "activations": 62}
"""Columns that a terminal narrower than this leaves out."""


def anatomy(simulation: Simulation) -> str:
    """A step's parts, as a mean over the ranks."""
    parts = ", ".join(f"{draw.NAMES.get(kind, kind)} {draw.seconds(value)}" for kind, value in simulation.anatomy.items() if value)
    low, high = min(simulation.bubble), max(simulation.bubble)
    return f"mean over ranks: {parts}; bubble {low:.1%} to {high:.1%} of a rank's step"


def gains(simulations: list[Simulation]) -> list[str]:
    """For each schedule of pairs, what a pair must gain to beat the best schedule without; nothing where there is none to compare with."""
    paired = [one for one in simulations if one.anatomy["FB"]]
    plain = [one for one in simulations if not one.anatomy["FB"]]
    if not plain or simulations[0].costs.layer:
        return []
    best = min(plain, key=lambda one: one.makespan)
    found = []
    for one in paired:
        schedule, rival = one.timeline.schedule, best.timeline.schedule
        share = break_even(schedule, one.costs, against=best.makespan)
        needed = f"if F&B is at most {share:.3f} of F + B" if share else "only if F&B is below half of F + B"
        found.append(f"{schedule.name} is no slower than {rival.name}, the best without pairs, {needed}; here it is {one.costs.pair:.3g}")
    return found


def write(given: Arguments, simulations: list[Simulation]) -> None:
    """The files that were asked for. Raises UsageError where one cannot be written."""
    first = simulations[0].timeline
    timelines = {one.timeline.schedule.name: one.timeline for one in simulations}
    wanted: list[tuple[Path | None, Callable[[], str]]] = [
        (given.svg, lambda: draw.svg(first)),
        (given.html, lambda: draw.html(simulations)),
        (given.trace, lambda: chrome(timelines)),
        (given.save, lambda: dumps(first.schedule)),
    ]
    for path, text in wanted:
        if path is not None:
            try:
                path.write_text(text())
            except OSError as error:
                raise UsageError(f"cannot write {path}: {error.strerror}") from None
