"""Where a forward can be set aside: messages are under way, and something else may be computed until they are there.

A part of the model that sends messages in its midst is written in steps, as a generator: there it yields a `Crossing`, every tensor that
lives on beyond that place, and goes on with those that it gets back. `straight` gives the same ones back, which makes an ordinary forward.
Who overlaps one micro-batch with another (parallel.stages) gives back tensors at which a graph of their own begins, and so can run the
backward of each side by itself.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

from torch import Tensor

T = TypeVar("T")

Crossing: TypeAlias = tuple[Tensor, ...]
Steps: TypeAlias = Generator[Crossing, Crossing, T]


@dataclass(frozen=True)
class Aside(Generic[T]):
    """Steps that stand at a crossing."""

    steps: Steps[T]
    crossing: Crossing

    def resume(self, crossing: Crossing) -> Aside[T] | Done[T]:
        """Go on to the next crossing."""
        return _advance(self.steps, crossing)


@dataclass(frozen=True)
class Done(Generic[T]):
    """Steps that are over."""

    result: T


def begin(steps: Steps[T]) -> Aside[T] | Done[T]:
    """Run to the first crossing, here and now: for what must not lie around a crossing, such as a context."""
    return _advance(steps, None)


def carrying(begun: Aside[T] | Done[T], tensors: Crossing) -> Steps[tuple[T, Crossing]]:
    """The rest of steps that were begun, with `tensors`, which are needed behind them, at each crossing -> their result and these."""
    while isinstance(begun, Aside):
        own = len(begun.crossing)
        back = yield (*begun.crossing, *tensors)
        begun, tensors = begun.resume(back[:own]), back[own:]
    return begun.result, tensors


def straight(steps: Steps[T]) -> T:
    """All steps one behind the other -> their result."""
    begun = begin(steps)
    while isinstance(begun, Aside):
        begun = begun.resume(begun.crossing)
    return begun.result


def _advance(steps: Steps[T], crossing: Crossing | None) -> Aside[T] | Done[T]:
    try:
        return Aside(steps, steps.send(crossing))  # type: ignore[arg-type]  # a generator begins with None
    except StopIteration as end:
        return Done(end.value)
