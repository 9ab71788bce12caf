"""TensorBoard event files, written with the tensorboard package alone: no torch, no thread."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from quintet.errors import UsageError
from quintet.monitor.append import Appender
from quintet.monitor.metrics import Evaluated, Event, Message, Record, Resumed, Saved

try:
    from tensorboard.compat.proto.event_pb2 import Event as Entry
    from tensorboard.compat.proto.event_pb2 import SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter
except ImportError:
    raise UsageError(
        "tensorboard is not installed; install it with: pip install -c constraints.txt tensorboard, or turn it off with "
        "--monitor.no-tensorboard"
    ) from None


class TensorBoard:
    """Scalars of every record and evaluation, in a new event file per session; Messages are left to metrics.jsonl.

    The first entry tells TensorBoard to forget later steps of earlier sessions, so that a resumed run shows one curve.
    """

    def __init__(self, directory: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        path = directory / f"events.out.tfevents.{clock():010.0f}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter(Appender(path))
        self._begun = False

    def write(self, event: Event) -> None:
        if isinstance(event, Saved | Resumed | Message):
            return
        if not self._begun:
            self._put(Entry(file_version="brain.Event:2"))
            self._put(Entry(step=event.step, session_log=SessionLog(status=SessionLog.START)))
            self._begun = True
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(event).items()]
        self._put(Entry(step=event.step, summary=Summary(value=values)))

    def close(self) -> None:
        self._records.close()

    def _put(self, entry: Entry) -> None:
        entry.wall_time = self._clock()
        self._records.write(entry.SerializeToString())


def scalars(event: Record | Evaluated) -> dict[str, float]:
    """The event's numbers by TensorBoard tag."""
    if isinstance(event, Evaluated):
        losses = {f"held_out/{source}": loss for source, loss in event.losses.items()}
        return losses | {f"held_out_bits_per_byte/{source}": bits for source, bits in event.bits_per_byte.items()}
    optional = {"loss/mtp": event.mtp_loss, "speed/mfu": event.mfu, "experts/dropped": event.dropped}
    return {
        "loss/total": event.loss,
        "loss/main": event.main_loss,
        "loss/balance": event.balance_loss,
        "optimizer/learning_rate": event.learning_rate,
        "optimizer/grad_norm": event.grad_norm,
        "optimizer/batch_sequences": event.batch_sequences,
        "speed/tokens_per_second": event.tokens_per_second,
        "speed/peak_memory_gib": event.peak_memory_bytes / 2**30,
        "experts/load_cv": event.expert_load_cv,
        "experts/max_violation": event.max_violation,
        **{tag: value for tag, value in optional.items() if value is not None},
    }
