"""Seconds of a pipeline without walking its schedule: what its ranks do, counted once per shape, and the published bubbles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from quintet.plan.costs import Costs, Layer, overlapped
from quintet.plan.formulas import bubble_seconds
from quintet.plan.stages import StageTime, ranks_of
from quintet.schedule import build
from quintet.spec.layout import Layout


@dataclass(frozen=True, kw_only=True)
class PipelineTime:
    """Seconds on the rank that works longest, and what it waits."""

    forward: float
    input: float
    weight: float
    all_to_all: float
    saved: float
    """What overlapped pairs save against their ops one after the other."""
    bubble: float
    p2p: float
    pair: float
    """Of one overlapped pair of a rank's share; its ops one after the other where the schedule has none."""

    @property
    def total(self) -> float:
        """Of the step's pipeline."""
        return self.forward + self.input + self.weight + self.all_to_all - self.saved + self.bubble + self.p2p


def pipeline_time(
    layout: Layout,
    num_microbatches: int,
    stages: Sequence[StageTime],
    *,
    hop: float,
    p2p_hidden: float,
    paired: Sequence[StageTime] = (),
    pair_waits: float = 1.0,
) -> PipelineTime:
    """`stages` are all stages in the order of the model, `paired` what they take inside of overlapped pairs, where that differs; `hop` is a
    message to the next rank.

    The steady state takes as long as the slowest rank; filling and draining takes what the schedule's formula says for the mean rank.
    Exact for equal stages and 1F1B (tested against the simulator).
    """
    m, p, chunks = num_microbatches, layout.pp, layout.num_stages // layout.pp
    schedule = layout.schedule_for(m)
    if p == 1:
        one = stages[0]
        return PipelineTime(
            forward=m * one.forward,
            input=m * one.input,
            weight=m * one.weight,
            all_to_all=m * (2 * one.all_to_all + one.all_to_all_again),
            saved=0.0,
            bubble=0.0,
            p2p=0.0,
            pair=one.whole,
        )
    ranks = [[stages[s] for s in held] for held in ranks_of(layout)]
    each = m / 2 if schedule == "dualpipe" else m  # half of the micro-batches take each of the two directions
    slowest = max(ranks, key=lambda held: sum(stage.whole for stage in held))
    forward, backward_input, weight, all_to_all, again = _of_mean_rank(stages, p)
    one_after_other = forward + backward_input + weight + 2 * all_to_all + again
    pair, saved = one_after_other, 0.0
    if schedule.startswith("dualpipe"):
        f, i, w, moving, moving_again = _of_mean_rank(paired or stages, p)
        pair = min(one_after_other, pair_waits * pair_seconds(f, i + moving_again, w, moving))
        saved = pairs_per_microbatch(schedule, p, m) * m * (one_after_other - pair)
    bubble = bubble_seconds(
        schedule,
        num_ranks=p,
        chunks=chunks,
        forward=forward + all_to_all,
        backward_input=backward_input + all_to_all + again,
        weight=weight,
        pair=pair,
    )
    own = {name: sum(getattr(stage, name) for stage in slowest) for name in _TERMS}
    # On the way in and out every hop shows; while the pipeline is full, a loop's messages run beside its work as well as they can.
    looped = 2 * m * chunks * (1 - p2p_hidden) if schedule.startswith("interleaved") else 0.0
    shown = hop * (2 * (p - 1) + looped)
    return PipelineTime(
        forward=each * own["forward"],
        input=each * own["input"],
        weight=each * own["weight"],
        all_to_all=each * (2 * own["all_to_all"] + own["all_to_all_again"]),
        saved=saved,
        bubble=max(0.0, bubble),
        p2p=shown,
        pair=pair,
    )


_TERMS = ("forward", "input", "weight", "all_to_all", "all_to_all_again")


def _of_mean_rank(stages: Sequence[StageTime], num_ranks: int) -> tuple[float, ...]:
    return tuple(sum(getattr(stage, name) for stage in stages) / num_ranks for name in _TERMS)


def pair_seconds(forward: float, backward_input: float, weight: float, all_to_all: float, *, num_layers: int = 4) -> float:
    """An overlapped forward and backward on two streams, in V3's order, whose layers are all alike: 0.47 of the input's gradient and 0.31
    of forward and of the weights' gradient in attention, the rest in experts (the shares of V3's multiplications)."""
    one = 1 / num_layers
    layer = Layer(
        attention_forward=0.41 * forward * one,
        attention_backward_input=0.53 * backward_input * one,
        attention_weight=0.32 * weight * one,
        mlp_forward=0.59 * forward * one,
        mlp_backward_input=0.47 * backward_input * one,
        mlp_weight=0.68 * weight * one,
        dispatch_bytes=all_to_all * one / 3,
        combine_bytes=all_to_all * one * 2 / 3,
    )
    return overlapped(Costs(layer=layer, layers=num_layers, all_to_all_bandwidth=1.0), num_layers=num_layers)


def pairs_per_microbatch(schedule: str, num_ranks: int, num_microbatches: int) -> float:
    """Overlapped pairs of a rank in the mean, as a share of its forwards: all but a number that does not depend on the micro-batches."""
    if num_microbatches < 2 * num_ranks:
        return 0.0
    return 1 - _alone(schedule, num_ranks) / num_microbatches


@lru_cache(maxsize=1024)
def _alone(schedule: str, num_ranks: int) -> float:
    """Micro-batches of a rank's share whose forward has no partner, in the mean over the ranks."""
    m = 2 * num_ranks
    table = build(schedule, num_ranks, m).table
    pairs = sum(work.kind == "FB" for row in table for work in row)
    forwards = sum(op.kind == "F" for row in table for work in row for op in work.ops)
    return m * (1 - pairs / forwards)
