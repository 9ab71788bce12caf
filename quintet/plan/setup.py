"""What the planner estimates: a transformer, a layout, a schedule and a policy; from a run, or from what a paper tells."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from quintet.cost.architecture import Architecture, of_model
from quintet.errors import SpecError
from quintet.plan.software import Software
from quintet.spec.layout import Layout, PipelineName
from quintet.spec.model import Model
from quintet.spec.run import Recompute, Run, Train

Precision = Literal["fp32", "bf16", "fp8", "nvfp4"]
SIZE: dict[str, float] = {"fp32": 4, "bf16": 2, "fp8": 1, "nvfp4": 0.5625}
"""Bytes of an element in a product; nvfp4 has a scale for each 16."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One training step of a transformer on a layout."""

    architecture: Architecture
    layout: Layout
    sequence_length: int
    batch_sequences: int
    """Of a step, on all ranks."""
    micro_batch: int = 1
    precision: Precision = "bf16"
    recompute: Recompute = "none"
    recompute_share: float = 1.0
    """Share of the layers that recompute, for systems that can choose."""
    moments_bytes: int = 4
    """Of each of the two moments."""
    gradient_bytes: int = 4
    """Of a gradient that is reduced."""
    mtp: bool = True
    """Whether MTP modules run."""
    megatron: bool = False
    """Whether experts lie as in Megatron: over neighbouring ranks if they are whole; if tp splits them, rows are gathered over tp behind
    the all-to-all, instead of tokens before it, as here."""
    loss_chunk: int | None = None
    """Tokens whose logits exist at a time; None: all of a micro-batch."""
    model: Model | None = None
    """Quintet's own model, whose activations `cost.activations` counts as its runtime keeps them; None: another system's transformer."""
    software: Software = field(default_factory=lambda: Software(name="plain"))

    def __post_init__(self) -> None:
        if self.layout.pp > self.architecture.num_layers:
            raise SpecError(f"layout.pp ({self.layout.pp}) must be at most num_layers ({self.architecture.num_layers})")
        if self.batch_sequences < self.layout.dp * self.micro_batch:
            raise SpecError(
                f"a step has {self.batch_sequences} sequences, but layout.dp ({self.layout.dp}) x micro_batch ({self.micro_batch}) takes "
                f"{self.layout.dp * self.micro_batch}; use fewer replicas, smaller micro-batches or a larger batch"
            )

    @cached_property
    def num_microbatches(self) -> int:
        """Micro-batches of a replica in a step."""
        return self.layout.num_microbatches(self.batch_sequences, self.micro_batch)

    @cached_property
    def schedule(self) -> PipelineName:
        """The layout's pipeline schedule; without stages the plainest, where it makes no difference."""
        return self.layout.schedule_for(self.num_microbatches) if self.layout.pp > 1 else "1f1b"

    @cached_property
    def chunks(self) -> int:
        """Stages of each rank."""
        return self.layout.num_stages // self.layout.pp

    @cached_property
    def tokens(self) -> int:
        """Of a micro-batch, on the ranks of one tp group."""
        return self.micro_batch * self.sequence_length // self.layout.cp

    @cached_property
    def replicas(self) -> int:
        """Ranks, at one place of tp, that hold the same weights: with DualPipe those of two places of the pipeline."""
        return self.layout.num_replicas * (2 if self.layout.arrangement == "mirror" else 1)

    @cached_property
    def expert_replicas(self) -> int:
        """Ranks that hold the same part of the same experts."""
        return max(1, self.replicas * self.layout.tp // (self.layout.ep * self.layout.expert_tp))

    @cached_property
    def policy(self) -> Train | None:
        """How Quintet would train the micro-batches, where it can: its own model, in fp32 or bf16."""
        if self.model is None or self.precision not in ("fp32", "bf16"):
            return None
        precision: Any = self.precision
        chunk = self.loss_chunk or self.tokens
        return Train(micro_batch=self.micro_batch, precision=precision, recompute=self.recompute, loss_chunk=chunk)

    @cached_property
    def num_mtp(self) -> int:
        """MTP modules that run."""
        return self.architecture.num_mtp_modules if self.mtp else 0


def of_run(run: Run, *, software: Software, batch_sequences: int, precision: Precision) -> Setup:
    """The step of a run's longest phase."""
    return Setup(
        architecture=of_model(run.model),
        layout=run.layout,
        sequence_length=run.phases[0].sequence_length,
        batch_sequences=batch_sequences,
        micro_batch=run.train.micro_batch,
        precision=precision,
        recompute=run.train.recompute,
        moments_bytes=2 if run.optimizer.moments == "bf16" else 4,
        loss_chunk=run.train.loss_chunk,
        model=run.model,
        software=software,
    )
