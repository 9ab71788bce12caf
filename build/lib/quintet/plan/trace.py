"""Timelines in Chrome's trace format, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

The "Trace Event Format": a JSON object with `traceEvents`; complete events (X) with start and duration in microseconds, and flows (s, f)
for messages.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from quintet.schedule.clock import Timeline
from quintet.schedule.lower import messages


def chrome(timelines: dict[str, Timeline]) -> str:
    """One process per named timeline, one thread per rank."""
    events = [event for process, (name, timeline) in enumerate(timelines.items()) for event in _events(process, name, timeline)]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _events(process: int, name: str, timeline: Timeline) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}}
    started = _starts(timeline)
    message = 0
    for rank, row in enumerate(timeline.schedule.table):
        yield {"ph": "M", "name": "thread_name", "pid": process, "tid": rank, "args": {"name": f"rank {rank}"}}
        for work, start, end in zip(row, timeline.starts[rank], timeline.ends[rank], strict=True):
            where = {"pid": process, "tid": rank, "cat": work.kind}
            yield {"ph": "X", "name": str(work), "ts": start * 1e6, "dur": (end - start) * 1e6, **where}
            for sender, receiver, peer in messages(timeline.schedule, work):
                identity = {"name": sender.what, "cat": "message", "id": f"{process}.{message}", "pid": process}
                message += 1
                yield {"ph": "s", "ts": end * 1e6, "tid": rank, **identity}
                at = started[receiver.what, receiver.stage, receiver.microbatch]
                yield {"ph": "f", "bp": "e", "ts": at * 1e6, "tid": peer, **identity}


def _starts(timeline: Timeline) -> dict[tuple[str, int, int], float]:
    """When the op begins that takes a stage's activation, or its gradient, of a micro-batch."""
    return {
        ("activation" if op.kind == "F" else "gradient", op.stage, op.microbatch): start
        for row, starts in zip(timeline.schedule.table, timeline.starts, strict=True)
        for work, start in zip(row, starts, strict=True)
        for op in work.ops
        if op.kind != "W"
    }
