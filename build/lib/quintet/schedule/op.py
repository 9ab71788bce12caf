"""The unit of pipeline work, and the one place that says what must have happened before it.

    2F0         forward of stage 2 on micro-batch 0
    2B0         its full backward: the gradients of input and weights
    2I0 2W0     the same in two halves: input gradient, which stage 1 waits for, and weight gradient, which nobody waits for
    (2F5;5B3)   an overlapped pair: one op that holds two, run as a forward in whose all-to-alls the backward computes, and the reverse
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

Kind = Literal["F", "B", "I", "W"]

UPSTREAM: dict[Kind, int] = {"F": -1, "B": +1, "I": +1}
"""Where an op's input comes from, as a step in stages: activations from the stage before, gradients from the stage after. W needs none."""


class Op(NamedTuple):
    """Work of one kind, of one stage, on one micro-batch."""

    kind: Kind
    stage: int
    microbatch: int

    @property
    def ops(self) -> tuple[Op, ...]:
        """The op itself, as a pair has two."""
        return (self,)

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


class Pair(NamedTuple):
    """A forward and a full backward that run as one, on different micro-batches."""

    forward: Op
    backward: Op

    @property
    def kind(self) -> Literal["FB"]:
        """The name of its handler."""
        return "FB"

    @property
    def ops(self) -> tuple[Op, ...]:
        """Both ops."""
        return (self.forward, self.backward)

    def __str__(self) -> str:
        return f"({self.forward};{self.backward})"


Work: TypeAlias = Op | Pair
"""What stands in a schedule's table."""


def does(work: Work) -> tuple[Op, ...]:
    """What has happened once `work` is done, in the kinds F, I and W: a full backward does both halves."""
    return tuple(
        done
        for kind, stage, microbatch in work.ops
        for done in (
            (Op("I", stage, microbatch), Op("W", stage, microbatch)) if kind == "B" else (Op(kind, stage, microbatch),)
        )
    )  # fmt: skip


def needs(work: Work, *, num_stages: int) -> tuple[Op, ...]:
    """What must have happened before `work`, in the kinds F, I and W, as `does` tells it.

    A forward needs the stage before. A backward needs its own forward and the stage after. A weight gradient needs its own input gradient.
    """
    found: list[Op] = []
    for kind, stage, microbatch in work.ops:
        if kind != "F":
            found.append(Op("I" if kind == "W" else "F", stage, microbatch))
        if kind != "W" and 0 <= stage + UPSTREAM[kind] < num_stages:
            found.append(Op("F" if kind == "F" else "I", stage + UPSTREAM[kind], microbatch))
    return tuple(found)
