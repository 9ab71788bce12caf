"""The phases of a run laid out over optimizer steps: how long each is, and what every step of it is trained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from quintet.spec.curve import Curve, Place, Progress
from quintet.spec.run import Phase, Run


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """One phase with its length counted out."""

    phase: Phase
    """The phase; its length is in steps where `train.steps` sets it."""
    num_steps: int
    """Optimizer steps."""
    num_tokens: int
    """Training tokens."""
    first_batch: int
    """Sequences of the first step."""
    last_batch: int
    """Sequences of the last step."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What one optimizer step is trained with."""

    batch_sequences: int
    """Sequences of the global batch."""
    learning_rate: float
    """Learning rate; a warm-up from 0 is already above it at its first step."""
    mtp_weight: float
    """lambda of the MTP losses."""
    bias_speed: float
    """gamma of the router bias."""


class PhaseCurves:
    """The curves of one phase, read once."""

    def __init__(self, phase: Phase) -> None:
        self.length = Place.parse(phase.length)
        self.sequence_length = phase.sequence_length
        self.batch, self.learning_rate = Curve.parse(phase.batch), Curve.parse(phase.learning_rate)
        self.mtp_weight, self.bias_speed = Curve.parse(phase.mtp_weight), Curve.parse(phase.bias_speed)

    def progress(self, steps: int, tokens: int) -> Progress:
        """Progress after `steps` steps and `tokens` tokens of the phase."""
        done = steps if self.length.unit == "steps" else tokens
        return Progress(steps=steps, tokens=tokens, share=min(done / self.length.value, 1.0))

    def batch_sequences(self, steps: int, tokens: int) -> int:
        """Sequences of the step that begins there."""
        return max(1, round(self.batch.at(self.progress(steps, tokens))))

    def settings(self, steps: int, tokens: int) -> Settings:
        """What the step that begins after `steps` steps and `tokens` tokens of the phase is trained with.

        The batch is read where the step begins; the other curves where it ends.
        """
        sequences = self.batch_sequences(steps, tokens)
        end = self.progress(steps + 1, tokens + sequences * self.sequence_length)
        return Settings(
            batch_sequences=sequences,
            learning_rate=self.learning_rate.at(end),
            mtp_weight=self.mtp_weight.at(end),
            bias_speed=self.bias_speed.at(end),
        )

    def is_over(self, steps: int, tokens: int) -> bool:
        """Whether the phase ends there."""
        return (steps if self.length.unit == "steps" else tokens) >= self.length.value


def curriculum(run: Run) -> tuple[Stretch, ...]:
    """Every phase counted out; `train.steps`, where given, is shared among the phases in proportion to their own steps."""
    stretches = tuple(_count(phase) for phase in run.phases)
    if run.train.steps is None:
        return stretches
    total = sum(stretch.num_steps for stretch in stretches)
    out: list[Stretch] = []
    begin = done = 0
    for stretch in stretches:
        done += stretch.num_steps
        end = round(run.train.steps * done / total)
        if end > begin:
            out.append(_count(replace(stretch.phase, length=f"{end - begin} steps")))
        begin = end
    return tuple(out)


def main_stretch(stretches: Sequence[Stretch]) -> Stretch:
    """The phase that most tokens are trained in: what is said of a run as a whole is said of its steps."""
    return max(stretches, key=lambda stretch: stretch.num_tokens)


def _count(phase: Phase) -> Stretch:
    curves = PhaseCurves(phase)
    steps = tokens = 0
    first = last = curves.batch_sequences(0, 0)
    while not curves.is_over(steps, tokens):
        last = curves.batch_sequences(steps, tokens)
        alike = _steps_alike(curves, steps, tokens, batch=last)
        steps, tokens = steps + alike, tokens + alike * last * phase.sequence_length
    return Stretch(phase=phase, num_steps=steps, num_tokens=tokens, first_batch=first, last_batch=last)


def _steps_alike(curves: PhaseCurves, steps: int, tokens: int, *, batch: int) -> int:
    """How many steps from there on have the same batch, in the same sentence of its curve: found by doubling and halving.

    Within a sentence the batch only grows or only shrinks, so what is alike at both ends is alike between.
    """

    def at(ahead: int) -> Progress:
        return curves.progress(steps + ahead, tokens + ahead * batch * curves.sequence_length)

    def is_alike(ahead: int) -> bool:
        there = at(ahead)
        return (
            not curves.is_over(there.steps, there.tokens)
            and curves.batch.segment_at(there) is sentence
            and curves.batch_sequences(there.steps, there.tokens) == batch
        )

    sentence = curves.batch.segment_at(at(0))
    alike, other = 0, 1
    while is_alike(other):
        alike, other = other, 2 * other
    while other - alike > 1:
        middle = (alike + other) // 2
        alike, other = (middle, other) if is_alike(middle) else (alike, middle)
    return other
