"""A step of a pipeline, simulated: how long it takes, where it idles, which communication shows, and what each rank must keep."""

from __future__ import annotations

from dataclasses import dataclass

from quintet.plan.costs import Costs, Stage, durations, stages
from quintet.schedule.clock import Timeline, walk
from quintet.schedule.table import Schedule


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What `simulate` found. Lists are per rank."""

    timeline: Timeline
    costs: Costs
    makespan: float
    """Seconds from the first start to the last end."""
    bubble: list[float]
    """Share of the makespan in which the rank runs no op."""
    exposed_p2p: list[float]
    """Seconds of the bubble in which a rank waits for a message that is under way."""
    exposed_all_to_all: list[float]
    """Seconds inside ops in which a rank waits for a dispatch or combine."""
    peak_activations: list[float]
    """Bytes (with `activation_bytes` 1: micro-batches of a rank's share) that are kept for backwards at most."""
    anatomy: dict[str, float]
    """Seconds by kind of op and `bubble`, as a mean over the ranks; they add up to the makespan."""

    @property
    def mean_bubble(self) -> float:
        """Share of all ranks' time."""
        return sum(self.bubble) / len(self.bubble)


def simulate(schedule: Schedule, costs: Costs) -> Simulation:
    """Run the schedule on paper: a rank starts an op when the one before is over and its input has arrived; sends run beside the work."""
    timeline = walk(schedule, durations(schedule, costs))
    cut = stages(costs, num_ranks=schedule.num_ranks, num_stages=schedule.num_stages)
    makespan = timeline.makespan
    anatomy = _anatomy(timeline)
    return Simulation(
        timeline=timeline,
        costs=costs,
        makespan=makespan,
        bubble=[1 - timeline.busy(rank) / makespan if makespan else 0.0 for rank in range(schedule.num_ranks)],
        exposed_p2p=timeline.waits,
        exposed_all_to_all=_exposed_all_to_all(timeline, costs, cut),
        peak_activations=[_peak(schedule, rank, costs, cut) for rank in range(schedule.num_ranks)],
        anatomy=anatomy,
    )


def _anatomy(timeline: Timeline) -> dict[str, float]:
    totals = dict.fromkeys(("F", "B", "I", "W", "FB"), 0.0)
    for row, starts, ends in zip(timeline.schedule.table, timeline.starts, timeline.ends, strict=True):
        for work, start, end in zip(row, starts, ends, strict=True):
            totals[work.kind] += end - start
    num_ranks = timeline.schedule.num_ranks
    means = {kind: total / num_ranks for kind, total in totals.items()}
    return means | {"bubble": timeline.makespan - sum(means.values())}


def _exposed_all_to_all(timeline: Timeline, costs: Costs, cut: list[Stage]) -> list[float]:
    """F and I stand still for all their all-to-alls; a pair for what it takes longer than its computation."""
    if costs.layer is None:
        return [0.0] * len(timeline.ends)
    found = []
    for row, starts, ends in zip(timeline.schedule.table, timeline.starts, timeline.ends, strict=True):
        seconds = 0.0
        for work, start, end in zip(row, starts, ends, strict=True):
            hidden = sum(_computation(op.kind, cut[op.stage]) for op in work.ops)
            seconds += max(0.0, end - start - hidden)
        found.append(seconds)
    return found


def _computation(kind: str, stage: Stage) -> float:
    """Seconds of an op's computation alone."""
    forward, backward_input = stage.forward - stage.all_to_all, stage.backward_input - stage.all_to_all
    return {"F": forward, "I": backward_input, "W": stage.weight, "B": backward_input + stage.weight}[kind]


def _peak(schedule: Schedule, rank: int, costs: Costs, cut: list[Stage]) -> float:
    """The most bytes a rank keeps: from F on, a share of them from I on, none after B or W."""
    now = peak = 0.0
    change = {"F": 1.0, "I": costs.kept_for_weight - 1, "W": -costs.kept_for_weight, "B": -1.0}
    size = [stage.activation_bytes for stage in cut]
    for work in schedule.table[rank]:
        for kind, stage, _ in work.ops:  # a pair's forward comes first
            now += change[kind] * size[stage]
            if now > peak:
                peak = now
    return peak
