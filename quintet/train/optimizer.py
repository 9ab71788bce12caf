"""AdamW over fp32 master weights, with decay groups, clipping by the global norm, and gradients summed in fp32 (V3 4.2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from quintet.errors import CheckpointError
from quintet.spec import run as spec


@dataclass
class _Slot:
    """One parameter's share of the optimizer: master [shape] fp32 (the parameter itself in fp32 runs) and two moments."""

    parameter: nn.Parameter
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    decay: bool
    gradient: Tensor | None = None


class AdamW:
    """Owns the gradients: backward's are moved out of `.grad` as they come, so that several micro-batches add up in fp32."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], masters: Mapping[str, Tensor], settings: spec.Optimizer) -> None:
        """`masters` holds the fp32 values of rounded parameters; see `train.precision.cast`."""
        self.settings = settings
        self.num_steps = 0
        self.slots: dict[str, _Slot] = {}
        for name, parameter in parameters:
            master = masters.get(name, parameter.detach())
            # Vectors (norm scales) are not decayed: there is nothing to regularise in a scale.
            self.slots[name] = _Slot(parameter, master, torch.zeros_like(master), torch.zeros_like(master), decay=parameter.ndim >= 2)

    def collect(self, *, alone: bool) -> None:
        """Take over the gradients of a micro-batch's backward; `alone` says that it is the step's only one."""
        for slot in self.slots.values():
            fresh, slot.parameter.grad = slot.parameter.grad, None
            if fresh is None:
                continue
            if slot.gradient is not None:
                slot.gradient += fresh
            else:
                # A lone micro-batch needs no sum: its gradient is converted when it is used.
                slot.gradient = fresh if alone else fresh.float()

    def discard(self) -> None:
        """Forget the gradients that were collected."""
        for slot in self.slots.values():
            slot.gradient = None

    def gradient_norm(self) -> Tensor:
        """Euclidean norm of all gradients together, in fp32: a scalar."""
        gradients = [slot.gradient for slot in self.slots.values() if slot.gradient is not None]
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_norm: Tensor) -> None:
        """Clip to the largest norm, update the masters, and round them to the parameters. Consumes the gradients."""
        self.num_steps += 1
        scale = (self.settings.clip_norm / (gradient_norm + 1e-6)).clamp(max=1.0)
        count = torch.tensor(float(self.num_steps))
        for slot in self.slots.values():
            if slot.gradient is None:
                continue
            gradient = slot.gradient.float().mul_(scale)
            slot.gradient = None
            adamw(
                [slot.master],
                [gradient],
                [slot.exp_avg],
                [slot.exp_avg_sq],
                [],
                # The kernel adds one to the count before it corrects the bias.
                [count.to(slot.master.device) - 1],
                fused=True,
                amsgrad=False,
                beta1=self.settings.beta1,
                beta2=self.settings.beta2,
                lr=learning_rate,
                weight_decay=self.settings.weight_decay if slot.decay else 0.0,
                eps=self.settings.eps,
                maximize=False,
            )
            if slot.master.dtype != slot.parameter.dtype:
                slot.parameter.copy_(slot.master)

    def state(self) -> dict[str, Tensor]:
        """The tensors that a resume needs, by name; they are the live ones, to be copied or written at once."""
        state: dict[str, Tensor] = {}
        for name, slot in self.slots.items():
            state[f"exp_avg.{name}"], state[f"exp_avg_sq.{name}"] = slot.exp_avg, slot.exp_avg_sq
            if slot.master.dtype != slot.parameter.dtype:
                state[f"master.{name}"] = slot.master
        return state

    def restore_count(self, num_steps: int) -> None:
        """Continue the bias correction after `num_steps` updates; the tensors of `state` are filled in place by the loader."""
        if num_steps < 0:
            raise CheckpointError(f"the optimizer's step count ({num_steps}) is negative")
        self.num_steps = num_steps
