"""Where events go: a sink is two methods; here are the metrics file, plain lines, several at once, and a run's own set."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from quintet.monitor.append import Appender, drop_torn_line
from quintet.monitor.meter import Pace
from quintet.monitor.metrics import Evaluated, Event, Message, Record, Resumed, Saved, to_json
from quintet.monitor.units import count, duration, num_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from quintet.spec.run import Monitor


class Sink(Protocol):
    """Takes events. Watching a run must never end it: `write` does not raise for a full disk."""

    def write(self, event: Event) -> None:
        """Take one event."""

    def close(self) -> None:
        """Finish; nothing is written afterwards. Safe to call twice."""


class Fanout:
    """Every event to every sink, in order; as a context manager it closes them all."""

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self._sinks = tuple(sinks)

    def write(self, event: Event) -> None:
        for sink in self._sinks:
            sink.write(event)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Fanout:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class JsonLines:
    """Appends one JSON line per event, whole lines only; opened at the first event, after what `truncate_after` has cut."""

    def __init__(self, path: Path) -> None:
        self._path, self._file, self._opened = path, Appender(path), False

    def write(self, event: Event) -> None:
        if not self._opened:
            drop_torn_line(self._path)
            self._opened = True
        self._file.write(json.dumps(to_json(event), separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        self._file.close()


class Plain:
    """One line per event, for logs and wherever there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._console, self._pace, self._step = console, Pace(), 0

    def write(self, event: Event) -> None:
        if isinstance(event, Record):
            # The step before the first record is unknown after a resume; its pace is then told from the second on.
            self._pace = self._pace.after(steps=event.step - self._step if self._step or event.step == 1 else 0, seconds=event.seconds)
            self._step = event.step
        self._console.print(line(event, pace=self._pace), soft_wrap=True, markup=False, highlight=False)

    def close(self) -> None:
        """Nothing to finish."""


def line(event: Event, *, pace: Pace) -> str:
    """The event as one line of text; `loss` is of the next token, `total` what was minimized, where that shows another number."""
    match event:
        case Record():
            main, total = f"{event.main_loss:.4f}", f"{event.loss:.4f}"
            parts = [
                f"step {event.step}/{event.num_steps}",
                f"loss {main}",
                *([f"total {total}"] if total != main else []),
                f"grad {event.grad_norm:.3g}",
                f"lr {event.learning_rate:.3g}",
                f"{count(event.tokens_per_second)} tokens/s",
                *([f"MFU {event.mfu:.1%}"] if event.mfu is not None else []),
                *([f"load CV {event.expert_load_cv:.2f}"] if event.expert_load else []),
                *([f"dropped {event.dropped:.2%}"] if event.dropped is not None else []),
                f"ETA {duration(pace.eta(event.num_steps - event.step))}",
            ]
            return "  ".join(parts)
        case Evaluated():
            return f"held out at step {event.step}  " + "  ".join(f"{name} {loss:.4f}" for name, loss in event.losses.items())
        case Saved():
            return f"saved step {event.step}  {event.path}  {num_bytes(event.num_bytes)} in {duration(event.seconds)}"
        case Message() | Resumed():
            return event.text


def open_sinks(monitor: Monitor, run_directory: Path, *, console: Console, title: str, others: Iterable[Sink] = ()) -> Fanout:
    """What a run writes to: metrics.jsonl always, TensorBoard if asked for, `others`, and the terminal, live where `console` is one."""
    from quintet.monitor.live import Live

    terminal: Sink = Live(console, title=title) if monitor.live and console.is_terminal else Plain(console)
    sinks: list[Sink] = [JsonLines(run_directory / "metrics.jsonl")]
    if monitor.tensorboard:
        from quintet.monitor.tensorboard import TensorBoard

        sinks.append(TensorBoard(run_directory / "tensorboard"))
    return Fanout([*sinks, *others, terminal])
