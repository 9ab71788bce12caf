"""`quintet verify`: does a layout compute what one device computes? Starts its ranks here, and compares every gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from quintet.cli.describe import warn
from quintet.cli.options import Overrides, Recipe, Switch, read_with_recipe
from quintet.cost.memory import largest_rank
from quintet.cost.pipeline import fewest_sequences, read_schedule
from quintet.errors import UsageError
from quintet.launch.room import RANKS_PER_CORE, require_room
from quintet.monitor import machine
from quintet.schedule import fewest_microbatches
from quintet.spec.curriculum import Settings
from quintet.spec.layout import Layout, without_effect
from quintet.spec.legal import fewer_ranks
from quintet.spec.run import Run
from quintet.spec.tiny import tiny

if TYPE_CHECKING:
    from quintet.data.loader import Batch
    from quintet.evaluate.parity import Row

_SHOWN = 12
DIFFERENT = 12
"""Exit code where a comparison failed: that of wrong numbers."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train a few steps on one device and on the layout, from the same seed and data, and compare losses, gradient norm, every
    parameter's gradient and updated weight: in fp32, where they must be equal to rounding, and then in the recipe's precision."""

    recipe: Recipe
    """A recipe in TOML, the first argument."""
    run: Overrides
    """One training run; its layout is what is verified."""
    steps: int = 2
    """Optimizer steps."""
    sequences: int | None = None
    """Sequences of each step; absent: an odd number, so that ranks get unequal shares, and enough for the pipeline's schedule."""
    tiny: Switch = False
    """Shrink the model's widths, layers and experts, the sequence, and micro-batches above 2, keep its structure, cut stages by cost, and
    use random tokens."""
    max_ranks: int | None = None
    """Ranks, each a process here, to start at most; absent: 16 for each core, as far as memory reaches."""
    all: Switch = False
    """Print every comparison instead of the worst ones."""


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    given = read_with_recipe(Arguments, arguments, command="verify")
    run = tiny(given.run) if given.tiny else given.run
    fewest = fewest_microbatches(run.layout.pipeline, run.layout.pp) if run.layout.pp > 1 else 1
    enough = fewest_sequences(run.layout, run.train.micro_batch)
    kept = None if run.layout.schedule_file is None else read_schedule(run.layout.schedule_file).num_microbatches
    usual = max(2 * run.layout.dp + 1, enough) if kept is None else run.layout.dp * run.train.micro_batch * kept
    sequences = given.sequences or usual
    if sequences < enough and run.layout.schedule is not None:
        raise UsageError(
            f"sequences ({sequences}) must be at least {enough}: {run.layout.pipeline} on layout.pp ({run.layout.pp}) takes {fewest} "
            f"micro-batches of train.micro_batch ({run.train.micro_batch}) on each of layout.dp ({run.layout.dp}) replicas; leave "
            "layout.schedule out to verify zbv with fewer"
        )
    if given.steps < 1 or sequences < 1:
        raise UsageError(f"steps ({given.steps}) and sequences ({sequences}) must be at least 1")
    if run.layout.num_ranks == 1:
        raise UsageError("the layout is one device, which is what others are compared with; name one, for example: --layout.dp 2")
    _require_room(run, given)
    warn(without_effect(run.layout))
    console = Console(stderr=True)
    batches = _random_batches(run, sequences, given.steps) if given.tiny else _batches(run, given.recipe, sequences, given.steps, console)
    mtp = 0.3 if run.model.num_mtp_modules else 0.0
    settings = Settings(batch_sequences=sequences, learning_rate=1e-3, mtp_weight=mtp, bias_speed=1e-3)
    exit_codes, out = [], Console()
    out.width = out.width if out.is_terminal else max(out.width, 120)
    for precision in dict.fromkeys(("fp32", run.train.precision)):
        each = replace(run, train=replace(run.train, precision=precision))
        exit_codes.append(report(_compare(each, batches, settings, console), each, everything=given.all, out=out))
    return max(exit_codes)


def _require_room(run: Run, given: Arguments) -> None:
    """Raise UsageError where this machine is too small for the comparison, with a smaller one that divides the same dimensions."""

    def held(layout: Layout) -> int:
        memory = largest_rank(
            run.model, run.train, sequence_length=run.phases[0].sequence_length, layout=layout, moments=run.optimizer.moments
        )
        # What is compared: every step's gradients and masters in fp32, on their way to the process that compares them.
        return memory.total + given.steps * (memory.gradients + max(memory.master_weights, memory.weights))

    small = [] if given.tiny else ["make the model small with --tiny"]
    whatever = f"allow it all the same with --max-ranks {run.layout.num_ranks}"
    what = "one device, with which the layout is compared,"
    require_room(1, tensor_bytes=held(Layout()), most=given.max_ranks, what=what, remedy=", or ".join([*small, whatever]))
    most = min(given.max_ranks or run.layout.num_ranks - 1, run.layout.num_ranks - 1, RANKS_PER_CORE * machine.num_cores() // 2)
    fewer = fewer_ranks(run.layout, run.model, [run.phases[0].sequence_length], most=most)
    divided = [f"verify what divides the same dimensions on {fewer.num_ranks}, with {fewer.options}"] if fewer else []
    remedy = ", or ".join([*small, *divided, whatever])
    what = f"the layout ({run.layout})"
    require_room(run.layout.num_ranks, tensor_bytes=held(run.layout), most=given.max_ranks, what=what, remedy=remedy)


def _compare(run: Run, batches: Sequence[Batch], settings: Settings, console: Console) -> list[Row]:
    """Both computations, each in processes of its own."""
    from quintet.evaluate import parity
    from quintet.launch.local import run_on_ranks

    preload = ["quintet.evaluate.parity", "torch._dynamo", "torch.distributed._functional_collectives"]
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} ranks"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        alone = progress.add_task("one device", total=1)
        (reference,) = run_on_ranks(1, parity.trace_reference_here, (run, batches, settings), preload=preload)
        progress.advance(alone)
        many = progress.add_task(str(run.layout), total=run.layout.num_ranks)
        found = run_on_ranks(
            run.layout.num_ranks,
            parity.trace_rank,
            (run, batches, settings, reference.choices),
            preload=preload,
            on_result=lambda rank: progress.advance(many),
        )
    return parity.judge(reference, found)


def report(rows: Sequence[Row], run: Run, *, everything: bool, out: Console) -> int:
    """Print the comparisons and the verdict -> 0 if all passed, else DIFFERENT."""
    failed = [row for row in rows if not row.passed]
    numbers = [row for row in rows if not row.name]
    tensors = sorted((row for row in rows if row.name), key=_badness, reverse=True)
    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="dim")
    for name in ("step", "compared", "parameter", "error", "tolerance", "rank", ""):
        justify: Literal["left", "right"] = "right" if name in ("step", "error", "tolerance", "rank") else "left"
        folds = name == "parameter"  # where a terminal is narrow: numbers must be whole
        table.add_column(name, justify=justify, no_wrap=not folds, min_width=16 if folds else None, overflow="fold")
    shown = list(rows) if everything else [*numbers, *tensors[: max(_SHOWN, min(len(failed), 50))]]
    for row in shown:
        mark = "[green]pass[/green]" if row.passed else "[red]FAIL[/red]"
        rank = "" if row.rank is None else str(row.rank)
        table.add_row(str(row.step), row.what, row.name, f"{row.error:.1e}", f"{row.tolerance:.1e}", rank, mark)
    out.print(table)
    if len(shown) < len(rows):
        out.print(f"... the worst of {len(tensors)} tensors are shown; --all shows the rest", style="dim")
    if not failed:
        worst = tensors[0].error if tensors else 0.0
        text = f"{run.layout}: {len(rows)} comparisons in {run.train.precision} pass; the largest error of a tensor is {worst:.1e}"
        out.print(text, soft_wrap=True)
        return 0
    first = failed[0]
    where = "" if first.rank is None else f", most on rank {first.rank}"
    what = f"{first.what} of {first.name}" if first.name else first.what
    out.print(
        f"[red]{run.layout}: {len(failed)} of {len(rows)} comparisons fail[/red]; the first is the {what} in step {first.step}: off by "
        f"{first.error:.1e}, allowed {first.tolerance:.1e}{where}",
        soft_wrap=True,
    )
    return DIFFERENT


def _badness(row: Row) -> float:
    return math.inf if math.isnan(row.error) else row.error / row.tolerance


def _batches(run: Run, recipe: Path, sequences: int, steps: int, console: Console) -> list[Batch]:
    """The first rows that the run would train on."""
    from quintet.cli.prepare import prepare
    from quintet.data.loader import Loader

    prepared = prepare(run, console, recipe=recipe, on_other="beside")
    data = replace(run.data, buckets=())  # both sides see the same batches, of one length
    loader = Loader(prepared, data, sequence_length=run.phases[0].sequence_length, seed=run.seed)
    return [loader.next_batch(sequences) for _ in range(steps)]


def _random_batches(run: Run, sequences: int, steps: int) -> list[Batch]:
    """Random tokens in rows of two documents, with padding at some ends."""
    import torch

    from quintet.data.loader import Batch
    from quintet.ops.cross_entropy import IGNORED

    generator, length = torch.Generator().manual_seed(run.seed), run.phases[0].sequence_length
    batches = []
    for _ in range(steps):
        tokens = torch.randint(run.model.vocab_size, (sequences, length + 1), generator=generator)
        border, end = (torch.randint(1, length + 1, (sequences, 1), generator=generator) for _ in range(2))
        places = torch.arange(length)[None]
        labels = tokens[:, 1:].masked_fill((places >= end) & (torch.arange(sequences)[:, None] % 3 == 1), IGNORED)
        sizes = [(first, length + 1 - first, 0) for first in border[:, 0].tolist()]
        batches.append(Batch(inputs=tokens[:, :-1], labels=labels, sizes=sizes))
    return batches

