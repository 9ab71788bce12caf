"""A step of a pipeline, simulated: how long it takes, where it idles, which communication shows, and what each rank must keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from quintet.cost.memory import stage_bytes, step_memory
from quintet.cost.pipeline import laid_out
from quintet.plan.costs import Costs, Stage, durations, stages
from quintet.schedule.clock import Timeline, walk
from quintet.schedule.held import peak
from quintet.schedule.table import Schedule
from quintet.spec.legal import require_legal
from quintet.spec.run import Run


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes that ranks keep, or with `Costs.activation_bytes` 1 and no states, micro-batches of a rank's share."""

    states: tuple[Mapping[str, float], ...]
    """Per rank, what is there all the time: weights, gradients, optimizer and so on, by name."""
    kept: Mapping[int, float]
    """Per stage, of a micro-batch from its forward to its backward or the gradient of its input."""
    put_off: Mapping[int, float]
    """Per stage, of a micro-batch from there to its weight gradients, if they are put off."""


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
    held: Held
    peak_activations: list[float]
    """Bytes (with `activation_bytes` 1: micro-batches of a rank's share) that are kept for backwards, put-off ones included, at most."""
    peak_memory: list[float]
    """The same with the states."""
    anatomy: dict[str, float]
    """Seconds by kind of op and `bubble`, as a mean over the ranks; they add up to the makespan."""

    @property
    def mean_bubble(self) -> float:
        """Share of all ranks' time."""
        return sum(self.bubble) / len(self.bubble)


def simulate(schedule: Schedule, costs: Costs, *, held: Held | None = None) -> Simulation:
    """Run the schedule on paper: a rank starts an op when the one before is over and its input has arrived; sends run beside the work.
    `held` (default: what the costs say) is what ranks keep meanwhile."""
    timeline = walk(schedule, durations(schedule, costs))
    cut = stages(costs, num_ranks=schedule.num_ranks, num_stages=schedule.num_stages)
    makespan = timeline.makespan
    held = held or held_at(schedule, costs)
    peaks = [peak(row, kept=held.kept, put_off=held.put_off) for row in schedule.table]
    return Simulation(
        timeline=timeline,
        costs=costs,
        makespan=makespan,
        bubble=[1 - timeline.busy(rank) / makespan if makespan else 0.0 for rank in range(schedule.num_ranks)],
        exposed_p2p=timeline.waits,
        exposed_all_to_all=_exposed_all_to_all(timeline, costs, cut),
        held=held,
        peak_activations=peaks,
        peak_memory=[activations + sum(states.values()) for activations, states in zip(peaks, held.states, strict=True)],
        anatomy=_anatomy(timeline),
    )


def held_at(schedule: Schedule, costs: Costs) -> Held:
    """What ranks keep by the costs: of the whole model each stage holds what its share of the work is, once on each of its routes; the
    optimizer's state is shared by all ranks that hold a stage."""
    cut = stages(costs, num_ranks=schedule.num_ranks, num_stages=schedule.num_stages)
    share = [[cut[stage].share for _, stage in held] for held in schedule.stages]
    states = {"weights": costs.weight_bytes, "gradients": costs.gradient_bytes, "optimizer": costs.optimizer_bytes / len(schedule.routes)}
    return Held(
        states=tuple({name: size * sum(parts) for name, size in states.items() if size} for parts in share),
        kept={number: stage.activation_bytes for number, stage in enumerate(cut)},
        put_off={number: costs.kept_for_weight * stage.activation_bytes for number, stage in enumerate(cut)},
    )


def held_by(schedule: Schedule, run: Run, *, sequence_length: int) -> Held:
    """What ranks keep in a step of a run whose layout has this schedule in place of its own, from `cost.memory`. Raises SpecError where no
    legal layout has it."""
    layout = laid_out(schedule, run.layout)
    require_legal(layout, run.model, (sequence_length,))
    states, kept, put_off = [], dict[int, float](), dict[int, float]()
    for place in range(schedule.num_ranks):
        found = step_memory(
            run.model,
            run.train,
            sequence_length=sequence_length,
            layout=layout,
            place=place,
            moments=run.optimizer.moments,
            schedule=schedule,
        )
        states.append({part: size for part, size in asdict(found).items() if part != "activations" and size})
        stage = stage_bytes(run.model, run.train, layout, place=place, sequence_length=sequence_length)
        kept |= stage.kept
        put_off |= stage.put_off
    return Held(states=tuple(states), kept=kept, put_off=put_off)


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
