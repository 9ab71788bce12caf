"""The live view of a run in the terminal: progress, losses, speed and health in one panel that redraws a few times a second."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.live import Live as Screen
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from quintet.monitor.meter import Pace, smoothed
from quintet.monitor.metrics import Evaluated, Event, Message, Record, Resumed, Saved
from quintet.monitor.units import count, duration, num_bytes, sparkline

_HISTORY = 2000


class Live:
    """Draws the newest state at most `per_second` times a second; messages scroll by above the panel."""

    def __init__(self, console: Console, *, title: str, per_second: float = 4.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._title, self._clock, self._interval = console, title, clock, 1 / per_second
        self._screen: Screen | None = None
        self._drawn = -float("inf")
        self._began = clock()
        self._record: Record | None = None
        self._evaluated: Evaluated | None = None
        self._saved: tuple[Saved, float] | None = None
        self._losses: deque[float] = deque(maxlen=_HISTORY)
        self._pace = Pace()

    def write(self, event: Event) -> None:
        if self._screen is None:
            # Redrawn by hand below: a thread would compete with the step for the cores.
            self._screen = Screen(console=self._console, auto_refresh=False, vertical_overflow="crop")
            self._screen.start()
        match event:
            case Record():
                self._take(event)
            case Evaluated():
                self._evaluated = event
            case Saved():
                self._saved = (event, self._clock())
            case Message() | Resumed():
                self._console.print(event.text, markup=False, highlight=False)
        if self._clock() - self._drawn >= self._interval or not isinstance(event, Record):
            self._draw()

    def close(self) -> None:
        if self._screen is not None:
            self._draw()
            self._screen.stop()
            self._screen = None

    def panel(self) -> RenderableType:
        """The view of everything seen so far."""
        body: list[RenderableType] = [Text("waiting for the first step", style="dim")]
        title = self._title
        if self._record is not None:
            body = [self._progress(self._record), Text(""), self._figures(self._record)]
            title = f"{self._title} · {self._record.phase}"
        return Panel(Group(*body), title=Text(title, style="bold"), title_align="left", border_style="blue", padding=(0, 1))

    def _take(self, record: Record) -> None:
        known = self._record.step if self._record else record.step - 1 if record.step == 1 else record.step
        self._pace = self._pace.after(steps=record.step - known, seconds=record.seconds)
        self._record = record
        self._losses.append(record.main_loss)

    def _draw(self) -> None:
        assert self._screen is not None
        self._drawn = self._clock()
        self._screen.update(self.panel(), refresh=True)

    def _progress(self, record: Record) -> RenderableType:
        row = Table.grid(padding=(0, 2), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True, justify="right")
        left = self._pace.eta(record.num_steps - record.step)
        row.add_row(
            Text(f"step {record.step}/{record.num_steps}", style="bold"),
            ProgressBar(total=record.num_steps, completed=record.step),
            Text(f"{record.step / record.num_steps:.0%}   {duration(self._clock() - self._began)} gone   {duration(left)} left"),
        )
        return row

    def _figures(self, record: Record) -> RenderableType:
        table = Table.grid(padding=(0, 2), expand=True)
        table.add_column(style="dim", no_wrap=True)
        table.add_column(no_wrap=True, ratio=1, overflow="ellipsis")
        smooth = smoothed(list(self._losses))[-1]
        width = max(8, min(40, self._console.width - 60))
        table.add_row(
            "loss",
            Text.assemble(
                (f"{record.main_loss:.4f}", "bold"),
                f"   smooth {smooth:.4f}   ",
                f"MTP {record.mtp_loss:.4f}   " if record.mtp_loss is not None else "",
                (sparkline(self._losses, width=width), "cyan"),
            ),
        )
        table.add_row("held out", self._held_out())
        mfu = f"   MFU {record.mfu:.1%}" if record.mfu is not None else ""
        table.add_row("speed", f"{count(record.tokens_per_second)} tokens/s{mfu}   {count(record.tokens)} tokens so far")
        table.add_row(
            "optimizer",
            f"gradient norm {record.grad_norm:.3g}   learning rate {record.learning_rate:.3g}   batch {record.batch_sequences}",
        )
        if record.expert_load:
            dropped = "" if record.dropped is None else f"   dropped {record.dropped:.2%}"
            table.add_row("experts", f"load CV {record.expert_load_cv:.3f}   worst overload {record.max_violation:.0%}{dropped}")
        table.add_row("checkpoint", self._checkpoint())
        table.add_row("memory", f"{num_bytes(record.peak_memory_bytes)} at most")
        return table

    def _held_out(self) -> str:
        if self._evaluated is None:
            return "not yet"
        losses = "   ".join(f"{source} {loss:.4f}" for source, loss in self._evaluated.losses.items())
        return f"{losses}   at step {self._evaluated.step}"

    def _checkpoint(self) -> str:
        if self._saved is None:
            return "none yet"
        saved, when = self._saved
        return f"step {saved.step}   {num_bytes(saved.num_bytes)} in {duration(saved.seconds)}   {duration(self._clock() - when)} ago"
