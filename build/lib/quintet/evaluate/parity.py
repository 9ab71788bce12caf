"""Does a layout compute what one device computes? The same steps on both, and every gradient and weight compared.

Each rank notes the pieces that it holds of every gradient (reduced over all ranks that share it, before clipping) and of every updated
weight; put together by their places in the global tensors, they must cover each without a gap and equal the single device's. The error
of a tensor is the norm of the difference over the norm of the single device's in fp32.

In fp32 a layout only adds in another order: the tolerance is 1e-4. In bf16 rounding is large, and the measure is the single device itself:
an error may be twice as large as the worst one of the single device in bf16 against fp32, plus 2^-5 (gradients) or 2^-7, and never more
than 20 %. Where rounding tips a router's choice a whole token goes elsewhere, on one device as on many, and another time with another
layout; of few tokens one is half a gradient. So in bf16 one device and layout repeat the choices that fp32 made (see
evaluate.choices): what is left is rounding, and a sum that is missing or counted twice is off by far more. The choices themselves are
compared in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quintet.data.loader import Batch
from quintet.evaluate.choices import Choices
from quintet.parallel.bucket import Part
from quintet.parallel.mesh import Mesh, single
from quintet.parallel.rendezvous import joined
from quintet.spec.curriculum import Settings
from quintet.spec.layout import Layout
from quintet.spec.run import Run
from quintet.train import device as machine
from quintet.train.build import Built, build
from quintet.train.state import boxes_of
from quintet.train.step import accumulate, update

TOLERANCE = 1e-4
"""Largest error in fp32: sums in another order differ by 1e-7 to 1e-5."""
BF16_FACTOR, BF16_MARGIN, BF16_GRADIENT_MARGIN, BF16_MOST = 2.0, 2.0**-7, 2.0**-5, 0.2
"""How far from fp32 a layout in bf16 may be: this many times as far as one device in bf16, plus this, and never more than that."""


@dataclass(frozen=True)
class Held:
    """A box of a global tensor that a rank holds: `name` and `shape` are the whole tensor's."""

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    values: Tensor


@dataclass(frozen=True)
class StepTrace:
    """What a rank saw of one step: the step's losses (total, main, MTP, balance) and gradient norm, and its pieces of every gradient
    and, after the update, of every master weight."""

    losses: tuple[float, float, float, float]
    gradient_norm: float
    gradients: tuple[Held, ...]
    weights: tuple[Held, ...]


@dataclass(frozen=True)
class Row:
    """One comparison: of a number or of a tensor, in one step; `rank` holds the piece that is furthest off."""

    step: int
    what: str
    name: str
    error: float
    tolerance: float
    rank: int | None

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.error <= self.tolerance


def trace_steps(
    run: Run,
    mesh: Mesh,
    batches: Sequence[Batch],
    settings: Settings,
    *,
    device: torch.device,
    note: Choices | None = None,
    repeat: Choices | None = None,
) -> list[StepTrace]:
    """Train on whole `batches` of the same size, of which this rank takes its rows; all ranks of the mesh call it together. Routers'
    choices are added to `note`, or those of `repeat` are made again."""
    built = build(run, mesh, device, on_message=lambda text: None)
    traces = []
    for step, batch in enumerate(batches, 1):
        rows = slice(mesh.at.dp, None, mesh.layout.dp)
        own = Batch(inputs=batch.inputs[rows], labels=batch.labels[rows], sizes=batch.sizes[rows])
        with ExitStack() as choosing:
            if note is not None:
                choosing.enter_context(note.noting(built.model))
            if repeat is not None:
                choosing.enter_context(repeat.repeated(built.model, step - 1))
            sums, load = accumulate(built, own, settings=settings, train=run.train, document_mask=run.data.document_mask)
        gradients = tuple(held for bucket in built.parameters.updated() for held in _held(bucket.gradients()))
        result = update(built, sums, load, settings=settings, step=step)
        traces.append(
            StepTrace(
                losses=(result.loss, result.main_loss, result.mtp_loss, result.balance_loss),
                gradient_norm=result.gradient_norm,
                gradients=gradients,
                weights=(*(held for bucket in built.parameters.buckets for held in _held(bucket.parts(bucket.master))), *_biases(built)),
            )
        )
    return traces


@dataclass(frozen=True)
class Reference:
    """The single device's traces: in fp32, and for a run in bf16 also in bf16, with the choices that both made and a layout is to make."""

    exact: list[StepTrace]
    rounded: list[StepTrace] | None
    choices: Choices | None


def trace_reference(run: Run, batches: Sequence[Batch], settings: Settings, *, device: torch.device) -> Reference:
    """What one device computes."""
    exact, own = (
        replace(run, layout=Layout(), train=replace(run.train, precision=precision)) for precision in ("fp32", run.train.precision)
    )
    if own == exact:
        return Reference(trace_steps(exact, single(), batches, settings, device=device), None, None)
    choices = Choices()
    traces = trace_steps(exact, single(), batches, settings, device=device, note=choices)
    return Reference(traces, trace_steps(own, single(), batches, settings, device=device, repeat=choices), choices)


def judge(reference: Reference, ranks: Sequence[Sequence[StepTrace]]) -> list[Row]:
    """The traces of all ranks of a layout against the single device, with the tolerances of their precision."""
    rows = compare(reference.exact, ranks, tolerance=TOLERANCE)
    if reference.rounded is None:
        return rows
    own = compare(reference.exact, [reference.rounded], tolerance=TOLERANCE)
    worst: dict[tuple[int, str], float] = {}
    for row in own:
        worst[row.step, row.what] = max(row.error, worst.get((row.step, row.what), 0.0))

    def tolerance(row: Row) -> float:
        margin = BF16_GRADIENT_MARGIN if row.what == "gradient" else BF16_MARGIN
        return min(BF16_FACTOR * worst[row.step, row.what] + margin, BF16_MOST)

    return [replace(row, tolerance=tolerance(row)) for row in rows]


def compare(reference: Sequence[StepTrace], ranks: Sequence[Sequence[StepTrace]], *, tolerance: float) -> list[Row]:
    """The single device's trace against those of all ranks of a layout, in the order of the model's parameters."""
    rows: list[Row] = []
    for i, expected in enumerate(reference):
        found = [traces[i] for traces in ranks]
        for name, value, index in zip(("total", "main", "mtp", "balance"), expected.losses, range(4), strict=True):
            rows.append(_number(i + 1, f"{name} loss", value, [trace.losses[index] for trace in found], tolerance))
        rows.append(_number(i + 1, "gradient norm", expected.gradient_norm, [trace.gradient_norm for trace in found], tolerance))
        for what in ("gradients", "weights"):
            whole = {held.name: held.values for held in getattr(expected, what)}
            pieces = [(rank, held) for rank, trace in enumerate(found) for held in getattr(trace, what)]
            # An update of AdamW divides by the root of the second moment, so where that is tiny the sign of rounding noise moves a weight
            # by the learning rate; a weight's error is therefore taken against the weight, which such noise hardly moves.
            rows += [_tensor(i + 1, what.removesuffix("s"), name, values, pieces, tolerance) for name, values in whole.items()]
            known = {held.name for _, held in pieces}
            rows += [Row(i + 1, what.removesuffix("s"), name, math.inf, tolerance, None) for name in sorted(known - whole.keys())]
    return rows


def trace_rank(run: Run, batches: Sequence[Batch], settings: Settings, choices: Choices | None) -> list[StepTrace]:
    """`trace_steps`, with the reference's choices, in a process that a launcher started as one of the layout's ranks."""
    device = machine.prepare(run.train)
    with joined(run.layout, about={}, device=device, seconds=run.train.rank_timeout) as ranks:
        return trace_steps(run, ranks.mesh, batches, settings, device=device, repeat=choices)


def trace_reference_here(run: Run, batches: Sequence[Batch], settings: Settings) -> Reference:
    """`trace_reference` on the device of the run's recipe."""
    return trace_reference(run, batches, settings, device=machine.prepare(run.train))


def first_failure(rows: Iterable[Row]) -> Row | None:
    """The first comparison that failed: of the first step in which any did."""
    return next((row for row in rows if not row.passed), None)


def _number(step: int, what: str, expected: float, found: Sequence[float], tolerance: float) -> Row:
    errors = [abs(value - expected) / max(abs(expected), 1e-12) if value != expected else 0.0 for value in found]
    rank = max(range(len(errors)), key=lambda r: math.inf if math.isnan(errors[r]) else errors[r])
    return Row(step, what, "", errors[rank], tolerance, rank)


def _tensor(step: int, what: str, name: str, expected: Tensor, pieces: list[tuple[int, Held]], tolerance: float) -> Row:
    """The pieces of `name`, put together, against the whole; several ranks may hold the same, and each must be right."""
    scale = max(float(expected.norm()), 1e-12)
    covered = torch.zeros(expected.shape, dtype=torch.bool)
    worst, worst_rank, squares = 0.0, None, torch.zeros(expected.shape, dtype=torch.float64)
    for rank, held in pieces:
        if held.name != name:
            continue
        box = tuple(slice(begin, begin + size) for begin, size in zip(held.offsets, held.values.shape, strict=True))
        difference = (held.values.double() - expected[box].double()).square()
        covered[box] = True
        squares[box] = torch.maximum(squares[box], difference)
        off = float(difference.sum())
        if worst_rank is None or off > worst or math.isnan(off):
            worst, worst_rank = off, rank
    error = float(squares.sum().sqrt()) / scale if bool(covered.all()) else math.inf
    return Row(step, what, name, error, tolerance, worst_rank)


def _held(parts: Iterable[Part]) -> Iterator[Held]:
    """This rank's pieces of gradients or masters."""
    for part in parts:
        box = part.piece.box
        for offsets, values in boxes_of(box, [(part.begin, part.end, part.values)]):
            yield Held(part.piece.name, box.shape, offsets, values.clone())


def _biases(built: Built) -> Iterator[Held]:
    for name, buffer in built.model.named_buffers():
        yield Held(name, tuple(buffer.shape), (0,) * buffer.ndim, buffer.clone())
