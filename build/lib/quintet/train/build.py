"""From a recipe to this rank's part of a model and its optimizer on a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quintet.model.transformer import Transformer, initial_values
from quintet.ops.pointwise import REFERENCE, Kernels, can_compile, fused
from quintet.parallel.bucket import Piece
from quintet.parallel.mesh import Mesh
from quintet.parallel.parallelize import parallelize
from quintet.parallel.recorder import Recorder
from quintet.parallel.stages import ModelPipeline
from quintet.parallel.zero import ShardedParameters
from quintet.spec.run import Run
from quintet.train.optimizer import AdamW


@dataclass(frozen=True)
class Built:
    """What a step works on."""

    model: Transformer
    parameters: ShardedParameters
    optimizer: AdamW
    pipeline: ModelPipeline | None = None
    """How a step goes through this rank's stages, where the model is cut into any."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.model.parameters()).device

    @property
    def mesh(self) -> Mesh:
        """This rank's groups."""
        return self.parameters.mesh


def build(
    run: Run,
    mesh: Mesh,
    device: torch.device,
    *,
    on_message: Callable[[str], None],
    recorder: Recorder | None = None,
    drawn: bool = True,
) -> Built:
    """The model of the recipe with random weights, or, if not `drawn`, with any, which a checkpoint then replaces; and an optimizer without
    history. `recorder` notes what a pipeline does."""
    with torch.device("meta"):
        model = Transformer(run.model, kernels=kernels(run, device, on_message=on_message))
    parameters = parallelize(model, mesh, run.train, device=device)

    def values(piece: Piece) -> Tensor:
        return initial_values(run.model, piece.name, piece.box, seed=run.seed)

    if drawn:
        with torch.no_grad():
            parameters.fill(values)
    pipeline = ModelPipeline(model, parameters, recorder) if mesh.layout.pp > 1 else None
    return Built(model, parameters, AdamW(parameters, run.optimizer), pipeline)


def kernels(run: Run, device: torch.device, *, on_message: Callable[[str], None]) -> Kernels:
    """Fused element-wise functions where the recipe wants them and the machine can compile."""
    if not run.train.compile:
        return REFERENCE
    if can_compile(device):
        on_message("compiling fused functions in the first step: half a minute the first time, seconds when they are cached")
        return fused()
    on_message("no C++ compiler: training runs without fused functions, more slowly; see: quintet doctor")
    return REFERENCE
