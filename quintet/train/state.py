"""What a resume needs, and nothing else: weights, optimizer, place in the curriculum, data order, random numbers.

Of these only the host's: training draws nothing on a device, whose generator's state would tie a checkpoint to it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from quintet.checkpoint.background import Saver
from quintet.checkpoint.load import LOSS, load, none_whole
from quintet.checkpoint.pieces import Pieces, run_of_boxes
from quintet.checkpoint.place import Place
from quintet.checkpoint.retention import prune
from quintet.checkpoint.save import save
from quintet.checkpoint.store import Spent
from quintet.errors import CheckpointError, DamagedError
from quintet.parallel.bucket import Bucket
from quintet.spec import parse
from quintet.spec.placement import Box
from quintet.spec.run import Run
from quintet.spec.stage import Part
from quintet.train.build import Built
from quintet.train.directory import RECIPE, TOKENIZER, checkpoints


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands in its curriculum."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens trained on."""
    phase: int = 0
    """Index of the phase that the next step belongs to, or of the last phase at the end."""
    phase_steps: int = 0
    """Steps done of that phase."""
    phase_tokens: int = 0
    """Tokens trained on in that phase."""

    def after_step(self, tokens: int) -> Position:
        """The place behind one more step of `tokens` tokens."""
        return replace(
            self,
            step=self.step + 1,
            tokens=self.tokens + tokens,
            phase_steps=self.phase_steps + 1,
            phase_tokens=self.phase_tokens + tokens,
        )

    def next_phase(self) -> Position:
        """The same place as the beginning of the following phase."""
        return replace(self, phase=self.phase + 1, phase_steps=0, phase_tokens=0)


def tensors(built: Built) -> dict[str, Tensor | Pieces]:
    """The live tensors of model and optimizer by their names in a checkpoint: this rank's pieces of those that are spread over ranks."""
    model: dict[str, Tensor | Pieces] = {f"model.{name}": buffer for name, buffer in built.model.named_buffers()}
    optimizer: dict[str, Tensor | Pieces] = {}
    for i, bucket in enumerate(built.parameters.buckets):
        if bucket.keeps_shards:
            model |= _of_shard(bucket, "model", bucket.weight_shard)
        else:
            for piece in bucket.pieces:
                weights = piece.parameter.detach().flatten()
                model[f"model.{piece.name}"] = _pieces(piece.box, [(0, len(weights), weights)], weights.dtype)
        if bucket.master is not bucket.weight_shard:
            optimizer |= _of_shard(bucket, "optimizer.master", bucket.master)
        optimizer |= _of_shard(bucket, "optimizer.exp_avg", built.optimizer.exp_avg[i])
        optimizer |= _of_shard(bucket, "optimizer.exp_avg_sq", built.optimizer.exp_avg_sq[i])
    return {f"model.{name}": model[f"model.{name}"] for name in built.model.state_dict()} | optimizer


def _is_elsewhere(built: Built, name: str) -> bool:
    """Whether a tensor of a checkpoint belongs to a pipeline stage that is not on this rank."""
    if built.pipeline is None:
        return False
    parameter = re.sub(r"model\.|optimizer\.[a-z_]+\.", "", name, count=1)
    return parameter != name and not Part(tuple(built.pipeline.stages.values())).holds(parameter)


def _of_shard(bucket: Bucket, kind: str, shard: Tensor) -> dict[str, Tensor | Pieces]:
    """What a tensor like the bucket's master holds of each of its parameters, which may be nothing."""
    runs = {part.piece.name: [(part.begin, part.end, part.values)] for part in bucket.parts(shard)}
    return {f"{kind}.{piece.name}": _pieces(piece.box, runs.get(piece.name, []), shard.dtype) for piece in bucket.pieces}


def _pieces(box: Box, runs: list[tuple[int, int, Tensor]], dtype: torch.dtype) -> Tensor | Pieces:
    """Runs (begin, end, values [end - begin]) of the elements of a part of a tensor -> the tensor where it is all here, else its pieces."""
    if box.sizes == box.shape and [run[:2] for run in runs] == [(0, math.prod(box.shape))]:
        return runs[0][2].view(box.shape)
    return Pieces(box.shape, boxes_of(box, runs), dtype=dtype)


def boxes_of(box: Box, runs: list[tuple[int, int, Tensor]]) -> list[tuple[tuple[int, ...], Tensor]]:
    """Runs of the elements of a part of a tensor -> global offsets and values of each box that they consist of."""
    boxes = []
    for begin, end, values in runs:
        for offsets, sizes in run_of_boxes(box.sizes, begin, end):
            part, values = values[: math.prod(sizes)], values[math.prod(sizes) :]
            boxes.append((tuple(a + b for a, b in zip(box.offsets, offsets, strict=True)), part.view(sizes)))
    return boxes


def gather(built: Built, data: Mapping[str, int], position: Position, *, loss: float | None = None) -> dict[str, Any]:
    """Everything to be saved, by name: live tensors, and plain values; `data` is the loader's state, `loss` the mean held-out loss where
    it was evaluated at this step."""
    built.parameters.finish_gathering()  # those of other ranks may still be on their way
    state: dict[str, Any] = {**tensors(built), "random.cpu": torch.get_rng_state()}
    return state | {"position": asdict(position), "optimizer_steps": built.optimizer.counts(), "data": dict(data), LOSS: loss}


def rounded(state: Mapping[str, Any]) -> dict[str, str]:
    """Name of each weight -> of the master that it is the rounding of, where it has one."""
    prefix = "optimizer.master."
    return {f"model.{name.removeprefix(prefix)}": name for name in state if name.startswith(prefix)}


def extras(directory: Path, run: Run) -> dict[str, str]:
    """The files that stand beside the tensors of a checkpoint of the run in `directory`."""
    return {RECIPE: parse.dumps(run), TOKENIZER: (directory / TOKENIZER).read_text(encoding="utf-8")}


def saver(directory: Path, run: Run, *, seconds: float) -> Saver:
    """Who saves the run in `directory` beside training; all ranks call it together, and then speak through a group of its own, in which
    one may be silent for so many seconds."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds)) if dist.is_initialized() else None
    return Saver(checkpoints(directory, run), run.checkpoint, group=group)


def write(directory: Path, run: Run, state: dict[str, Any], *, step: int) -> Place:
    """Save a gathered state as a checkpoint of the run in `directory`, with recipe and tokenizer, and drop those not kept."""
    root = checkpoints(directory, run)
    path = save(state, root, step=step, extras=extras(directory, run), rounded=rounded(state), codec=run.checkpoint.codec)
    if not dist.is_initialized() or dist.get_rank() == 0:
        prune(root, run.checkpoint)
    return path


def restore_newest(
    paths: Sequence[Place], built: Built, *, report: Callable[[str], None], spent: Spent | None = None
) -> tuple[Place | None, Position, dict[str, int]]:
    """Restore from the first of some checkpoints that is not damaged, which is returned; None where there are none.

    All ranks call it together: each verifies what it reads, and all pass a checkpoint over if one of them finds damage, which is told to
    `report`. Raises CheckpointError if all are damaged, or for one of another model.
    """
    problems: list[str] = []
    for path in paths:
        try:
            position, data = restore(path, built, spent)
        except DamagedError as error:
            problems.append(f"{path}: {error}")
            continue
        for problem in problems:
            report(f"passed over a damaged checkpoint: {problem}")
        return path, position, data
    if problems:
        raise none_whole(paths[0].parent, problems)
    return None, Position(), {}


def restore(directory: Place, built: Built, spent: Spent | None = None) -> tuple[Position, dict[str, int]]:
    """Fill model, optimizer and random generators from a checkpoint; returns the position and the data's state.

    Raises CheckpointError, with nothing changed, for one of another model; DamagedError, with some tensors filled and some not.
    """
    state: dict[str, Any] = {**tensors(built), "random.cpu": torch.get_rng_state()}
    values = load(
        state | {"position": None, "optimizer_steps": None, "data": None},
        directory,
        elsewhere=lambda name: _is_elsewhere(built, name),
        spent=spent,
    )
    try:
        position = msgspec.convert(values["position"], Position)
        data = msgspec.convert(values["data"], dict[str, int])
        built.optimizer.restore_counts(msgspec.convert(values["optimizer_steps"], dict[str, int]))
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{directory}: position, data or optimizer_steps is not as this version writes it: {error}") from None
    torch.set_rng_state(state["random.cpu"])
    return position, data
