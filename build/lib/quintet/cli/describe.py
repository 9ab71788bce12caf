"""What a run is, in figures: parameters, operations, memory and schedule, counted from the spec, as a tree and as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from quintet.cost.flops import flops_per_token, parameters
from quintet.cost.memory import Memory, largest_rank
from quintet.monitor.units import count, num_bytes
from quintet.spec.curriculum import Stretch, curriculum, main_stretch
from quintet.spec.curve import Curve
from quintet.spec.model import Model
from quintet.spec.run import Run
from quintet.train.foresee import doubts, refusals


def model_figures(model: Model, *, sequence_length: int) -> dict[str, Any]:
    """Parameters and training FLOPs per token (MTP included) of a model, by component."""
    weights = parameters(model)
    flops = flops_per_token(model, sequence_length=sequence_length, mtp=True)
    return {
        "parameters": {
            "total": weights.total,
            "total_with_mtp": weights.total_with_mtp,
            "active": weights.active,
            "active_with_embedding": weights.active_with_embedding,
            "by_component": {name: number for name, number in asdict(weights).items() if name != "idle_experts"},
        },
        "flops_per_token": {"sequence_length": sequence_length, "total": flops.total, "by_component": asdict(flops)},
    }


def run_figures(run: Run) -> dict[str, Any]:
    """`model_figures` at the sequence length that most tokens are trained at, memory of a step there on the rank that needs most, and the
    phases, each with its memory."""
    stretches = curriculum(run)
    main = main_stretch(stretches)
    memories = [_memory(run, stretch) for stretch in stretches]
    memory = memories[stretches.index(main)]
    return {
        "name": run.name,
        **model_figures(run.model, sequence_length=main.phase.sequence_length),
        "layout": str(run.layout),
        "memory_bytes": {"phase": main.phase.name, "total": memory.total, "by_part": asdict(memory)},
        "phases": [_stretch_figures(*each) for each in zip(stretches, memories, strict=True)],
    }


def _memory(run: Run, stretch: Stretch) -> Memory:
    """Of a step at the end of a phase."""
    return largest_rank(
        run.model,
        run.train,
        sequence_length=stretch.phase.sequence_length,
        layout=run.layout,
        moments=run.optimizer.moments,
        num_microbatches=run.layout.num_microbatches(stretch.last_batch, run.train.micro_batch),
    )


def _stretch_figures(stretch: Stretch, memory: Memory) -> dict[str, Any]:
    return {
        "name": stretch.phase.name,
        "steps": stretch.num_steps,
        "tokens": stretch.num_tokens,
        "sequence_length": stretch.phase.sequence_length,
        "first_batch": stretch.first_batch,
        "last_batch": stretch.last_batch,
        "peak_learning_rate": Curve.parse(stretch.phase.learning_rate).peak,
        "memory_bytes": memory.total,
    }


def model_tables(figures: dict[str, Any]) -> RenderableType:
    """`model_figures` for a person."""
    weights, flops = figures["parameters"], figures["flops_per_token"]
    return Group(
        Rule("parameters", align="left", style="dim"),
        _grid(
            ("total", f"{count(weights['total'])}  ({weights['total']:,})"),
            ("with MTP modules", f"{count(weights['total_with_mtp'])}  ({weights['total_with_mtp']:,})"),
            ("active per token", f"{count(weights['active'])}; with the embedding {count(weights['active_with_embedding'])}"),
            ("of which", _parts(weights["by_component"], count)),
        ),
        Rule("training FLOPs per token", align="left", style="dim"),
        _grid(
            ("total", f"{count(flops['total'])} in a sequence of {flops['sequence_length']:,}, MTP included, without recomputation"),
            ("of which", _parts(flops["by_component"], count)),
        ),
    )


def run_tables(figures: dict[str, Any]) -> RenderableType:
    """`run_figures` for a person, without the recipe."""
    memory = figures["memory_bytes"]
    phases = Table(box=None, pad_edge=False, padding=(0, 2), header_style="dim")
    for name in ("phase", "steps", "tokens", "sequence", "batch", "peak learning rate", "memory"):
        phases.add_column(name, justify="left" if name == "phase" else "right")
    for p in figures["phases"]:
        batch = f"{p['first_batch']}" if p["first_batch"] == p["last_batch"] else f"{p['first_batch']} to {p['last_batch']}"
        phases.add_row(
            p["name"],
            f"{p['steps']:,}",
            count(p["tokens"]),
            f"{p['sequence_length']:,}",
            batch,
            f"{p['peak_learning_rate']:.3g}",
            num_bytes(p["memory_bytes"]),
        )
    return Group(
        model_tables(figures),
        Rule(f"memory of a step{_of_phase(figures)}, estimated for {_device(figures['layout'])}", align="left", style="dim"),
        _grid(("total", num_bytes(memory["total"])), ("of which", _parts(memory["by_part"], num_bytes))),
        Rule("schedule", align="left", style="dim"),
        phases,
    )


def _of_phase(figures: dict[str, Any]) -> str:
    return f" of {figures['memory_bytes']['phase']}" if len(figures["phases"]) > 1 else ""


def _device(layout: str) -> str:
    return layout if layout == "one device" else f"the fullest rank of {layout}"


def _grid(*rows: tuple[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def _parts(parts: dict[str, int], show: Callable[[float], str]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {show(value)}" for name, value in parts.items() if value)


def foreseen(run: Run) -> list[str]:
    """What a person should know before the run begins on this machine."""
    return [*(f"train would refuse this here: {text}" for text in refusals(run)), *doubts(run)]


def warn(texts: Iterable[str]) -> None:
    """Tell warnings on stderr."""
    console = Console(stderr=True)
    for text in texts:
        console.print(Text.assemble(("warning: ", "bold yellow"), text), soft_wrap=True)
