"""The stages of a model that lie on this rank, as work that a pipeline runs.

A stage keeps of each micro-batch, from forward to backward, its input and autograd's edge of its output, not the output itself: that is
freed as soon as it has left. Every rank of a pipeline reads the micro-batches for itself, so tokens, labels and documents need no
messages; what travels is [B, S, D] of this rank's tokens, in the precision that training has.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from quintet.cost.balance import part_at
from quintet.cost.pipeline import schedule_of
from quintet.model.crossing import Aside, Crossing, Steps, begin
from quintet.model.loss import Loss, Weights, share_of_loss
from quintet.model.transformer import Transformer
from quintet.ops.deferred import WeightGradients, putting_off
from quintet.parallel.collectives import all_reduce
from quintet.parallel.pipeline import Pipeline, Turns
from quintet.parallel.recorder import Recorder
from quintet.parallel.zero import ShardedParameters
from quintet.schedule import check, fewest_microbatches, forward_only
from quintet.schedule.lower import Program, add_transfers
from quintet.schedule.op import Op, Work
from quintet.spec.layout import Layout
from quintet.spec.stage import Stage

_STEPS = 16
"""Steps whose times count when stages are cut anew."""


@dataclass(frozen=True)
class MicroBatch:
    """This rank's part of some sequences: inputs [B, S], targets [M+1, B, S] (see model.loss); document_ids [B, S cp] of the whole ones, or
    None."""

    inputs: Tensor
    targets: Tensor
    document_ids: Tensor | None

    def empty(self) -> MicroBatch:
        """The same without sequences."""
        return MicroBatch(self.inputs[:0], self.targets[:, :0], None if self.document_ids is None else self.document_ids[:0])


@dataclass(frozen=True, kw_only=True)
class Context:
    """What all micro-batches of a step have in common; see `model.loss.training_loss`."""

    positions: Tensor
    weights: Weights
    num_targets: Sequence[int]
    num_sequences: int
    chunk: int


@dataclass(frozen=True)
class Segment:
    """A part of a stage's graph that was cut off: the edges of its outputs, and the leaves in their place at which the next part begins."""

    edges: list[GradientEdge]
    leaves: list[Tensor]

    def gradients(self) -> list[Tensor]:
        """What backward left at the leaves."""
        return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self.leaves]


@dataclass(frozen=True)
class Kept:
    """Of a micro-batch between forward and backward: the stage's input, the parts that were cut off, and the edges of the last one, that
    of the output (not at the last stage) and that of the stage's share of the loss (if it has one)."""

    x: Tensor | None
    segments: list[Segment]
    edges: list[GradientEdge]
    has_loss: bool


@dataclass
class ModelStage:
    """One stage of the model, through the micro-batches of a step."""

    model: Transformer
    stage: Stage
    parameters: ShardedParameters
    micro_batches: Sequence[MicroBatch]
    context: Context
    losses: list[Loss]
    """Gets this stage's share of each micro-batch's loss."""
    tokens_per_rank: int
    """Tokens of a sequence that a rank holds between products that tp splits."""
    kept: dict[int, Kept] = field(default_factory=dict)
    later: dict[int, WeightGradients] = field(default_factory=dict)

    def room(self, microbatch: int) -> Tensor:
        """[B, s, D] in the weights' type and on their device."""
        like = next(self.model.parameters())
        return like.new_empty(self.micro_batches[microbatch].inputs.shape[0], self.tokens_per_rank, self.model.model.hidden_size)

    def forward(self, microbatch: int, x: Tensor | None) -> Turns[Tensor | None]:
        """x [B, s, D], None at the first stage -> the same, None at the last; without gradients wanted nothing is kept."""
        training = torch.is_grad_enabled()
        if x is not None and training:
            x.requires_grad_()
        segments: list[Segment] = []
        begun = begin(self._steps(self.micro_batches[microbatch], x))
        while isinstance(begun, Aside):
            crossing = begun.crossing
            if training:
                crossing, segment = cut(crossing)
                segments.append(segment)
            yield
            begun = begun.resume(crossing)
        y, loss = begun.result
        self.losses.append(replace(loss, total=loss.total.detach()))
        if training:
            has_loss = loss.total.requires_grad
            edges = [get_gradient_edge(out) for out, here in ((y, not self.stage.last), (loss.total, has_loss)) if here]
            self.kept[microbatch] = Kept(x, segments, edges, has_loss)
        return None if self.stage.last else y.detach()

    def backward(self, microbatch: int, gradient: Tensor | None, *, put_off: bool) -> Turns[Tensor | None]:
        """gradient [B, s, D] of the stage's output, None at the last stage -> that of its input, None at the first."""
        kept = self.kept.pop(microbatch)
        one = [torch.ones((), device=self.context.positions.device)] if kept.has_loss else []
        if put_off:
            self.later[microbatch] = WeightGradients()
        self._backward(microbatch, kept.edges, one if gradient is None else [gradient, *one])
        while kept.segments:
            yield
            segment = kept.segments.pop()
            self._backward(microbatch, segment.edges, segment.gradients())
        return None if kept.x is None else kept.x.grad

    def weights(self, microbatch: int) -> None:
        """What `backward` put off."""
        self.later.pop(microbatch).run(self.parameters.take)

    def _steps(self, at: MicroBatch, x: Tensor | None) -> Steps[tuple[Tensor, Loss]]:
        """The stage's output (of the last stage: behind the last layer) and share of the loss."""
        model, stage, context = self.model, self.stage, self.context
        turn = model.turn(at.inputs, context.positions)
        y, moe = yield from model.through(model.embed(at.inputs) if x is None else x, stage.layers, turn, at.document_ids)
        hidden: tuple[Tensor, ...] = ()
        if stage.last:
            hidden, more = yield from model.finish(y, at.targets if context.weights.mtp else None, turn, at.document_ids)
            moe |= more
        loss = share_of_loss(
            model,
            hidden,
            moe,
            at.targets,
            weights=context.weights,
            num_targets=context.num_targets,
            num_sequences=context.num_sequences,
            chunk=context.chunk,
        )
        return y, loss

    def _backward(self, microbatch: int, edges: list[GradientEdge], gradients: list[Tensor]) -> None:
        later = self.later.get(microbatch)
        with nullcontext() if later is None else putting_off(later):
            torch.autograd.backward(edges, gradients)


def cut(crossing: Crossing) -> tuple[Crossing, Segment]:
    """What lives on beyond a crossing -> the same, with a graph of its own, and where that was cut off."""
    leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in crossing]
    pairs = [(tensor, leaf) for tensor, leaf in zip(crossing, leaves, strict=True) if leaf.requires_grad]
    return tuple(leaves), Segment([get_gradient_edge(tensor) for tensor, _ in pairs], [leaf for _, leaf in pairs])


class ModelPipeline:
    """This rank's stages of a model, and the schedules that they run by."""

    def __init__(self, model: Transformer, parameters: ShardedParameters, recorder: Recorder | None = None) -> None:
        mesh = parameters.mesh
        self.model, self.parameters, self.mesh, self.layout = model, parameters, mesh, mesh.layout
        self.recorder = recorder or Recorder(mesh.rank, mesh["pp"].ranks)
        self._spent: deque[dict[int, float]] = deque(maxlen=_STEPS)
        self.stages = dict(
            zip(mesh.layout.stages_at(mesh.at.pp), part_at(model.model, mesh.layout, mesh.at.pp).stages, strict=True)
        )

    def train(self, micro_batches: Sequence[MicroBatch], context: Context) -> list[Loss]:
        """Forward and backward of a step's micro-batches, as many as `Layout.num_microbatches` says -> this rank's shares of the losses."""
        losses = self._run(program(self.layout, len(micro_batches)), micro_batches, context)
        self._spent.append(seconds_by_stage(self.recorder.times))
        return losses

    def forget_times(self) -> None:
        """The steps so far do not count in `stage_seconds`: other ones follow."""
        self._spent.clear()

    def stage_seconds(self) -> list[float] | None:
        """Seconds that each stage takes forward and backward, for a micro-batch: the median of the last steps, the mean of the ranks that
        hold it. None where a stage was never seen outside of pairs. All ranks call it together and get the same."""
        own = torch.zeros(self.layout.num_stages, 2, dtype=torch.float64)
        for stage in self.stages:
            if seen := [spent[stage] for spent in self._spent if stage in spent]:
                own[stage] = torch.tensor((statistics.median(seen), 1.0))
        total, count = all_reduce(own.to(next(self.model.parameters()).device), self.mesh["world"]).cpu().unbind(1)
        return (total / count).tolist() if bool((count > 0).all()) else None

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch], context: Context) -> list[Loss]:
        """Forward alone, of any number of micro-batches."""
        fewest = fewest_microbatches(self.layout.schedule_for(len(micro_batches)), self.layout.pp)
        missing = max(fewest - len(micro_batches), 0)
        missing += (len(micro_batches) + missing) % 2 if self.layout.arrangement == "mirror" else 0
        micro_batches = [*micro_batches, *[micro_batches[0].empty()] * missing]
        return self._run(program(self.layout, len(micro_batches), evaluation=True), micro_batches, context)

    def _run(self, program: Program, micro_batches: Sequence[MicroBatch], context: Context) -> list[Loss]:
        losses: list[Loss] = []
        tokens_per_rank = micro_batches[0].inputs.shape[1] // self.layout.tp
        works = {
            number: ModelStage(self.model, stage, self.parameters, micro_batches, context, losses, tokens_per_rank)
            for number, stage in self.stages.items()
        }
        Pipeline(self.mesh["pp"], works, self.recorder).run(program)
        return losses


def seconds_by_stage(times: Sequence[tuple[Work, float, float]]) -> dict[int, float]:
    """When ops of a row began and ended -> seconds of a stage's forward and backward, from their medians outside of pairs."""
    spent: dict[tuple[str, int], list[float]] = {}
    for work, started, ended in times:
        if isinstance(work, Op):
            spent.setdefault((work.kind, work.stage), []).append(ended - started)
    median = {key: statistics.median(seconds) for key, seconds in spent.items()}
    found = {}
    for kind, stage in median:
        halves = [median.get((half, stage)) for half in ("I", "W")]
        whole = median.get(("B", stage)) or (sum(filter(None, halves)) if all(halves) else None)
        if kind == "F" and whole is not None:
            found[stage] = median[kind, stage] + whole
    return found


@lru_cache
def program(layout: Layout, num_microbatches: int, *, evaluation: bool = False) -> Program:
    """The layout's schedule for so many micro-batches, checked and lowered. Raises SpecError where they are too few."""
    schedule = schedule_of(layout, num_microbatches)
    assert [layout.stages_at(place) for place in range(layout.pp)] == [
        tuple(sorted(stage for _, stage in held)) for held in schedule.stages
    ], layout
    return add_transfers(forward_only(schedule)) if evaluation else check(schedule).program
