"""Writes a rank's row from phases such as `("I1 W1 F1", 3)`: the pattern says what to do, the writer knows which micro-batch is next.

A token is a kind and a queue: F0 takes the next forward of queue 0, B0 or I0 its next backward, W0 the oldest weight gradient that an I0
has put off, W the oldest of all queues, and F0&B1 a pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from quintet.schedule.op import Kind, Op, Pair, Work

Place = tuple[int, int]
"""A stage and a micro-batch."""


class Writer:
    """A row in the making. `forwards` and `backwards` hold, per queue, the places in the order they are to be worked on."""

    def __init__(self, forwards: dict[str, Iterable[Place]], backwards: dict[str, Iterable[Place]]) -> None:
        self.row: list[Work] = []
        self._forwards: dict[str, Iterator[Place]] = {name: iter(places) for name, places in forwards.items()}
        self._backwards: dict[str, Iterator[Place]] = {name: iter(places) for name, places in backwards.items()}
        self._put_off: list[tuple[str, Op]] = []

    def write(self, pattern: str, times: int = 1) -> None:
        """Append the pattern's ops `times` times."""
        tokens = pattern.split()
        for _ in range(times):
            for token in tokens:
                if "&" in token:
                    forward, _, backward = token.partition("&")
                    self.row.append(Pair(self._op(forward), self._op(backward)))
                else:
                    self.row.append(self._op(token))

    def finish(self) -> tuple[Work, ...]:
        """Append every weight gradient that is still put off, and return the row."""
        self.write("W", times=len(self._put_off))
        return tuple(self.row)

    def _op(self, token: str) -> Op:
        kind: Kind = token[0]  # type: ignore[assignment]
        queue = token[1:]
        if kind == "W":
            found = next(i for i, (name, _) in enumerate(self._put_off) if queue in ("", name))
            return self._put_off.pop(found)[1]
        stage, microbatch = next((self._forwards if kind == "F" else self._backwards)[queue])
        if kind == "I":
            self._put_off.append((queue, Op("W", stage, microbatch)))
        return Op(kind, stage, microbatch)


def places(stage: int, microbatches: Sequence[int]) -> list[Place]:
    """One stage's micro-batches in order."""
    return [(stage, microbatch) for microbatch in microbatches]
