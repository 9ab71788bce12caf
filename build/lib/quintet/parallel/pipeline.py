"""Runs a lowered pipeline schedule: `for step in row: handlers[step.kind](step)`.

The schedule (`quintet.schedule`) says which rank does what in which order and when messages are issued; what a stage computes, a
`StageWork` says. This file moves tensors between them. An exchange is issued as one batch and not waited for; an op waits for the message
that brings its input, and a sent tensor is kept until it has left. A hand-off between two stages of one rank is no message.

Work on a micro-batch is a generator: it yields whenever messages of its own (experts' all-to-all) are under way and it could do nothing but
wait. Alone it simply goes on, and waits; in an overlapped pair, forward and backward take turns, so that each computes while the
other's messages travel.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor

from quintet.parallel.collectives import Group
from quintet.parallel.recorder import Recorder
from quintet.schedule.lower import Exchange, Program, Step, Transfer
from quintet.schedule.op import UPSTREAM, Op, Pair

T = TypeVar("T")
Turns = Generator[None, None, T]
"""Work that yields while messages of its own are under way."""


class StageWork(Protocol):
    """One stage of what is computed, micro-batch by micro-batch."""

    def room(self, microbatch: int) -> Tensor:
        """A new tensor for what the stage receives: its input, and the gradient of its output, have the same shape and type."""
        ...

    def forward(self, microbatch: int, x: Tensor | None) -> Turns[Tensor | None]:
        """The stage's output from its input, which the first stage does not get and the last one does not give."""
        ...

    def backward(self, microbatch: int, gradient: Tensor | None, *, put_off: bool) -> Turns[Tensor | None]:
        """The gradient of the stage's input from that of its output; with `put_off` those of weights wait for `weights`."""
        ...

    def weights(self, microbatch: int) -> None:
        """The weight gradients that this micro-batch's backward put off."""
        ...


Key = tuple[str, int, int]
"""What ("activation" or "gradient"), the stage that needs it, and the micro-batch."""


@dataclass(frozen=True)
class _Message:
    """Tensors under way, kept until they are there."""

    tensor: Tensor
    work: dist.Work | None

    @property
    def is_over(self) -> bool:
        return self.work is None or self.work.is_completed()


class Pipeline:
    """This rank's place in a pipeline of the ranks of `group`, and the stages that it holds by number."""

    def __init__(self, group: Group, works: Mapping[int, StageWork], recorder: Recorder) -> None:
        self.group, self.works, self.recorder = group, works, recorder
        self.num_stages = 0
        self._arriving: dict[Key, _Message] = {}
        self._made: dict[Key, Tensor] = {}
        """Results that wait to be sent, by what needs them."""
        self._leaving: list[_Message] = []
        self._handlers: dict[str, Callable[..., None]] = {
            "F": self._forward,
            "B": self._backward,
            "I": self._backward,
            "W": self._weights,
            "FB": self._pair,
            "X": self._exchange,
        }

    def run(self, program: Program) -> None:
        """All of this rank's row; raises RankError where another rank does not send what this one waits for."""
        self.schedule = program.schedule
        self.num_stages = program.schedule.num_stages
        row: tuple[Step, ...] = program.rows[self.group.rank]
        self.recorder.begin_row()
        for position, step in enumerate(row):
            self.recorder.begin(step, position)
            with self.recorder.watching():
                self._handlers[step.kind](step)
            self._leaving = [message for message in self._leaving if not message.is_over]
        for message in self._leaving:
            if message.work is not None:
                self.recorder.wait(message.work, "the end of its sends", peers=self.group.ranks)
        self._leaving.clear()
        self.recorder.finish()
        assert not self._arriving and not self._made, (list(self._arriving), list(self._made))

    def _forward(self, op: Op) -> None:
        x = self._input(op)
        with self.recorder.computing(op):
            y = _drained(self.works[op.stage].forward(op.microbatch, x))
        self._deliver(op, y)

    def _backward(self, op: Op) -> None:
        gradient = self._input(op)
        with self.recorder.computing(op):
            result = _drained(self.works[op.stage].backward(op.microbatch, gradient, put_off=op.kind == "I"))
        self._deliver(op, result)

    def _weights(self, op: Op) -> None:
        with self.recorder.computing(op):
            self.works[op.stage].weights(op.microbatch)

    def _pair(self, pair: Pair) -> None:
        forward, backward = pair
        x, gradient = self._input(forward), self._input(backward)
        with self.recorder.computing(pair):
            back = self.works[backward.stage].backward(backward.microbatch, gradient, put_off=False)
            outputs = _in_turns(back, self.works[forward.stage].forward(forward.microbatch, x))
        self._deliver(backward, outputs[0])
        self._deliver(forward, outputs[1])

    def _input(self, op: Op) -> Tensor | None:
        source = op.stage + UPSTREAM[op.kind]
        if not 0 <= source < self.num_stages:
            return None
        message = self._arriving.pop((_what(op), op.stage, op.microbatch))
        if message.work is not None:
            self.recorder.wait(message.work, str(op), peers=(self.group.ranks[self.schedule.rank(source, op.microbatch)],))
        return message.tensor

    def _deliver(self, op: Op, result: Tensor | None) -> None:
        target = op.stage - UPSTREAM[op.kind]
        if not 0 <= target < self.num_stages:
            return
        assert result is not None, op
        key = (_what(op), target, op.microbatch)
        if self.schedule.rank(target, op.microbatch) == self.group.rank:
            self._arriving[key] = _Message(result, None)
        else:
            self._made[key] = result

    def _exchange(self, exchange: Exchange) -> None:
        messages = [self._message(transfer) for transfer in exchange.transfers]
        # A micro-batch without sequences, which both ends know, is not sent.
        full = [(transfer, tensor) for transfer, tensor in messages if tensor.numel()]
        works: list[dist.Work | None] = [None] * len(full)
        if full:
            operations = [
                dist.P2POp(
                    dist.isend if transfer.action == "send" else dist.irecv,
                    tensor,
                    self.group.ranks[transfer.peer],
                    self.group.process_group,
                )
                for transfer, tensor in full
            ]
            begun = dist.batch_isend_irecv(operations)
            works = [*begun] if len(begun) == len(full) else [begun[0]] * len(full)  # NCCL has one work for the batch
        under_way = {id(tensor): work for (_, tensor), work in zip(full, works, strict=True)}
        for transfer, tensor in messages:
            message = _Message(tensor, under_way.get(id(tensor)))
            if transfer.action == "send":
                self.group.traffic.add(tensor.numel() * tensor.element_size())
                self._leaving.append(message)
            else:
                self._arriving[transfer.what, transfer.stage, transfer.microbatch] = message

    def _message(self, transfer: Transfer) -> tuple[Transfer, Tensor]:
        if transfer.action == "receive":
            return transfer, self.works[transfer.stage].room(transfer.microbatch)
        target = transfer.stage + (1 if transfer.what == "activation" else -1)
        return transfer, self._made.pop((transfer.what, target, transfer.microbatch)).contiguous()


def _what(op: Op) -> str:
    return "activation" if op.kind == "F" else "gradient"


def _drained(work: Turns[T]) -> T:
    """The result of work alone."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result


def _in_turns(first: Turns[T], second: Turns[T]) -> tuple[T, T]:
    """The results of two pieces of work that take turns."""
    running, results = {0: first, 1: second}, dict[int, T]()
    while running:
        for i, work in list(running.items()):
            try:
                next(work)
            except StopIteration as end:
                results[i] = end.value
                del running[i]
    return results[0], results[1]
