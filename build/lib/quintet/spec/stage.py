"""Which part of the model a pipeline stage holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from quintet.spec.model import Model


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A run of layers, and what stands before and behind them."""

    layers: range
    """Numbers of its layers in the main model."""
    first: bool
    """Looks the tokens up."""
    last: bool
    """Computes the loss: last norm, MTP modules and head."""
    embedding: bool
    """Holds the token embedding: the first stage; and the last for its MTP modules, or where tied weights are also the head."""

    def holds(self, name: str) -> bool:
        """Whether the parameter or module `name`, as it is called in the model, lies here."""
        first, *rest = name.split(".")
        if first == "layers" and rest:
            return int(rest[0]) in self.layers
        return self.embedding if first == "embed" else self.last


@dataclass(frozen=True)
class Part:
    """All stages that lie on one rank."""

    stages: tuple[Stage, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers, ascending."""
        return tuple(sorted(layer for stage in self.stages for layer in stage.layers))

    @property
    def last(self) -> bool:
        """Whether the last stage is among them."""
        return any(stage.last for stage in self.stages)

    @property
    def embedding(self) -> bool:
        """Whether the token embedding is here."""
        return any(stage.embedding for stage in self.stages)

    def holds(self, name: str) -> bool:
        """Whether the parameter or module `name`, as it is called in the model, lies here."""
        return any(stage.holds(name) for stage in self.stages)


def stages_of(model: Model, num_layers: Sequence[int]) -> tuple[Stage, ...]:
    """The stages of a model that is cut into runs of so many layers."""
    ends = [*accumulate(num_layers)]
    last = len(ends) - 1
    return tuple(
        Stage(
            layers=range(end - count, end),
            first=i == 0,
            last=i == last,
            embedding=i == 0 or (i == last and embedding_at_both_ends(model)),
        )
        for i, (end, count) in enumerate(zip(ends, num_layers, strict=True))
    )


def embedding_at_both_ends(model: Model) -> bool:
    """Whether the last stage needs the token embedding too."""
    return model.num_mtp_modules > 0 or model.tie_embeddings
