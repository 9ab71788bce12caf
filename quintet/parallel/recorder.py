"""The flight recorder: what each rank did last and what it waits for, always on, told when something hangs.

Every rank notes what it does, a step of the run and in a pipeline each op as it begins, and when the last row's ops computed, in memory. A
thread tells the others now and then, through the store, so that what a rank did last, and for how long it has been silent, is known even
where it can no longer speak. When a wait fails, the error names what waits, in a pipeline the op and the rank that did not send, and what
every rank did last.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from quintet.errors import RankError
from quintet.schedule.op import Work

TELL_SECONDS = 1.0
"""How often a rank tells the others where it is: one that stays silent hangs."""
_LEFT = "at the end of its work"
_TOLD_PER_SECOND = 500
"""By all ranks together, so that the store is not kept busy."""
SILENT_SECONDS = 10.0
"""After which a rank that tells nothing is named, long before a message is given up."""
KEPT = 64
"""Ops that a rank remembers."""
SHOWN = 16
"""Ranks whose last steps an error lists: of more, those that were silent for longest."""
_PACKAGE = Path(__file__).parent.parent


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
        self.doing = ""

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
    def during(self, what: str) -> Iterator[None]:
        """What the run does now (`step 7`), which others hear. Raises RankError for a message within it that fails for another rank's sake;
        other errors get a note."""
        self.doing, self.waits_for = f"in {what}", ""
        self.steps.clear()
        try:
            yield
        except RuntimeError as error:
            if self.store is None or not is_of_ranks(error):
                error.add_note(what)
                raise
            self.waits_for = operation(error)
            raise self._lost(f"waits in {what}, {self.waits_for}, for a rank that is gone or hangs", error) from error
        self.doing = f"behind {what}"

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Raise RankError, naming the op that this rank is at, where a message within it fails for another rank's sake."""
        try:
            yield
        except RuntimeError as error:
            if not is_of_ranks(error):
                raise
            self.waits_for = operation(error)
            at = str(self.steps[-1][2]) if self.steps else "the beginning of its row"
            raise self._lost(f"waits within {at}, {self.waits_for}, for a rank that is gone or hangs", error) from error

    def _lost(self, what: str, error: BaseException) -> RankError:
        self.tell()
        if self.store is not None:
            time.sleep(1.5 * TELL_SECONDS)  # whoever still lives is heard until then
        heard, now = self._heard(), time.time()
        silent, suspect, _ = min(heard, default=(now, 0, ""))
        first = f"rank {suspect}, which was silent for longest" if now - silent > 1.2 * TELL_SECONDS else "what the other ranks said"
        return RankError(
            f"rank {self.rank} {what}: {first_sentence(error)}{_lines(heard, now)}\nlook first at {first}, then start all of them again: "
            "quintet resume continues from the newest checkpoint"
        )

    def _heard(self) -> list[tuple[float, int, str]]:
        """When each rank was last heard, in seconds since the epoch (0: never), the rank, and what it told. Empty without a store."""
        heard: list[tuple[float, int, str]] = []
        if self.store is None:
            return heard
        with suppress(RuntimeError, ValueError):
            for rank in self.ranks:
                told = json.loads(self.store.get(f"step-{rank}")) if self.store.check([f"step-{rank}"]) else (0.0, "")
                heard.append((told[0], rank, told[1]))
        return heard

    def _fallen_silent(self, news: dict[int, tuple[float, float]]) -> list[int]:
        """The ranks whose last word has just become too old. `news`, kept from call to call: what time each told last, by its own clock,
        and when that was new here; infinite for those that were named already."""
        now, silent = self.clock(), []
        for told, rank, text in self._heard():
            before, since = news.setdefault(rank, (told, now))
            if told != before or text == _LEFT:
                news[rank] = (told, now)
            elif now - since > SILENT_SECONDS and rank != self.rank:
                silent.append(rank)
                news[rank] = (told, math.inf)
        return silent

    def tell(self) -> None:
        """Let the others know where this rank is."""
        if self.store is None or not (self.steps or self.doing):
            return
        op = ""
        with suppress(IndexError):  # another thread may have begun a new step
            _, position, step = self.steps[-1]
            op = f"at {step} (place {position} in row {self.num_rows})"
        text = ", ".join(filter(None, (self.doing, op, f"waits at {self.waits_for}" if self.waits_for else "")))
        with suppress(RuntimeError):
            self.store.set(f"step-{self.rank}", json.dumps((time.time(), text)))

    @contextmanager
    def telling(self, notice: Callable[[str], None] | None = None) -> Iterator[None]:
        """Tell now and then, in a thread of its own, if there is somebody to tell. `notice` hears there which ranks have fallen silent."""
        done = threading.Event()

        def keep_telling() -> None:
            news: dict[int, tuple[float, float]] = {}
            while not done.wait(max(TELL_SECONDS, len(self.ranks) / _TOLD_PER_SECOND)):
                self.tell()
                if notice and (silent := self._fallen_silent(news)):
                    notice(f"{_ranks(silent)} said nothing for {SILENT_SECONDS:.0f} s; is it stopped, or its node overloaded or gone?")

        thread = threading.Thread(target=keep_telling, daemon=True)
        if self.store is not None:
            thread.start()
        try:
            yield
            self.steps.clear()
            self.doing = _LEFT
            self.tell()
        finally:
            done.set()
            if self.store is not None:
                thread.join()


def _lines(heard: list[tuple[float, int, str]], now: float) -> str:
    """A line for every rank; of many ranks for those that were silent for longest."""
    shown = heard if len(heard) <= SHOWN else sorted(heard)[:SHOWN]
    lines = [f"{told}, heard {max(now - when, 0.0):.1f} s ago" if when else "was not heard" for when, _, told in shown]
    more = [f"  and {len(heard) - SHOWN} more, which were heard since"] if len(heard) > SHOWN else []
    return "".join("\n" + line for line in [*(f"  rank {at[1]}: {line}" for at, line in zip(shown, lines, strict=True)), *more])


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def first_sentence(error: BaseException) -> str:
    """The first sentence of a message of torch, without the place in its source."""
    line = re.sub(r"^\[[^]]*\.(cc|cpp|h):\d+\]\s*", "", next(iter(str(error).strip().splitlines()), "no reason given"))
    return line.split(". ")[0].rstrip(".")


def operation(error: BaseException) -> str:
    """What failed: the notes that callers left (`step 7`), and the package's innermost function, and the collective that it called."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(_PACKAGE)]
    at_the_edge = {Path(__file__), _PACKAGE / "parallel" / "rendezvous.py"}
    names = [f"{Path(frame.filename).stem}.{frame.name}" for frame in frames if Path(frame.filename) not in at_the_edge]
    inside = [name for name in names if name.startswith("collectives.")]
    callers = [name for name in names if not name.startswith("collectives.")]
    return ", ".join([*getattr(error, "__notes__", []), *callers[-1:], *inside[:1]]) or "the meeting of the ranks"


def is_of_ranks(error: RuntimeError) -> bool:
    """Whether a collective failed for another rank's sake."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "connection", "timed out", "nccl"))
