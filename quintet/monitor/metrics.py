"""What a run tells about itself: events as plain values, their JSON lines, and reading them back."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from quintet.errors import DataError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Record:
    """One optimizer step."""

    step: int
    """Optimizer steps done, this one included."""
    num_steps: int
    """Steps of the whole run."""
    phase: str
    """Name of the phase that the step belongs to."""
    tokens: int
    """Tokens trained on since the run began, this step included."""
    loss: float
    """What was minimized: main loss, and MTP and balance loss times their weights, in nats per token."""
    main_loss: float
    """Cross-entropy of the next token, in nats."""
    mtp_loss: float | None
    """Mean cross-entropy of the MTP modules, in nats; absent where no module ran."""
    balance_loss: float
    """Sequence-wise balance loss, summed over the MoE layers, before its weight (`train.balance_weight`)."""
    learning_rate: float
    """Learning rate of this step."""
    grad_norm: float
    """Global gradient norm before clipping."""
    batch_sequences: int
    """Sequences of the global batch."""
    seconds: float
    """Seconds since the record before (or the start of training), evaluations and checkpoints not counted."""
    tokens_per_second: float
    """Tokens trained on in `seconds`, divided by it."""
    mfu: float | None
    """Model FLOPs utilization, 0 to 1 (see `meter`); absent where the machine's peak is unknown."""
    expert_load: tuple[tuple[float, ...], ...]
    """Share of the routed assignments that each expert of each MoE layer received; a layer's shares sum to 1."""
    peak_memory_bytes: int
    """Largest memory held so far: of the CUDA device, else of the process."""
    dropped: float | None = None
    """Share of the routed assignments that found no room at their expert; absent where nothing can be dropped."""

    @property
    def expert_load_cv(self) -> float:
        """Coefficient of variation (standard deviation / mean) of the load over a layer's experts; 0 is balanced.

        The mean over the layers that ran.
        """
        return _mean([_cv(layer) for layer in self.expert_load if sum(layer) > 0])

    @property
    def max_violation(self) -> float:
        """Largest load of any expert of any layer over its layer's mean load, minus 1 (MaxVio, arXiv 2408.15664 4.1); 0 is balanced."""
        violations = [max(layer) / _mean(layer) - 1 for layer in self.expert_load if sum(layer) > 0]
        return max(violations, default=0.0)


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Loss on held-out documents after a step."""

    step: int
    """Optimizer steps done."""
    losses: dict[str, float]
    """Cross-entropy per source, in nats per token."""
    domains: dict[str, str]
    """Domain of each source."""
    bits_per_byte: dict[str, float]
    """Cross-entropy per source in bits per byte of text: comparable between tokenizers."""
    tokens: dict[str, int]
    """Tokens that were evaluated, per source."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that is complete."""

    step: int
    """Optimizer steps done."""
    path: str
    """Its directory."""
    seconds: float
    """Seconds that training stood still for it."""
    num_bytes: int
    """Its size."""
    whole_seconds: float | None = None
    """Seconds from the end of its step until it was complete; training went on meanwhile."""


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """A resumed run has done its first step."""

    step: int
    """Step of the checkpoint that it went on from."""
    path: str
    """The checkpoint."""
    seconds: dict[str, float]
    """Seconds of each phase, in order: `start` of the process, `imports` and joining the ranks, opening the `data`, `find` the newest whole
    checkpoint, `build` the model, `load` it, and the first `step`."""
    load_seconds: dict[str, float]
    """Seconds of rank 0's threads within `load`, added up: `read`, `verify`, `decode`, `place`."""

    @property
    def text(self) -> str:
        """The sentence for a person."""
        phases, threads = (
            ", ".join(f"{name} {taken:.2f}" for name, taken in each.items()) for each in (self.seconds, self.load_seconds)
        )
        return f"the first step after the resume came {sum(self.seconds.values()):.1f} s after its start: {phases}; threads: {threads}"


@dataclass(frozen=True, kw_only=True)
class Message:
    """A sentence for a person."""

    text: str
    """The sentence."""


Event = Record | Evaluated | Saved | Resumed | Message

KINDS: dict[str, type[Event]] = {
    "record": Record,
    "evaluated": Evaluated,
    "saved": Saved,
    "resumed": Resumed,
    "message": Message,
}
"""The `kind` of an event's JSON form."""

_KIND_OF = {event: kind for kind, event in KINDS.items()}


def to_json(event: Event) -> dict[str, Any]:
    """The event as plain values with a `kind`; numbers that JSON lacks become the strings 'nan', 'inf' and '-inf'."""
    return {"kind": _KIND_OF[type(event)], **_finite(dataclasses.asdict(event))}


def from_json(tree: dict[str, Any]) -> Event:
    """The event that `to_json` described; raises DataError naming the kind or the field that does not fit."""
    kind = tree.get("kind")
    if kind not in KINDS:
        raise DataError(f"{kind!r} is not a kind of event{did_you_mean(str(kind), KINDS)}; known: {', '.join(KINDS)}")
    try:
        # Not strict: the strings 'nan' and 'inf' become numbers again.
        return msgspec.convert({k: v for k, v in tree.items() if k != "kind"}, KINDS[kind], strict=False)
    except msgspec.ValidationError as error:
        raise DataError(f"a {kind} event does not fit: {error}") from None


def read_events(path: Path) -> list[Event]:
    """All events of a metrics.jsonl in order; a torn last line is left out, as a kill may leave one.

    Raises DataError, with the line number, for a line before it that is no event, and for a missing file.
    """
    try:
        return [from_json(tree) for _, tree in _lines(path)]
    except FileNotFoundError:
        raise DataError(f"no metrics at {path}; a run writes them from its first step") from None


class Tail:
    """A metrics.jsonl that grows while it is read."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def read(self) -> tuple[list[Event], bool]:
        """The events since the call before, and whether they are all from the beginning: at first, and after a resume has cut the file.

        A missing file has no events. Raises DataError as `read_events`.
        """
        if self._offset and not self._still_there():
            self._offset = 0
        begin, events = self._offset, list[Event]()
        if self._path.exists():
            for end, tree in _lines(self._path, begin):
                events.append(from_json(tree))
                self._offset = end
        return events, begin == 0

    def _still_there(self) -> bool:
        """Whether the file still has a line that ends where reading has come to."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset - 1)
                return file.read(1) == b"\n"
        except FileNotFoundError:
            return False


def truncate_after(path: Path, step: int) -> None:
    """Cut the file before the first event of a step after `step`, so that it tells one history when a run resumes from there.

    What tells of a checkpoint of `step` or before stays: it was written beside later steps. A torn last line goes too. A missing file is
    left missing. Raises DataError as `read_events`.
    """
    if not path.exists():
        return
    end, is_cut, saved = 0, False, list[dict[str, Any]]()
    for after, tree in _lines(path):
        is_cut = is_cut or tree.get("step", 0) > step
        if not is_cut:
            end = after
        elif tree.get("kind") == "saved" and tree.get("step", 0) <= step:
            saved.append(tree)
    os.truncate(path, end)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(tree) + "\n" for tree in saved)


def _lines(path: Path, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """(offset behind the line, its JSON object) for each complete line from `offset` on; errors count lines from there."""
    with path.open("rb") as file:
        file.seek(offset)
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                tree = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error}); delete the line to read the rest") from None
            if not isinstance(tree, dict):
                raise DataError(f"{path}, line {number}: not an event but {type(tree).__name__}; delete the line to read the rest")
            yield offset, tree


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def _mean(values: list[float] | tuple[float, ...]) -> float:
    return sum(values) / len(values) if values else 0.0


def _cv(values: tuple[float, ...]) -> float:
    mean = _mean(values)
    return math.sqrt(_mean([(v - mean) ** 2 for v in values])) / mean if mean else 0.0
