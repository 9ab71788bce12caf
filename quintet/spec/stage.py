"""Which part of the model a pipeline stage holds: for now layers are shared out evenly by number, whatever each of them costs."""

from __future__ import annotations

from dataclasses import dataclass

from quintet.spec.layout import Layout
from quintet.spec.model import Model


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A run of layers, and what stands before and behind them."""

    layers: range
    """Numbers of its layers in the main model."""
    embedding: bool
    """The token embedding: the first stage looks tokens up, MTP modules again, and tied weights are also the head."""
    head: bool
    """Last norm, and the head where it has weights of its own."""
    mtp: bool
    """The MTP modules."""

    def holds(self, name: str) -> bool:
        """Whether the parameter or module `name`, as it is called in the model, lies here."""
        first, *rest = name.split(".")
        if first == "layers" and rest:
            return int(rest[0]) in self.layers
        return {"embed": self.embedding, "mtp": self.mtp}.get(first, self.head)


def stage_of(model: Model, layout: Layout, index: int) -> Stage:
    """Stage `index` of layout.pp. Provisional: the cut that pipelines will train with weighs layers by what they cost."""
    begin, end = (place * model.num_layers // layout.pp for place in (index, index + 1))
    last = index == layout.pp - 1
    reads_tokens = index == 0 or (last and (model.num_mtp_modules > 0 or model.tie_embeddings))
    return Stage(layers=range(begin, end), embedding=reads_tokens, head=last, mtp=last)
