"""Ranks that save or load together: what one of them cannot do, all of them hear of and raise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from quintet.checkpoint.durable import failure
from quintet.errors import CheckpointError, QuintetError

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What a rank's work returned, or the error that it raised."""

    result: T | None
    error: Exception | None


class Company:
    """The ranks of a process group that no other thread uses at the same time (see facts of gloo), or one process alone.

    Every method is called by all ranks, in the same order. `doing` is what an error of the file system says that was being done.
    """

    def __init__(self, group: Any | None = None, *, doing: str = "saving", alone: bool = False) -> None:
        self.alone = alone or not dist.is_initialized()
        self.group, self.doing = group, doing
        self.rank, self.size = (0, 1) if self.alone else (dist.get_rank(group), dist.get_world_size(group))

    def share(self, work: Callable[[], T]) -> list[T]:
        """Each rank's result, on every rank; raises the first rank's error on all."""
        if self.size == 1:
            return [self._run_alone(work)]
        outcomes: list[Any] = [None] * self.size
        dist.all_gather_object(outcomes, self._run(work), group=self.group)
        return self._results(outcomes)

    def collect(self, work: Callable[[], T], finish: Callable[[list[T]], None] = lambda results: None) -> None:
        """`work` on each rank, then `finish` on rank 0 with all results in order; raises the first error of either on all."""
        if self.size == 1:
            self._run_alone(lambda: finish([work()]))
            return
        outcomes: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(self._run(work), outcomes, group=self.group, group_dst=0)
        self.lead(lambda: finish(self._results(outcomes or [])))

    def lead(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, on every rank; or the error that it raises."""
        if self.size == 1:
            return self._run_alone(work)
        told: list[Any] = [self._run(work) if self.rank == 0 else None]
        dist.broadcast_object_list(told, group=self.group, group_src=0)
        (result,) = self._results(told)
        return result

    def send(self, tensor: torch.Tensor, rank: int) -> dist.Work:
        """Begin to send a tensor of the host to another rank, which receives what it is sent in order."""
        work = dist.isend(tensor, group=self.group, group_dst=rank)
        assert work is not None
        return work

    def receive(self, tensor: torch.Tensor, rank: int) -> dist.Work:
        """Begin to receive what another rank sends, in a tensor of its size."""
        work = dist.irecv(tensor, group=self.group, group_src=rank)
        assert work is not None
        return work

    def _run_alone(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except OSError as error:
            raise failure(error, doing=self.doing + ("" if self.alone else f" on rank {self.rank}")) from None

    def _run(self, work: Callable[[], T]) -> Outcome[T]:
        try:
            return Outcome(work(), None)
        except OSError as error:
            return Outcome(None, failure(error, doing=f"{self.doing} on rank {self.rank}"))
        except QuintetError as error:
            return Outcome(None, error)
        except Exception as error:  # the others must hear of any; it is sent as its text, for not every error can be
            return Outcome(None, CheckpointError(f"{self.doing} on rank {self.rank} failed: {error!r}"))

    def _results(self, outcomes: list[Outcome[T]]) -> list[T]:
        for outcome in outcomes:
            if outcome.error is not None:
                raise outcome.error
        return [outcome.result for outcome in outcomes]  # type: ignore[misc]
