"""`quintet layout`: who sits where in a layout of any size, which ranks form a group, and what one rank holds."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from quintet.cli.describe import warn
from quintet.cli.options import Overrides, Recipe, Switch, read_with_recipe
from quintet.cost.memory import step_memory
from quintet.cost.pipeline import at_odds
from quintet.errors import UsageError
from quintet.monitor.units import count, num_bytes
from quintet.spec.curriculum import curriculum, main_stretch
from quintet.spec.layout import GROUPS, HOLDERS, Layout, without_effect
from quintet.spec.placement import Box
from quintet.spec.run import Run

if TYPE_CHECKING:
    from quintet.train.survey import Holding

COORDINATES = ("pp", "dp", "cp", "tp", "ep", "expert_dp")
SHOWN = 16
"""Ranks that are listed one by one."""
MOST_RANKS = 1 << 16
"""Of a layout that is shown, in some tens of seconds."""
PURPOSES = {
    "tp": "heads, feed-forwards and vocabulary are split; tokens between them",
    "cp": "the sequence is split: latents or keys and values go round",
    "ep": "routed experts are divided: rows to their experts and back",
    "dp": "replicas, each with its part of the batch",
    "pp": "the stages of one replica",
    "sequence": "ranks that hold parts of the same sequences",
    "replicated": "weights that nothing splits",
    "tp_split": "weights that tp splits",
    "expert": "experts",
    "expert_split": "experts that expert_tp splits",
    "both_ends": "the embedding, which the first and the last stage need",
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Show who sits where in a layout, its groups, and one rank built as training would build it, on no memory and without the others."""

    recipe: Recipe
    """A recipe in TOML, the first argument."""
    run: Overrides
    """One training run; its layout, --layout.dp and so on, is what is shown."""
    rank: int | None = None
    """The rank that is built and shown with all its groups; absent: rank 0, in short."""
    json: Switch = False
    """Print JSON."""


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    given = read_with_recipe(Arguments, arguments, command="layout")
    layout, rank = given.run.layout, given.rank or 0
    if not 0 <= rank < layout.num_ranks:
        raise UsageError(f"--rank ({rank}) must lie between 0 and {layout.num_ranks - 1}: the layout ({layout}) takes {layout.num_ranks}")
    if layout.num_ranks > MOST_RANKS:
        raise UsageError(
            f"the layout ({layout}) takes {layout.num_ranks:,} ranks; each is numbered and put into its groups here, at most "
            f"{MOST_RANKS:,} of them: choose smaller degrees, or see what it would cost with quintet plan"
        )
    from quintet.train.survey import survey

    begin = time.perf_counter()
    holding = survey(given.run, rank)
    told = figures(given.run, rank, holding, seconds=time.perf_counter() - begin)
    if given.json:
        print(json.dumps(told, indent=2))
    else:
        out = Console()
        out.width = out.width if out.is_terminal else max(out.width, 140)
        warn([*without_effect(layout), *at_odds(layout, given.run.train)])
        out.print(page(told, holding, in_full=given.rank is not None))
    return 0


def figures(run: Run, rank: int, holding: Holding, *, seconds: float) -> dict[str, Any]:
    """A layout and one of its ranks in plain values."""
    layout, length = run.layout, main_stretch(curriculum(run)).phase.sequence_length
    memory = step_memory(
        run.model, run.train, sequence_length=length, layout=layout, place=layout.coordinates(rank).pp, moments=run.optimizer.moments
    )
    stages = layout.stages_at(layout.coordinates(rank).pp)
    return {
        "layout": asdict(layout),
        "num_ranks": layout.num_ranks,
        "num_nodes": len(layout.nodes_of(range(layout.num_ranks))),
        "groups": {axis: _group_figures(layout, axis) for axis in GROUPS if _tells(axis, layout) and holding.groups[axis].size > 1},
        "ranks": {other: asdict(layout.coordinates(other)) for other in listed(layout, rank)},
        "rank": {
            "rank": rank,
            "node": rank // layout.node_size,
            "coordinates": asdict(layout.coordinates(rank)),
            "groups": {axis: group.ranks for axis, group in holding.groups.items() if _tells(axis, layout) and group.size > 1},
            "stages": {stage: list(held.layers) for stage, held in zip(stages, holding.part.stages, strict=True)},
            "embedding": holding.part.embedding,
            "head": holding.part.last,
            "mtp": holding.part.last and run.model.num_mtp_modules > 0,
            "num_parameters": sum(math.prod(box.sizes) for box in holding.boxes.values()),
            "parameters": {name: asdict(box) for name, box in holding.boxes.items()},
            "held_bytes": {**asdict(holding.bytes), "total": holding.bytes.total},
            "step_bytes": {**asdict(memory), "total": memory.total},
            "sequence_length": length,
            "seconds_to_build": seconds,
        },
    }


def _tells(axis: str, layout: Layout) -> bool:
    """Whether an axis says something of its own: holders of which there are weights, and sequences that cp and tp both divide."""
    split, divided = layout.tp > 1, layout.ep > 1
    holders = {"tp_split": split, "expert": divided and layout.expert_tp == 1, "expert_split": divided and layout.expert_tp > 1}
    ends = layout.pp > 1 and layout.arrangement in ("line", "loop")
    others = {"stage": False, "world": False, "sequence": split and layout.cp > 1, "both_ends": ends}
    return (holders | others).get(axis.partition(".")[0], True)


def _group_figures(layout: Layout, axis: str) -> dict[str, Any]:
    groups = [group for group in layout.groups(axis) if len(group) > 1]
    if axis.startswith("both_ends"):  # not of the places between
        groups = [group for group in groups if layout.coordinates(group[0]).pp == 0]
    nodes = [len(layout.nodes_of(ranks)) for ranks in groups]
    return {"count": len(groups), "size": len(groups[0]), "first": groups[0], "fewest_nodes": min(nodes), "most_nodes": max(nodes)}


def listed(layout: Layout, rank: int) -> list[int]:
    """All ranks if they are few; or else the first ones, those where an axis moves on for the first time, `rank`, and the last one."""
    if layout.num_ranks <= SHOWN:
        return [*range(layout.num_ranks)]
    sizes = (layout.tp, layout.cp * layout.tp, layout.ep * layout.tp, layout.num_replicas * layout.tp)
    chosen = {0, 1, 2, 3, rank, layout.num_ranks - 1, *(place for size in sizes for place in (size - 1, size))}
    return sorted(place for place in chosen if place < layout.num_ranks)


def page(told: dict[str, Any], holding: Holding, *, in_full: bool) -> RenderableType:
    """The figures for a person."""
    rank, layout = told["rank"], Layout(**told["layout"])
    parts: list[RenderableType] = [
        Rule(f"{layout}", align="left"),
        f"{_count(told['num_ranks'], 'rank')} on {_count(told['num_nodes'], 'node')} of {layout.node_size}",
        Rule("groups", align="left", style="dim"),
        _groups_table(told["groups"]) if told["groups"] else "none: a single device sends nothing",
        Rule("who sits where", align="left", style="dim"),
        _ranks_table(told["ranks"], layout),
        Rule(f"rank {rank['rank']}, built in {rank['seconds_to_build']:.1f} s", align="left", style="dim"),
        f"node {rank['node']}; {_stage_text(rank, layout)}; {count(rank['num_parameters'])} parameters ({rank['num_parameters']:,})",
    ]
    if in_full:
        parts += [_own_groups_table(rank["groups"], layout), _parameters_table(holding)]
    return Group(*parts, _bytes_table(rank))


def _stage_text(rank: dict[str, Any], layout: Layout) -> str:
    texts = []
    for stage, numbers in rank["stages"].items():
        layers = f"layers {numbers[0]} to {numbers[-1]}" if numbers else "no layer"
        texts.append(f"stage {stage} with {layers}" if layout.pp > 1 else layers)
    beside = [name for name, here in (("embedding", rank["embedding"]), ("head", rank["head"]), ("MTP", rank["mtp"])) if here]
    return f"{', '.join(texts)}; {', '.join(beside) or 'neither embedding nor head'}"


def _purpose(axis: str) -> str:
    holders, _, way = axis.partition(".")
    if holders not in HOLDERS:
        return PURPOSES[axis]
    doing = "share ZeRO's shards of" if way == "shard" else "add up gradients of"
    return f"{doing} {PURPOSES[holders]}"


def _groups_table(groups: dict[str, dict[str, Any]]) -> Table:
    table = _table("axis", "groups", "ranks each", "the first", "nodes", "for")
    for axis, group in groups.items():
        few, many = group["fewest_nodes"], group["most_nodes"]
        nodes = "inside one" if many == 1 else f"across {many}" if few == many else f"across {few} to {many}"
        table.add_row(axis, f"{group['count']:,}", f"{group['size']:,}", shortened(group["first"]), nodes, _purpose(axis))
    return table


def _ranks_table(ranks: dict[int, dict[str, int]], layout: Layout) -> Table:
    table, before = _table("rank", "node", *COORDINATES), -1
    for rank, at in ranks.items():
        if rank != before + 1:
            table.add_row(*["..."] * (2 + len(COORDINATES)))
        table.add_row(f"{rank}", f"{rank // layout.node_size}", *(f"{at[axis]}" for axis in COORDINATES))
        before = rank
    return table


def _own_groups_table(groups: dict[str, Sequence[int]], layout: Layout) -> Table:
    table = _table("group", "ranks", "nodes", "which")
    for axis, ranks in groups.items():
        nodes = layout.nodes_of(ranks)
        table.add_row(axis, f"{len(ranks):,}", f"{len(nodes):,}", shortened(ranks))
    return table


def _parameters_table(holding: Holding) -> Table:
    """A row for each parameter; those of layers with equal parts share one."""
    rows: dict[tuple[str, Box], list[str]] = {}
    for name, box in holding.boxes.items():
        layer = re.match(r"(layers|mtp)\.(\d+)\.", name)
        rows.setdefault((name if layer is None else f"{layer[1]}.*.{name[layer.end() :]}", box), []).append(layer[2] if layer else "")
    table = _table("parameter", "of", "whole", "here", "from")
    for (name, box), layers in rows.items():
        numbers = sorted(int(number) for number in layers if number)
        table.add_row(name, shortened(numbers) if numbers else "", _shape(box.shape), _shape(box.sizes), ", ".join(map(str, box.offsets)))
    return table


def _bytes_table(rank: dict[str, Any]) -> Table:
    table = _table("", "bytes")
    for name, value in rank["held_bytes"].items():
        table.add_row("held between steps" if name == "total" else name, num_bytes(value))
    besides = {"gathered": "gathered", "activations": "activations kept at one time", "recomputation": "recomputation", "logits": "logits"}
    for name, label in {**besides, "messages": "messages"}.items():
        if rank["step_bytes"][name]:
            table.add_row(f"{label}, estimated", num_bytes(rank["step_bytes"][name]))
    table.add_row(f"a step of {rank['sequence_length']:,} tokens a sequence, estimated", num_bytes(rank["step_bytes"]["total"]))
    return table


def shortened(ranks: Sequence[int]) -> str:
    """`0, 8, 16 ... 120`: all of at most five, or the first three and the last one."""
    if len(ranks) <= 5:
        return ", ".join(map(str, ranks))
    return f"{', '.join(map(str, ranks[:3]))} ... {ranks[-1]}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _shape(sizes: Iterable[int]) -> str:
    return " x ".join(map(str, sizes))


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="dim")
    numbers = {"groups", "ranks each", "rank", "node", "ranks", "bytes", *COORDINATES}
    for name in names:
        table.add_column(Text(name), justify="right" if name in numbers else "left", no_wrap=name in {*numbers, "axis"}, overflow="fold")
    return table
