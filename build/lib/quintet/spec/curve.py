"""Curves over the course of a phase (learning rate, batch size, MTP weight), written as the papers write them.

A curve is a list of short sentences, each holding until a place in the phase:

    ["linear to 2.2e-4 until 2000 steps", "hold until 10T tokens", "cosine to 2.2e-5 until 14.3T tokens", "7.3e-6"]

    sentence := VALUE [until PLACE] | hold [until PLACE] | (linear|cosine) [from VALUE] to VALUE [until PLACE]
    PLACE    := NUMBER steps | NUMBER[K|M|B|T] tokens | NUMBER%

A percentage is a share of the phase. A sentence without a place lasts to the phase's end.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from quintet.errors import SpecError

Unit = Literal["steps", "tokens", "share"]

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_PLACE = re.compile(rf"({_NUMBER})\s*(?:(%)|([KMBT]?)\s*(steps?|tokens?))")
_SENTENCE = re.compile(
    rf"(?:(?P<hold>hold)|(?P<constant>{_NUMBER})|(?P<shape>linear|cosine)(?:\s+from\s+(?P<start>{_NUMBER}))?\s+to\s+(?P<end>{_NUMBER}))"
    r"(?:\s+until\s+(?P<place>.+))?"
)
_FARTHEST = 1e18
_SCALE = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True, kw_only=True)
class Place:
    """A point in a phase: so many steps, so many tokens, or a share (0 to 1) of the whole phase."""

    value: float
    unit: Unit

    @classmethod
    def parse(cls, text: str) -> Place:
        """`"2000 steps"`, `"10T tokens"` or `"5%"`; raises SpecError on anything else."""
        match = _PLACE.fullmatch(text.strip())
        if not match:
            raise SpecError(f"{text!r} is not a place in a phase; write for example '2000 steps', '14.8T tokens' or '5%'")
        number, percent, scale, unit = match.groups()
        value = float(number)
        if not value * _SCALE[scale or ""] <= _FARTHEST:
            raise SpecError(f"{text!r} lies too far; a place is at most {_FARTHEST:.0e}")
        if value < 0:
            raise SpecError(f"{text!r} lies before the phase begins; a place is at least 0")
        if percent:
            if value > 100:
                raise SpecError(f"{text!r} lies after the phase ends; a share is at most 100%")
            return cls(value=value / 100, unit="share")
        # Decimal notation such as 14.8T is exact in float64 only after rounding.
        return cls(value=round(value * _SCALE[scale]), unit="steps" if unit.startswith("step") else "tokens")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a phase has come: optimizer steps, tokens, and share (0 to 1) of its length."""

    steps: int
    tokens: int
    share: float


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One sentence: the value runs from `start` to `end` between the places `begin` and `until`."""

    shape: Literal["hold", "linear", "cosine"]
    start: float
    end: float
    begin: Place | None
    until: Place | None

    def at(self, progress: Progress) -> float:
        if self.shape == "hold" or (self.until is None and progress.share >= 1):
            return self.end
        unit: Unit = self.until.unit if self.until else "share"
        last = self.until.value if self.until else 1.0
        first = self.begin.value if self.begin else 0.0
        x = min(max((getattr(progress, unit) - first) / (last - first), 0.0), 1.0)
        if self.shape == "cosine":
            x = (1 - math.cos(math.pi * x)) / 2
        return self.start + (self.end - self.start) * x


@dataclass(frozen=True)
class Curve:
    """A piecewise function of a phase's progress."""

    segments: tuple[Segment, ...]

    @classmethod
    def parse(cls, sentences: tuple[str, ...]) -> Curve:
        """Read the sentences; raises SpecError naming the one that cannot be read."""
        if not sentences:
            raise SpecError("a curve needs at least one sentence, for example ['1e-3']")
        segments: list[Segment] = []
        value, begin = 0.0, None
        for i, sentence in enumerate(sentences):
            match = _SENTENCE.fullmatch(sentence.strip())
            if not match:
                raise SpecError(
                    f"{sentence!r} is not a piece of a curve; write for example 'linear to 2e-4 until 5%', 'hold until 10T tokens', "
                    "'cosine to 2e-5' or a plain number"
                )
            until = Place.parse(match["place"]) if match["place"] else None
            if until is None and i + 1 < len(sentences):
                raise SpecError(f"{sentence!r} has no end but is not the last piece; add 'until ...'")
            shape: Literal["hold", "linear", "cosine"]
            if match["constant"]:
                shape, start, end = "hold", float(match["constant"]), float(match["constant"])
            elif match["hold"]:
                shape, start, end = "hold", value, value
            else:
                shape = "linear" if match["shape"] == "linear" else "cosine"
                start, end = float(match["start"]) if match["start"] else value, float(match["end"])
                if begin and begin.unit != (until.unit if until else "share"):
                    raise SpecError(
                        f"{sentence!r} begins at a place in {begin.unit} and ends at one in {until.unit if until else 'share'}; "
                        "a sloped piece needs both in one unit: put a 'hold' piece between, or change the unit"
                    )
            if not (math.isfinite(start) and math.isfinite(end)):
                raise SpecError(f"{sentence!r} holds a number beyond float64; a curve takes finite values")
            if begin and until and begin.unit == until.unit and until.value < begin.value:
                raise SpecError(f"{sentence!r} ends before it begins; places must not go backwards")
            segments.append(Segment(shape=shape, start=start, end=end, begin=begin, until=until))
            value, begin = end, until
        return cls(tuple(segments))

    def at(self, progress: Progress) -> float:
        """The curve's value at `progress`."""
        return self.segment_at(progress).at(progress)

    def segment_at(self, progress: Progress) -> Segment:
        """The segment that holds at `progress`; the last one where all are over."""
        for segment in self.segments:
            if segment.until is None or getattr(progress, segment.until.unit) < segment.until.value:
                return segment
        return self.segments[-1]

    @property
    def peak(self) -> float:
        """The largest value that the curve takes."""
        return max(max(s.start, s.end) for s in self.segments)

    @property
    def lowest(self) -> float:
        """The smallest value that the curve takes."""
        return min(min(s.start, s.end) for s in self.segments)
