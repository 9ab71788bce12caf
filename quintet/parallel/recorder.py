"""The flight recorder of a pipeline: what each rank did last and what it waits for, always on, told when something hangs.

Every rank notes each op as it begins, and when the last row's ops computed, in memory. A thread tells the others now and then, through
the store, so that what a rank did last, and for how long it has been silent, is known even where it can no longer speak. When a wait
fails, the error names the op, the rank that did not send, and every rank's last op.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from quintet.errors import RankError
from quintet.schedule.op import Work

TELL_SECONDS = 1.0
"""How often a rank tells the others where it is: one that stays silent hangs."""
_TOLD_PER_SECOND = 500
"""By all ranks together, so that the store is not kept busy."""
KEPT = 64
"""Ops that a rank remembers."""


class Recorder:
    """This rank's last steps. `store` is shared with the other ranks, None where it is alone or nobody listens."""

    def __init__(
        self, rank: int, ranks: Sequence[int], store: Store | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.rank, self.ranks, self.store, self.clock = rank, tuple(ranks), store, clock
        self.steps: deque[tuple[float, int, object]] = deque(maxlen=KEPT)
        """(seconds, place in the row, step), newest last."""
        self.times: list[tuple[Work, float, float]] = []
        """Of the last row, when each op's computation began and ended, in seconds of `clock`; on CUDA: when it had been launched."""
        self.waits_for = ""
        self.num_rows = 0

    def begin_row(self) -> None:
        """A row begins."""
        self.times, self.num_rows = [], self.num_rows + 1

    @contextmanager
    def computing(self, work: Work) -> Iterator[None]:
        """An op computes, its input being there."""
        begun = self.clock()
        yield
        self.times.append((work, begun, self.clock()))

    def begin(self, step: object, position: int) -> None:
        """A step begins."""
        self.steps.append((self.clock(), position, step))

    def finish(self) -> None:
        """The row is done."""
        self.steps.append((self.clock(), -1, "the end of its row"))

    def wait(self, work: dist.Work, what: str, *, peers: Sequence[int]) -> None:
        """Wait for a message. Raises RankError, naming `what` waits and for which ranks, where it does not come."""
        self.waits_for = f"{what} from {_ranks(peers)}"
        try:
            work.wait()
        except RuntimeError as error:
            raise self._lost(f"waits at {self.waits_for}, which did not come", error) from error
        self.waits_for = ""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Raise RankError, naming the step that this rank is at, where a message within it fails for another rank's sake."""
        try:
            yield
        except RuntimeError as error:
            if not is_of_ranks(error):
                raise
            at = str(self.steps[-1][2]) if self.steps else "the beginning of its row"
            raise self._lost(f"waits within {at} for a rank that is gone or hangs", error) from error

    def _lost(self, what: str, error: BaseException) -> RankError:
        self.tell()
        return RankError(
            f"rank {self.rank} {what}: {_first_line(error)}{self.last_steps()}\nlook first at the rank that was silent for longest, then "
            "start all of them again: quintet resume continues from the newest checkpoint"
        )

    def last_steps(self) -> str:
        """Every rank's last step, as far as it was heard, in lines."""
        if self.store is None:
            return ""
        lines = []
        for rank in self.ranks:
            told = ""
            with suppress(RuntimeError, ValueError):  # the store may be gone
                if self.store.check([f"step-{rank}"]):
                    when, text = json.loads(self.store.get(f"step-{rank}"))
                    told = f"{text}, heard {max(time.time() - when, 0.0):.1f} s ago"
            lines.append(f"\n  rank {rank}: {told or 'was not heard'}")
        return "".join(lines)

    def tell(self) -> None:
        """Let the others know where this rank is."""
        if self.store is None or not self.steps:
            return
        _, position, step = self.steps[-1]
        waits = f", waits at {self.waits_for}" if self.waits_for else ""
        with suppress(RuntimeError):
            self.store.set(f"step-{self.rank}", json.dumps((time.time(), f"at {step} (step {position} of row {self.num_rows}){waits}")))

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Tell now and then, in a thread of its own, if there is somebody to tell."""
        done = threading.Event()

        def keep_telling() -> None:
            while not done.wait(max(TELL_SECONDS, len(self.ranks) / _TOLD_PER_SECOND)):
                self.tell()

        thread = threading.Thread(target=keep_telling, daemon=True)
        if self.store is not None:
            thread.start()
        try:
            yield
        finally:
            done.set()
            if self.store is not None:
                thread.join()


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else "no reason given"


def is_of_ranks(error: RuntimeError) -> bool:
    """Whether a collective failed for another rank's sake."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "connection", "timed out", "nccl"))
