"""Routers' choices, noted in one computation and repeated in another, whichever ranks its tokens lie on.

Rounding tips a router's choice now and then, on one device as on many, and a whole token goes elsewhere: two computations that are both
right then differ by more than rounding. Where the choices of one are repeated in the other, rounding is all that is left.

A token is recognised by what its router sees: among the hidden states that were noted for this router and step the nearest one is the same
token, for rounding moves it by a few per cent and others are farther off than its own length. (Tokens that cannot be told apart, such as
equal ones at the beginnings of two documents, had equal choices.) So neither the order of micro-batches nor who holds which tokens
matters. What is kept of a state are projections in W random directions, which keep distances (Johnson and Lindenstrauss).

Letters: T tokens, D hidden, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quintet.model.transformer import Transformer

_WIDTH = 32
_ROWS = 4096
"""Tokens that are compared with all noted ones at a time."""


@dataclass(frozen=True)
class Seen:
    """What one router saw and chose in one step: projected states [T, W] in fp32, experts [T, K]."""

    states: Tensor
    experts: Tensor


@dataclass
class Choices:
    """The choices of every step, by mixture of experts (numbered as `Transformer.moe_layers` does)."""

    steps: list[dict[int, Seen]] = field(default_factory=list)

    @contextmanager
    def noting(self, model: Transformer) -> Iterator[None]:
        """Note all choices of one more step."""
        heard: dict[int, list[Seen]] = {}

        def note(layer: int) -> Callable[[Tensor, Tensor], Tensor]:
            def decide(x: Tensor, experts: Tensor) -> Tensor:
                heard.setdefault(layer, []).append(Seen(_projected(x), experts.cpu()))
                return experts

            return decide

        with _deciding(model, note):
            yield
        self.steps.append({layer: _together(seen) for layer, seen in heard.items()})

    @contextmanager
    def repeated(self, model: Transformer, step: int) -> Iterator[None]:
        """Choose as in step number `step`, from 0, when the same token went to the same router."""
        noted = self.steps[step]

        def repeat(layer: int) -> Callable[[Tensor, Tensor], Tensor]:
            def decide(x: Tensor, experts: Tensor) -> Tensor:
                rows = [torch.cdist(some, noted[layer].states).argmin(1) for some in _projected(x).split(_ROWS)]
                return noted[layer].experts[torch.cat(rows)].to(experts.device) if len(x) else experts

            return decide

        with _deciding(model, repeat):
            yield


@contextmanager
def _deciding(model: Transformer, decide: Callable[[int], Callable[[Tensor, Tensor], Tensor]]) -> Iterator[None]:
    """Every router of the model asks `decide` of its layer."""
    routers = {layer: mixture.router for layer, mixture in model.moe_layers().items()}
    before = {layer: router.decide for layer, router in routers.items()}
    for layer, router in routers.items():
        router.decide = decide(layer)
    try:
        yield
    finally:
        for layer, router in routers.items():
            router.decide = before[layer]


def _projected(x: Tensor) -> Tensor:
    """x [T, D] -> [T, W], the same directions on every rank."""
    directions = torch.randn(x.shape[1], _WIDTH, generator=torch.Generator().manual_seed(0))
    return x.detach().float().cpu() @ directions


def _together(seen: list[Seen]) -> Seen:
    return Seen(torch.cat([each.states for each in seen]), torch.cat([each.experts for each in seen]))
