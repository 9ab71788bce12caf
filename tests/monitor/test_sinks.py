"""Sinks: whole lines on a full disk, files that TensorBoard reads, lines for logs."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from quintet.monitor.append import Appender
from quintet.monitor.metrics import Event, Message, read_events
from quintet.monitor.sinks import Fanout, JsonLines, Plain, open_sinks
from quintet.monitor.tensorboard import TensorBoard
from quintet.spec.run import Monitor
from tests.monitor.events import evaluated, record, saved


@contextmanager
def full_disk(*, after_bytes: int) -> Iterator[None]:
    """Files cannot grow beyond `after_bytes`, and a write across that bound is cut short, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_drops_whole_pieces_and_warns_once(tmp_path: Path) -> None:
    warnings: list[str] = []
    file = Appender(tmp_path / "file", warn=warnings.append)
    file.write(b"one ")
    with full_disk(after_bytes=6):
        file.write(b"too long ")
        file.write(b"again ")
        assert (tmp_path / "file").read_bytes() == b"one "
        assert len(warnings) == 1
        assert "the run goes on" in warnings[0]
    file.write(b"two")
    file.close()
    assert (tmp_path / "file").read_bytes() == b"one two"
    assert warnings[1:] == [f"2 entries are missing from {tmp_path / 'file'}"]


def test_metrics_stay_readable_after_the_disk_was_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sink = JsonLines(tmp_path / "metrics.jsonl")
    sink.write(record(1))
    with full_disk(after_bytes=(tmp_path / "metrics.jsonl").stat().st_size + 10):
        sink.write(record(2))
    sink.write(record(3))
    sink.close()
    assert read_events(tmp_path / "metrics.jsonl") == [record(1), record(3)]
    assert "warning: cannot write" in capsys.readouterr().err


def test_nothing_is_opened_before_the_first_event(tmp_path: Path) -> None:
    with open_sinks(Monitor(), tmp_path / "run", console=Console(file=StringIO()), title="run"):
        pass
    assert not (tmp_path / "run").exists()


def test_a_run_writes_metrics_and_tensorboard_and_lines(tmp_path: Path) -> None:
    output = StringIO()
    with open_sinks(Monitor(), tmp_path, console=Console(file=output), title="run") as sinks:
        sinks.write(record(1))
    assert read_events(tmp_path / "metrics.jsonl") == [record(1)]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    assert output.getvalue().startswith("step 1/10  loss 3.9000  total 4.9000")


def test_tensorboard_can_be_left_out(tmp_path: Path) -> None:
    with open_sinks(Monitor(tensorboard=False), tmp_path, console=Console(file=StringIO()), title="run") as sinks:
        sinks.write(record(1))
    assert not (tmp_path / "tensorboard").exists()


def read_scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = EventAccumulator(str(directory))
    accumulator.Reload()
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_tensorboard_reads_the_scalars(tmp_path: Path) -> None:
    sink = TensorBoard(tmp_path)
    sink.write(record(1, mtp_loss=None))
    sink.write(record(2, mtp_loss=None))
    sink.write(evaluated(2))
    sink.write(saved(2))
    sink.write(Message(text="done"))
    sink.close()
    scalars = read_scalars(tmp_path)
    assert scalars["loss/total"] == [(1, pytest.approx(4.9)), (2, pytest.approx(4.8))]
    assert scalars["held_out/docs"] == [(2, 5.5)]
    assert scalars["experts/max_violation"] == [(1, 0.5), (2, 0.5)]
    assert "loss/mtp" not in scalars


def test_tensorboard_forgets_the_steps_that_a_resume_repeats(tmp_path: Path) -> None:
    for session, steps in enumerate([(1, 2, 3), (3, 4)]):
        sink = TensorBoard(tmp_path, clock=lambda session=session: 1000.0 + session)
        for step in steps:
            sink.write(record(step, loss=10.0 * (session + 1)))
        sink.close()
    assert read_scalars(tmp_path)["loss/total"] == [(1, 10), (2, 10), (3, 20), (4, 20)]


def test_plain_lines_tell_every_kind_of_event() -> None:
    output = StringIO()
    sink = Plain(Console(file=output, width=40))
    for event in (record(1, mfu=None), record(2, loss=3.80001), evaluated(2), saved(2), Message(text="[red]not markup[/red]")):
        sink.write(event)
    sink.close()
    assert output.getvalue().splitlines() == [
        "step 1/10  loss 3.9000  total 4.9000  grad 0.5  lr 0.003  8.19K tokens/s  load CV 0.36  ETA 4.5s",
        "step 2/10  loss 3.8000  grad 0.5  lr 0.003  8.19K tokens/s  MFU 41.0%  load CV 0.36  ETA 4.0s",
        "held out at step 2  stdlib 4.2500  docs 5.5000",
        "saved step 2  checkpoints/step-00000002  240 MiB in 0.8s",
        "[red]not markup[/red]",
    ]


def test_fanout_passes_every_event_to_every_sink_in_order() -> None:
    class Memory:
        def __init__(self) -> None:
            self.events: list[Event] = []
            self.closed = False

        def write(self, event: Event) -> None:
            self.events.append(event)

        def close(self) -> None:
            self.closed = True

    one, two = Memory(), Memory()
    with Fanout([one, two]) as fanout:
        fanout.write(record(1))
        fanout.write(saved(1))
    assert one.events == two.events == [record(1), saved(1)]
    assert one.closed and two.closed
