"""Every legal layout, schedule and policy of a run on a cluster, pruned by rule, ranked by time, memory or cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from quintet.errors import SpecError
from quintet.plan.estimate import Estimate, cost, estimate
from quintet.plan.memory import rank_memory
from quintet.plan.setup import Setup
from quintet.plan.stages import blocks, least_seconds
from quintet.plan.step_time import step_time
from quintet.spec.cluster import Cluster
from quintet.spec.layout import Layout, broken_rules
from quintet.spec.model import Model
from quintet.spec.run import Recompute

Goal = Literal["time", "memory", "cost"]
POLICIES: tuple[Recompute, ...] = ("none", "selective", "full")
"""From the fastest to the one that keeps least."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """What a search may choose from; what is fixed has one choice."""

    tp: tuple[int, ...] = (1, 2, 4, 8)
    cp: tuple[int, ...] = (1, 2, 4, 8, 16)
    zero: tuple[Literal[0, 1, 2, 3], ...] = (1, 3)
    micro_batch: tuple[int, ...] = (1, 2, 4, 8)
    recompute: tuple[Recompute, ...] = POLICIES
    schedules: tuple[tuple[str, int], ...] = (
        ("1f1b", 1),
        ("interleaved", 2),
        ("interleaved", 4),
        ("zb1p", 1),
        ("zbv", 2),
        ("dualpipev", 2),
        ("dualpipe", 1),
    )
    """Names and stages per rank."""
    longest_cp_tokens: int = 4096
    """Sequences are not cut into parts shorter than half of this."""
    expert_tp: bool = True


@dataclass(kw_only=True)
class Found:
    """What a search found."""

    best: list[Estimate] = field(default_factory=list)
    """By the goal, best first."""
    num_layouts: int = 0
    """Legal layouts."""
    num_estimated: int = 0
    """Combinations of layout, schedule and policy that were estimated."""
    num_too_large: int = 0
    """Those among them that no memory suffices for."""
    tightest: Estimate | None = None
    """Of those that were estimated and do not fit, the one that needs least memory."""
    least_bytes: float = 0.0
    """Of weights, gradients and optimizer on each device, were all of them shared by all devices."""


def search(
    base: Setup,
    cluster: Cluster,
    *,
    model: Model,
    space: Space | None = None,
    top: int = 5,
    goal: Goal = "time",
    progress: Callable[[int], None] | None = None,
) -> Found:
    """The best `top` setups that fit, of different layouts; `base` gives all that the search does not choose.

    Of policies that differ only in recomputation, the first that fits is the fastest. A layout whose products alone take longer than the
    best found so far by 30 % is passed over.
    """
    space, found = space or Space(), Found(least_bytes=least_bytes(base, Layout(dp=cluster.num_gpus, zero=3)))
    if found.least_bytes > cluster.gpu.memory_bytes:
        return found
    best: dict[tuple[object, ...], Estimate] = {}
    key = GOALS[goal]
    limit = math.inf
    for layout in layouts(model, cluster, base, space):
        found.num_layouts += 1
        if progress:
            progress(found.num_layouts)
        if least_bytes(base, layout) > cluster.gpu.memory_bytes:
            found.num_too_large += 1
            continue
        for setup in _choices(base, layout, space, cluster, limit=1.3 * limit):
            kept = _first_that_fits(setup, cluster, space, found, limit=1.3 * limit)
            if kept is None:
                continue
            if goal != "memory":  # all devices are equal, so the fastest is also the cheapest
                limit = min(limit, kept.seconds / kept.setup.batch_sequences)
            name = (layout.tp, layout.pp, layout.ep, layout.cp, layout.zero, kept.setup.schedule if top > 20 else "")
            if name not in best or key(kept) < key(best[name]):
                best[name] = kept
    found.best = sorted(best.values(), key=key)[:top]
    return found


GOALS: dict[str, Callable[[Estimate], float]] = {
    "time": lambda found: found.seconds / found.setup.batch_sequences,
    "memory": lambda found: found.fullest.total,
    "cost": lambda found: cost(found, tokens=1e12).dollars,
}


def layouts(model: Model, cluster: Cluster, base: Setup, space: Space) -> Iterator[Layout]:
    """All legal layouts of the cluster's devices."""
    n, length = cluster.num_gpus, base.sequence_length
    for tp, cp in itertools.product(space.tp, space.cp):
        if n % (tp * cp) or model.num_heads % tp or (cp > 1 and length // cp < space.longest_cp_tokens // 2):
            continue
        rest = n // (tp * cp)
        for pp in _divisors(rest):
            if pp > model.num_layers or rest // pp > base.batch_sequences:
                continue
            dp = rest // pp
            for ep in _divisors(math.gcd(dp * cp, model.num_routed_experts)):
                for zero, split in itertools.product(space.zero, (1, tp) if tp > 1 and space.expert_tp else (1,)):
                    if zero >= 2 and pp > 1:  # each micro-batch would gather weights or reduce gradients again
                        continue
                    layout = Layout(
                        dp=dp,
                        tp=tp,
                        pp=pp,
                        ep=ep,
                        cp=cp,
                        expert_tp=split,
                        zero=zero,
                        node_size=math.gcd(cluster.domain, n),
                        schedule="1f1b" if pp > 1 else None,
                    )
                    if not broken_rules(layout, model, (length,)):
                        yield layout


def least_bytes(setup: Setup, layout: Layout) -> float:
    """Of weights, gradients and optimizer on the mean rank of a layout, which none of its schedules and policies can change; ZeRO is taken
    to share evenly over all ranks."""
    a = setup.architecture
    a = a if setup.mtp else replace(a, num_mtp_modules=0)
    num_moe = a.num_moe_layers + (a.num_mtp_modules if a.num_experts else 0)
    experts = num_moe * a.block_weights(moe=True)[1] if num_moe else 0
    mine = ((a.parameters - experts) / layout.tp + experts / (layout.ep * layout.expert_tp)) / layout.pp
    shared = a.parameters / layout.num_ranks
    word, master = (4, 0) if setup.precision == "fp32" else (2, 4)
    states = (master + 2 * setup.moments_bytes) * (shared if layout.zero else mine)
    return states + word * (shared if layout.zero == 3 else mine) + setup.gradient_bytes * (shared if layout.zero >= 2 else mine)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _choices(base: Setup, layout: Layout, space: Space, cluster: Cluster, *, limit: float) -> Iterator[Setup]:
    for micro_batch in space.micro_batch:
        if base.batch_sequences < layout.dp * micro_batch:
            break
        least = replace(base, layout=layout, micro_batch=micro_batch, recompute=space.recompute[0])
        if least_seconds(least, blocks(least, cluster)) > limit * base.batch_sequences:
            continue
        for schedule, chunks in space.schedules if layout.pp > 1 else (("1f1b", 1),):
            piped = replace(layout, schedule=schedule, chunks=max(2, chunks)) if layout.pp > 1 else layout  # type: ignore[arg-type]
            setup = replace(base, layout=piped, micro_batch=micro_batch)
            if allowed(setup):
                yield setup


def allowed(setup: Setup) -> bool:
    """Whether the schedule takes the layout's ranks and micro-batches, and the model has layers enough for its stages."""
    layout, m = setup.layout, setup.num_microbatches
    if layout.num_stages > setup.architecture.num_layers:
        return False
    if setup.schedule.startswith("dualpipe"):
        return m >= 2 * layout.pp and (setup.schedule == "dualpipev" or (layout.pp % 2 == 0 and m % 2 == 0))
    return setup.schedule != "interleaved" or m >= layout.pp


def _first_that_fits(setup: Setup, cluster: Cluster, space: Space, found: Found, *, limit: float) -> Estimate | None:
    timed = None
    for recompute in space.recompute:
        tried = replace(setup, recompute=recompute)
        timed = step_time(tried, cluster)
        found.num_estimated += 1
        if timed.step.total > limit * setup.batch_sequences:
            return None
        memory = rank_memory(tried, timed.parts, device="cpu" if cluster.eager else "cuda")
        one = Estimate(setup=tried, cluster=cluster, timed=timed, memory=memory)
        if one.fits:
            return one
        found.num_too_large += 1
        if found.tightest is None or one.fullest.total < found.tightest.fullest.total:
            found.tightest = one
    return None


def nearest_possible(wanted: Setup, cluster: Cluster, *, model: Model, space: Space | None = None) -> list[tuple[str, Estimate]]:
    """What would fit, each changing one thing more than the last: the wanted layout with more recomputation, smaller micro-batches or more
    ZeRO; another layout on the same devices; the same on more devices."""
    found: list[tuple[str, Estimate]] = []
    layout = wanted.layout
    for what, change in (
        *((f"recompute {policy}", {"recompute": policy}) for policy in POLICIES),
        *((f"micro-batches of {n}", {"micro_batch": n}) for n in (4, 2, 1) if n < wanted.micro_batch),
        *((f"micro-batches of 1 and recompute {policy}", {"micro_batch": 1, "recompute": policy}) for policy in ("selective", "full")),
        *((f"ZeRO {zero}", {"layout": replace(layout, zero=zero)}) for zero in (1, 2, 3) if zero > layout.zero),
    ):
        tried = replace(wanted, **change)  # type: ignore[arg-type]
        if tried != wanted and allowed(tried) and (one := estimate(tried, cluster)).fits:
            found.append((what, one))
            break
    if others := search(wanted, cluster, model=model, space=space, top=1).best:
        found.append(("another layout", others[0]))
    for factor in (2, 4, 8, 16, 32):
        larger = replace(cluster, num_gpus=cluster.num_gpus * factor)
        if found and found[-1][0] == "another layout":
            break
        batch = max(wanted.batch_sequences, 1)
        if best := search(replace(wanted, batch_sequences=batch), larger, model=model, space=space, top=1).best:
            found.append((f"{factor} x the devices", best[0]))
            break
    return found


def scaling(base: Setup, model: Model, cluster: Cluster, *, sizes: Iterable[int], weak: bool, space: Space | None = None) -> list[Estimate]:
    """The best setup of each size; `weak` keeps sequences per device, otherwise the batch stays as it is."""
    found = []
    per_device = base.batch_sequences / cluster.num_gpus
    for size in sizes:
        batch = max(1, round(per_device * size)) if weak else base.batch_sequences
        try:
            best = search(
                replace(base, batch_sequences=batch, layout=Layout(), micro_batch=1),
                replace(cluster, num_gpus=size),
                model=model,
                space=space,
                top=1,
            ).best
        except SpecError:
            continue
        found += best
    return found
