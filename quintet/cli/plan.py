"""`quintet plan`: whether a run fits a cluster, how long it takes and costs, what bounds it, and which layout is best and why."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.table import Table

from quintet.cli.bar import Bar
from quintet.cli.options import Overrides, Recipe, Switch, read_with_recipe
from quintet.errors import SpecError, UsageError
from quintet.monitor.units import count, duration
from quintet.plan import explain, page, presets
from quintet.plan.estimate import Estimate, bounds, cost, estimate, goodput, terms, utilization
from quintet.plan.rehearse import rehearse
from quintet.plan.search import Found, Goal, Space, allowed, nearest_possible, scaling, search
from quintet.plan.setup import Precision, Setup, of_run
from quintet.plan.software import generation
from quintet.spec import parse
from quintet.spec.cluster import Cluster, as_tree, dumps, named
from quintet.spec.curriculum import curriculum
from quintet.spec.curve import Curve
from quintet.spec.layout import Layout
from quintet.spec.legal import require_legal
from quintet.spec.run import Run

GIGA = 1e9
MOST_SIMULATED = 20_000
"""Ops up to which the recipe's own pipeline is also simulated: a second or two."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Plan a run: memory, time and cost of the recipe's layout on a cluster, and the best other layouts."""

    recipe: Recipe
    """A recipe in TOML, the first argument."""
    run: Overrides
    """One training run; its layout is judged, and others are searched for its model."""
    gpus: int | None = None
    """Devices; absent: as many as the recipe's layout takes."""
    gpu: str = "h800"
    """The device by its name in the catalogue, or a cluster.toml."""
    software: str | None = None
    """How well kernels and overlap work: a generation of `plan.software`; absent: deepseek, or eager on a CPU that was measured."""
    precision: Literal["recipe", "bf16", "fp8", "nvfp4", "fp32"] = "recipe"
    """Of matrix products."""
    batch: int | None = None
    """Sequences of a step; absent: the longest batch of the recipe's first phase."""
    tokens: float | None = None
    """Tokens that the run takes; absent: the recipe's phases."""
    top: int = 5
    """Layouts that are shown."""
    goal: Goal = "time"
    """What the search ranks by."""
    why: tuple[str, ...] = ()
    """Two of `recipe`, 1, 2, ...: compare them term by term."""
    what_if: tuple[str, ...] = ()
    """Changes of the cluster, such as link=2x network=0.5x memory=2x compute=1.5x."""
    explain: str | None = None
    """A figure, such as memory.activations or time: print its formula with its values, and nothing else."""
    preset: str | None = None
    """A layout that was once claimed: plan it, and tell where its figures cannot hold."""
    scaling: Switch = False
    """Also find the best layout of other sizes, up to 16,384 devices."""
    alone: Switch = False
    """Only the recipe's layout: no search."""
    html: Path | None = None
    """Write a page with plots and every figure."""
    write: Path | None = None
    """Write the recipe with the best layout found, ready for `quintet train`."""
    write_cluster: Path | None = None
    """Write the cluster as a cluster.toml, to change it, and stop."""
    json: Switch = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """All that a call found."""

    cluster: Cluster
    own: Estimate | None
    """Of the recipe's layout; None where it does not take the cluster's devices."""
    found: Found
    nearest: list[tuple[str, Estimate]]
    notes: list[str]


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code: 0 if something fits, 1 if nothing does."""
    given = read_with_recipe(Arguments, arguments, command="plan")
    chosen = presets.preset(given.preset) if given.preset else None
    run = given.run if chosen is None else _with_layout(given.run, chosen.layout)
    cluster = _cluster(given, run)
    if given.write_cluster:
        _write_text(given.write_cluster, dumps(cluster), option="--write-cluster")
        Console().print(f"wrote {given.write_cluster}", highlight=False)
        return 0
    with Bar("searching layouts"):
        planned = plan(given, run, cluster)
    notes = [*(presets.arithmetic(chosen) if chosen else []), *planned.notes]
    if chosen and planned.own:
        notes += presets.claims(planned.own)
    planned = replace(planned, notes=notes)
    if given.explain:
        print(explain.explain(_candidate("recipe" if planned.own else "1", planned), given.explain))
        return 0
    with Bar("other sizes"):
        sizes = _scaling(run, planned) if given.scaling else None
    if given.json:
        print(json.dumps(figures(planned, sizes), indent=2))
    else:
        Console().print(report(planned, run, given, sizes))
    _write(given, run, planned, sizes)
    return 0 if planned.found.best or (planned.own and planned.own.fits) else 1


def plan(given: Arguments, run: Run, cluster: Cluster) -> Planned:
    """Estimate the recipe's layout and search for others."""
    base = _setup(given, run, cluster)
    notes, own = [], None
    if run.layout.num_ranks == cluster.num_gpus:
        own = estimate(base, cluster)
    else:
        notes.append(
            f"the recipe's layout ({run.layout}) takes {run.layout.num_ranks:,} devices, not {cluster.num_gpus:,}: only the search is shown"
        )
    found = Found() if given.alone else search(base, cluster, model=run.model, top=given.top, goal=given.goal)
    nearest = []
    if (own and not own.fits) or (not given.alone and not found.best):
        nearest = nearest_possible(base, cluster, model=run.model, searched=None if given.alone else found)
    return Planned(cluster=cluster, own=own, found=found, nearest=nearest, notes=notes)


def _cluster(given: Arguments, run: Run) -> Cluster:
    if given.top < 1:
        raise UsageError(f"--top ({given.top}) must be at least 1")
    if given.tokens is not None and not 0 < given.tokens < math.inf:
        raise UsageError(f"--tokens ({given.tokens}) must be larger than 0 and finite")
    num = given.gpus if given.gpus is not None else run.layout.num_ranks
    if num < 1:
        raise UsageError(f"--gpus ({num}) must be at least 1")
    factors = [_factor(word) for word in given.what_if]
    names = [name for name, _ in factors]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UsageError(f"--what-if names {', '.join(twice)} more than once; give each factor once")
    return named(given.gpu, num_gpus=num).scaled(dict(factors))


def _factor(word: str) -> tuple[str, float]:
    name, _, factor = word.partition("=")
    try:
        return name.strip(), float(factor.strip().rstrip("x"))
    except ValueError:
        raise UsageError(f"--what-if {word!r} must be a name, '=' and a factor, such as link=2x") from None


def _setup(given: Arguments, run: Run, cluster: Cluster) -> Setup:
    """The recipe's own step. Raises UsageError or SpecError for what contradicts itself."""
    phase = run.phases[0]
    batch = given.batch if given.batch is not None else int(Curve.parse(phase.batch).peak)
    precision: Precision = run.train.precision if given.precision == "recipe" else given.precision
    if run.layout.num_ranks != cluster.num_gpus:  # the search chooses its own; nothing of the layout is judged
        run = _with_layout(run, Layout())
    has = [name for name, _ in cluster.gpu.peak.items()] if cluster.eager is None else ["fp32", "bf16"]
    if precision not in has:
        raise UsageError(f"--precision {precision}: {cluster.gpu.name} has no such products; choose from {', '.join(has)}")
    software = generation(_software(given, cluster), device=cluster.gpu.name)
    chosen = of_run(run, software=software, batch_sequences=batch, precision=precision)
    if run.layout.pp > 1 and not allowed(chosen):
        raise SpecError(
            f"layout.schedule {chosen.schedule} cannot run {chosen.num_microbatches} micro-batches over "
            f"layout.pp ({run.layout.pp}): DualPipe "
            f"needs twice as many as stages, interleaved schedules as many; change --batch, --train.micro-batch, "
            f"--layout.pp or --layout.schedule"
        )
    return chosen


def _software(given: Arguments, cluster: Cluster) -> str:
    return given.software or ("deepseek" if cluster.eager is None else "eager")


def _with_layout(run: Run, layout: Layout) -> Run:
    require_legal(layout, run.model, (phase.sequence_length for phase in run.phases))
    return replace(run, layout=layout)


def _scaling(run: Run, planned: Planned) -> page.Scaling | None:
    best = planned.found.best[0] if planned.found.best else planned.own
    if best is None:
        return None
    sizes = sorted({2**i for i in range(4, 15)} | {planned.cluster.num_gpus})
    space = Space(schedules=(("1f1b", 1), ("zbv", 2), ("dualpipev", 2)), micro_batch=(1,), zero=(1,))
    weak, strong = (scaling(best.setup, run.model, planned.cluster, sizes=sizes, weak=weak, space=space) for weak in (True, False))
    return page.Scaling(weak=weak, strong=strong)


def _candidate(name: str, planned: Planned) -> Estimate:
    if name == "recipe" and planned.own:
        return planned.own
    if name.isdigit() and 1 <= int(name) <= len(planned.found.best):
        return planned.found.best[int(name) - 1]
    known = [*(["recipe"] if planned.own else []), *(str(i + 1) for i in range(len(planned.found.best)))]
    raise UsageError(f"{name!r} is no layout of this plan; there are {', '.join(known) or 'none that fit'}")


def figures(planned: Planned, sizes: page.Scaling | None) -> dict[str, Any]:
    """The plan for machines."""
    told: dict[str, Any] = {
        "cluster": as_tree(planned.cluster),
        "recipe": _figures(planned.own) if planned.own else None,
        "best": [_figures(one) for one in planned.found.best],
        "searched": {
            "layouts": planned.found.num_layouts,
            "estimated": planned.found.num_estimated,
            "too_large": planned.found.num_too_large,
        },
        "nearest": [{"change": what, **_figures(one)} for what, one in planned.nearest],
        "notes": planned.notes,
    }
    if sizes:
        told["scaling"] = {name: [_figures(one) for one in getattr(sizes, name)] for name in ("weak", "strong")}
    return told


def _figures(found: Estimate) -> dict[str, Any]:
    setup = found.setup
    return {
        "layout": asdict(setup.layout),
        "devices": setup.layout.num_ranks,
        "schedule": setup.schedule,
        "chunks": setup.chunks,
        "micro_batch": setup.micro_batch,
        "recompute": setup.recompute,
        "precision": setup.precision,
        "batch_sequences": setup.batch_sequences,
        "sequence_length": setup.sequence_length,
        "software": setup.software.name,
        "seconds": found.seconds,
        "tokens_per_second_per_device": found.tokens_per_second,
        "fits": found.fits,
        "bubble": found.bubble,
        "bound": found.bound,
        "utilization": asdict(utilization(found)),
        "goodput": _finite(asdict(goodput(found))),
        "per_trillion_tokens": asdict(cost(found, tokens=1e12)),
        "terms": terms(found),
        "memory_by_rank": [{**asdict(rank), "total": rank.total} for rank in found.memory],
    }


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def report(planned: Planned, run: Run, given: Arguments, sizes: page.Scaling | None) -> RenderableType:
    """The plan for a person."""
    cluster = planned.cluster
    parts: list[RenderableType] = [
        Rule(f"{run.name} on {cluster.num_gpus:,} x {cluster.gpu.name}, software {_software(given, cluster)}", align="left"),
        *(f"[dim]·[/dim] {note}" for note in planned.notes),
    ]
    tokens = given.tokens or sum(stretch.num_tokens for stretch in curriculum(run))
    if own := planned.own:
        parts += [Rule("the recipe's layout", align="left", style="dim"), _summary(own, tokens=tokens), _memory_table(own)]
        parts.append(_time_table(own))
    if planned.found.best:
        found = planned.found
        title = (
            f"best of {found.num_layouts:,} legal layouts by {given.goal} ({found.num_estimated:,} combinations, "
            f"{found.num_too_large:,} too large)"
        )
        parts += [Rule(title, align="left", style="dim"), _best_table(planned, tokens=tokens)]
        if own is None:
            parts += [_summary(found.best[0], tokens=tokens), _memory_table(found.best[0]), _time_table(found.best[0])]
    elif not given.alone:
        parts.append("[bold red]no layout of these devices fits[/bold red]" + _tightest(planned))
    if planned.nearest:
        parts += [Rule("nearest possible", align="left", style="dim"), *(_nearest_line(what, one) for what, one in planned.nearest)]
    if given.why:
        parts += [Rule(f"why {' and '.join(given.why)} differ", align="left", style="dim"), _why_table(given.why, planned)]
    if sizes:
        parts += [Rule("scaling", align="left", style="dim"), _scaling_table(sizes)]
    parts.append(
        "[dim]Estimates: docs/planner.md tells how well they hold. Formulas: --explain time, --explain memory. Layers are "
        "shared out among stages by their cost.[/dim]"
    )
    return Group(*parts)


def _summary(found: Estimate, *, tokens: float) -> RenderableType:
    setup, used, good, whole = found.setup, utilization(found), goodput(found), cost(found, tokens=tokens)
    per_trillion = cost(found, tokens=1e12)
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column()
    fits = "[green]fits[/green]" if found.fits else "[bold red]does not fit[/bold red]"
    rows.add_row(
        "layout",
        f"{setup.layout}, {setup.num_microbatches} micro-batches of {setup.micro_batch}, recompute {setup.recompute}, {setup.precision}",
    )
    rows.add_row(
        "memory", f"{found.fullest.total / GIGA:.1f} GB on the fullest rank of {found.cluster.gpu.memory_bytes / GIGA:.1f}: {fits}"
    )
    rows.add_row(
        "step",
        f"{found.seconds:.2f} s for {setup.batch_sequences:,} x {setup.sequence_length:,} tokens: "
        f"{found.tokens_per_second:,.0f} tokens/s per device",
    )
    rows.add_row(
        "MFU",
        f"{used.mfu_causal:.1%} causal, {used.mfu_full:.1%} whole attention, of bf16's peak (without MTP); "
        f"{used.mfu_own:.1%} of its own precision's, with MTP",
    )
    rows.add_row(
        "bound by",
        ", ".join(f"{name} {seconds / found.seconds:.0%}" for name, seconds in sorted(bounds(found).items(), key=lambda x: -x[1])[:4]),
    )
    rows.add_row("bubble", f"{found.bubble:.1%}{_rehearsed(found)}")
    rows.add_row("per 1T tokens", f"{per_trillion.device_hours:,.0f} device-hours, {duration(per_trillion.seconds)}")
    rows.add_row(
        f"{count(tokens)} tokens",
        f"{duration(whole.seconds)}, {whole.device_hours:,.0f} device-hours, ${whole.dollars:,.0f}, {whole.megawatt_hours:,.0f} MWh "
        f"(goodput {good.share:.1%}: a failure every {duration(good.seconds_between_failures)}, a checkpoint every "
        f"{duration(good.checkpoint_every)})",
    )
    return rows


def _rehearsed(found: Estimate) -> str:
    """The pipeline's time by the simulator beside the closed form, where walking it is quick."""
    setup = found.setup
    if setup.layout.pp == 1 or setup.layout.pp * setup.num_microbatches * 6 > MOST_SIMULATED:
        return ""
    simulation = rehearse(found)
    return (
        f" (pipeline {found.timed.pipeline.total:.2f} s by closed form, {simulation.makespan:.2f} s simulated, "
        f"mean bubble {simulation.mean_bubble:.1%})"
    )


def _memory_table(found: Estimate) -> Table:
    fullest = found.memory.index(found.fullest)
    chosen = sorted({0, fullest, len(found.memory) - 1})
    table = _table("GB", *(f"rank {index}" + (" (fullest)" if index == fullest and len(found.memory) > 1 else "") for index in chosen))
    for field in dataclasses.fields(found.fullest):
        values = [getattr(found.memory[index], field.name) for index in chosen]
        if any(values):
            table.add_row(field.name.replace("_", " "), *(f"{value / GIGA:.2f}" for value in values))
    table.add_row("total", *(f"{found.memory[index].total / GIGA:.2f}" for index in chosen), style="bold")
    return table


def _time_table(found: Estimate) -> Table:
    table = _table("seconds of a step", "", "")
    for field in dataclasses.fields(found.step):
        if value := getattr(found.step, field.name):
            table.add_row(field.name.replace("_", " "), f"{value:.3f}", f"{value / found.seconds:.1%}")
    table.add_row("total", f"{found.seconds:.3f}", "", style="bold")
    return table


def _best_table(planned: Planned, *, tokens: float) -> Table:
    table = _table("", "layout", "step s", "GB", "bubble", "device-hours")
    best = planned.found.best[0]
    for index, one in enumerate(planned.found.best):
        hours = cost(one, tokens=tokens).device_hours
        name, policy = str(index + 1), f"micro-batch {one.setup.micro_batch}, recompute {one.setup.recompute}"
        table.add_row(
            name, str(one.setup.layout), f"{one.seconds:.2f}", f"{one.fullest.total / GIGA:.1f}", f"{one.bubble:.1%}", f"{hours:,.0f}"
        )
        table.add_row("", f"[dim]{policy}\n{_trade(one, best)}[/dim]")
    return table


def _trade(one: Estimate, best: Estimate) -> str:
    """What a layout gives and takes against the first."""
    if one is best:
        return f"bound by {one.bound}"
    slower, memory = one.seconds / best.seconds - 1, (one.fullest.total - best.fullest.total) / GIGA
    name, mine, theirs = next(
        ((n, a, b) for n, a, b in explain.compare(one, best) if n.startswith("time.") and n != "time.total"), ("", 0.0, 0.0)
    )
    term = f", {name.partition('.')[2].replace('_', ' ')} {mine - theirs:+.2f} s" if name else ""
    return f"{slower:+.1%} time, {memory:+.1f} GB{term}"


def _nearest_line(what: str, one: Estimate) -> str:
    setup = one.setup
    return (
        f"{what}: {setup.layout} ({setup.layout.num_ranks:,} devices), micro-batch "
        f"{setup.micro_batch}, recompute {setup.recompute}: "
        f"{one.seconds:.2f} s, {one.fullest.total / GIGA:.1f} GB"
    )


def _tightest(planned: Planned) -> str:
    one, least = planned.found.tightest, planned.found.least_bytes
    memory = planned.cluster.gpu.memory_bytes
    if least > memory:
        return f": shared by all of them, weights, gradients and optimizer alone are {least / GIGA:,.1f} GB on each of {memory / GIGA:.1f}"
    if one is None:
        return ": no legal layout takes them" if not planned.found.num_too_large else ": no layout has room for weights and optimizer"
    return (
        f"; the tightest needs {one.fullest.total / GIGA:.1f} GB of "
        f"{planned.cluster.gpu.memory_bytes / GIGA:.1f}: {one.setup.layout}, recompute {one.setup.recompute}"
    )


def _why_table(names: Sequence[str], planned: Planned) -> Table:
    if len(names) != 2:
        raise UsageError(f"--why takes two layouts, such as --why recipe 1, got {len(names)}")
    one, other = (_candidate(name, planned) for name in names)
    table = _table("figure", *names, "difference")
    for name, first, second in explain.compare(one, other):
        scale = GIGA if name.startswith("memory") else 1.0
        table.add_row(
            f"{name}, {'GB' if scale > 1 else 's'}", f"{first / scale:.3f}", f"{second / scale:.3f}", f"{(second - first) / scale:+.3f}"
        )
    return table


def _scaling_table(sizes: page.Scaling) -> Table:
    table = _table("devices", "weak: layout", "tokens/s per device", "strong: layout", "tokens/s per device ", "step s")
    strong = {one.cluster.num_gpus: one for one in sizes.strong}
    weak = {one.cluster.num_gpus: one for one in sizes.weak}
    for size in sorted(strong.keys() | weak.keys()):
        a, b = weak.get(size), strong.get(size)
        table.add_row(
            f"{size:,}",
            str(a.setup.layout) if a else "does not fit",
            f"{a.tokens_per_second:,.0f}" if a else "",
            str(b.setup.layout) if b else "does not fit",
            f"{b.tokens_per_second:,.0f}" if b else "",
            f"{b.seconds:.2f}" if b else "",
        )
    return table


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="dim")
    for index, name in enumerate(names):
        left = index == 0 or "layout" in name or name in ("schedule", "recompute", "what it trades")
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    return table


def _write_text(path: Path, text: str, *, option: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot be written ({error.strerror}); name a file in a folder that exists") from None


def _write(given: Arguments, run: Run, planned: Planned, sizes: page.Scaling | None) -> None:
    best = planned.found.best
    if given.html and (chosen := planned.own or (best[0] if best else None)):
        title = f"{run.name} on {planned.cluster.num_gpus:,} x {planned.cluster.gpu.name}"
        _write_text(given.html, page.page(chosen, best, title=title, scaling=sizes, notes=planned.notes), option="--html")
    if given.write:
        if not best:
            raise UsageError("--write: no layout was found that fits, so there is nothing to write")
        setup = best[0].setup
        train = replace(run.train, micro_batch=setup.micro_batch, recompute=setup.recompute)
        _write_text(given.write, parse.dumps(replace(run, layout=setup.layout, train=train)), option="--write")
        if not given.json:
            Console().print(f"wrote {given.write}: quintet train {given.write}", highlight=False)
