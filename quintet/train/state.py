"""What a resume needs, and nothing else: weights, optimizer, place in the curriculum, data order, random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from quintet.checkpoint.load import load
from quintet.checkpoint.retention import prune
from quintet.checkpoint.save import save
from quintet.errors import CheckpointError
from quintet.model.transformer import Transformer
from quintet.spec import parse
from quintet.spec.run import Run
from quintet.train.directory import CHECKPOINTS, RECIPE, TOKENIZER
from quintet.train.optimizer import AdamW


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


def tensors(model: Transformer, optimizer: AdamW) -> dict[str, Tensor]:
    """The live tensors of model and optimizer by their names in a checkpoint."""
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    return weights | {f"optimizer.{name}": tensor for name, tensor in optimizer.state().items()}


def gather(model: Transformer, optimizer: AdamW, data: Mapping[str, int], position: Position) -> dict[str, Any]:
    """Everything to be saved, by name: live tensors, and plain values; `data` is the loader's state."""
    state: dict[str, Any] = {**tensors(model, optimizer), "random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random.cuda"] = torch.cuda.get_rng_state()
    return state | {"position": asdict(position), "optimizer_steps": optimizer.num_steps, "data": dict(data)}


def write(directory: Path, run: Run, state: dict[str, Any], *, step: int) -> Path:
    """Save a gathered state as a checkpoint of the run in `directory`, with recipe and tokenizer, and drop those not kept."""
    root = directory / CHECKPOINTS
    extras = {RECIPE: parse.dumps(run), TOKENIZER: (directory / TOKENIZER).read_text(encoding="utf-8")}
    path = save(state, root, step=step, extras=extras)
    prune(root, last=run.checkpoint.keep_last, every=run.checkpoint.keep_every)
    return path


def restore(directory: Path, model: Transformer, optimizer: AdamW) -> tuple[Position, dict[str, int]]:
    """Fill model, optimizer and random generators from a checkpoint; returns the position and the data's state.

    Raises CheckpointError, with nothing changed, for a damaged checkpoint or one of another model.
    """
    state: dict[str, Any] = {**tensors(model, optimizer), "random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random.cuda"] = torch.cuda.get_rng_state()
    values = load(state | {"position": None, "optimizer_steps": None, "data": None}, directory)
    try:
        position = msgspec.convert(values["position"], Position)
        data = msgspec.convert(values["data"], dict[str, int])
        optimizer.restore_count(msgspec.convert(values["optimizer_steps"], int))
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{directory}: position, data or optimizer_steps is not as this version writes it: {error}") from None
    torch.set_rng_state(state["random.cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random.cuda"])
    return position, data
