"""From a recipe to a model and its optimizer on a device."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from quintet.errors import UsageError
from quintet.model.transformer import Transformer
from quintet.ops.pointwise import REFERENCE, Kernels, can_compile, fused
from quintet.spec.run import Run
from quintet.train.optimizer import AdamW
from quintet.train.precision import cast


def refuse_many_devices(run: Run) -> None:
    """Raise UsageError where recipe or launcher asks for more than one device, which this version does not train on."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if run.layout.num_ranks > 1 or ranks > 1:
        raise UsageError(
            f"the layout takes {run.layout.num_ranks} devices and {ranks} processes were started, but training on several devices is not "
            "there yet; set every degree of layout to 1 and start one process, or look at the run with --dry-run"
        )


def build(
    run: Run, device: torch.device, *, on_message: Callable[[str], None], weights: Mapping[str, Tensor] | None = None
) -> tuple[Transformer, AdamW]:
    """The model of the recipe with random weights, or with `weights` by parameter name, and an optimizer without history."""
    model = Transformer(run.model, kernels=kernels(run, device, on_message=on_message))
    if weights is None:
        model.initialize(run.seed)
    else:
        model.load_state_dict(weights)
    model.to(device)
    parameters, masters = cast(model, run.train.precision)
    model.set_recompute(run.train.recompute)
    return model, AdamW(parameters, masters, run.optimizer)


def kernels(run: Run, device: torch.device, *, on_message: Callable[[str], None]) -> Kernels:
    """Fused element-wise functions where the recipe wants them and the machine can compile."""
    if not run.train.compile:
        return REFERENCE
    if can_compile(device):
        on_message("compiling fused functions in the first step: half a minute the first time, seconds when they are cached")
        return fused()
    on_message("no C++ compiler: training runs without fused functions, more slowly; see: quintet doctor")
    return REFERENCE
