"""Events for the tests of the monitor: hand-made ones and hypothesis strategies."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from quintet.monitor.metrics import Evaluated, Event, Message, Record, Resumed, Saved


def record(step: int, **changes: Any) -> Record:
    """A record of two MoE layers with three experts."""
    values: dict[str, Any] = {
        "step": step,
        "num_steps": 10,
        "phase": "pretrain",
        "tokens": step * 4096,
        "loss": 5.0 - step / 10,
        "main_loss": 4.0 - step / 10,
        "mtp_loss": 4.5,
        "balance_loss": 1e-4,
        "learning_rate": 3e-3,
        "grad_norm": 0.5,
        "batch_sequences": 16,
        "seconds": 0.5,
        "tokens_per_second": 8192.0,
        "mfu": 0.41,
        "expert_load": ((0.25, 0.25, 0.5), (0.2, 0.3, 0.5)),
        "peak_memory_bytes": 2**30,
    }
    return Record(**values | changes)


def evaluated(step: int) -> Evaluated:
    """An evaluation on two sources."""
    return Evaluated(
        step=step,
        losses={"stdlib": 4.25, "docs": 5.5},
        domains={"stdlib": "code", "docs": "prose"},
        bits_per_byte={"stdlib": 1.75, "docs": 2.25},
        tokens={"stdlib": 16384, "docs": 8192},
    )


def saved(step: int) -> Saved:
    """A checkpoint."""
    return Saved(step=step, path=f"checkpoints/step-{step:08d}", seconds=0.75, num_bytes=240 << 20)


_numbers = st.floats(allow_nan=False)
_counts = st.integers(0, 2**62)
_names = st.text(max_size=8)


def _of(kind: type[Event], **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Event]:
    return st.builds(kind, **fields)


events: st.SearchStrategy[Event] = st.one_of(
    _of(
        Record,
        step=_counts,
        num_steps=_counts,
        phase=_names,
        tokens=_counts,
        loss=_numbers,
        main_loss=_numbers,
        mtp_loss=st.none() | _numbers,
        balance_loss=_numbers,
        learning_rate=_numbers,
        grad_norm=_numbers,
        batch_sequences=_counts,
        seconds=_numbers,
        tokens_per_second=_numbers,
        mfu=st.none() | _numbers,
        expert_load=st.lists(st.lists(_numbers, max_size=3).map(tuple), max_size=3).map(tuple),
        peak_memory_bytes=_counts,
    ),
    _of(
        Evaluated,
        step=_counts,
        losses=st.dictionaries(_names, _numbers, max_size=3),
        domains=st.dictionaries(_names, _names, max_size=3),
        bits_per_byte=st.dictionaries(_names, _numbers, max_size=3),
        tokens=st.dictionaries(_names, _counts, max_size=3),
    ),
    _of(Resumed, step=_counts, path=_names, seconds=st.dictionaries(_names, _numbers), load_seconds=st.dictionaries(_names, _numbers)),
    _of(Saved, step=_counts, path=_names, seconds=_numbers, num_bytes=_counts),
    _of(Message, text=st.text()),
)
