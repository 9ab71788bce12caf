"""The cut of a transformer into pipeline stages, which ranks hold them, and what each of them costs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from quintet.cost.architecture import Architecture
from quintet.cost.balance import cut, layer_costs
from quintet.plan.block_time import BlockTime, Policy, block_time, ends_time
from quintet.plan.eager_time import eager_block, eager_end
from quintet.plan.setup import Setup
from quintet.spec.cluster import Cluster
from quintet.spec.layout import Layout
from quintet.spec.model import Model


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a stage holds."""

    num_dense: int
    num_moe: int
    num_mtp: int = 0
    """MTP modules, which cost as much as a layer and a head each."""
    embedding: bool = False
    head: bool = False

    @property
    def num_blocks(self) -> int:
        """Layers and MTP modules."""
        return self.num_dense + self.num_moe + self.num_mtp


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The times of the kinds of block that a setup has."""

    dense: BlockTime
    moe: BlockTime
    embedding: BlockTime
    head: BlockTime


def blocks(setup: Setup, cluster: Cluster) -> Blocks:
    """Of one micro-batch."""
    a, policy, software = setup.architecture, policy_of(setup), setup.software
    block, end = (block_time, _end) if cluster.eager is None else (eager_block, eager_end)
    return Blocks(
        dense=block(a, policy, cluster, software, moe=False) if a.num_layers > a.num_moe_layers else BlockTime(),
        moe=block(a, policy, cluster, software, moe=True) if a.num_moe_layers else BlockTime(),
        embedding=end(a, policy, cluster, software, head=False),
        head=end(a, policy, cluster, software, head=True),
    )


_end = lru_cache(maxsize=20_000)(ends_time)


def policy_of(setup: Setup) -> Policy:
    """What the setup's blocks depend on."""
    layout = setup.layout
    return Policy(
        tokens=setup.tokens,
        sequence_length=setup.sequence_length,
        tp=layout.tp,
        cp=layout.cp,
        ep=layout.ep,
        expert_tp=layout.expert_tp,
        precision=setup.precision,
        recompute=setup.recompute,
        recompute_share=setup.recompute_share,
        expert_stride=1 if setup.megatron and layout.expert_tp == 1 else layout.tp,
        gather_rows=setup.megatron and layout.expert_tp > 1,
    )


def parts(setup: Setup, found: Blocks) -> tuple[Part, ...]:
    """As the layout or the runtime cuts the model (`cost.balance`). Megatron's runs have equally many layers per stage where these
    divide, or else a cut that keeps the busiest rank's work small."""
    a, layout = setup.architecture, setup.layout
    num_stages = layout.num_stages
    if num_stages == 1:
        return (
            Part(num_dense=a.num_layers - a.num_moe_layers, num_moe=a.num_moe_layers, num_mtp=setup.num_mtp, embedding=True, head=True),
        )
    if layout.cut is not None:
        sizes = list(layout.cut)
    elif setup.model is not None:
        sizes = list(_own_cut(setup.model, num_stages))
    elif not setup.megatron:
        sizes = list(_cut(a, num_stages))
    elif a.num_layers % num_stages == 0:
        sizes = [a.num_layers // num_stages] * num_stages
    else:
        weigh = tuple(round(_weight(time), 9) for time in (found.dense, found.moe, found.embedding, found.head))
        ranks = ranks_of(layout)
        sizes = list(_balanced(a.num_layers - a.num_moe_layers, a.num_moe_layers, ranks, weigh, setup.num_mtp))
    return _parts(a, tuple(sizes), setup.num_mtp)


@lru_cache(maxsize=4096)
def _own_cut(model: Model, num_stages: int) -> tuple[int, ...]:
    """The runtime's own cut, by the operations of a token."""
    layers, behind = layer_costs(model)
    return cut(layers, num_stages, behind=behind)


@lru_cache(maxsize=4096)
def _cut(a: Architecture, num_stages: int) -> tuple[int, ...]:
    """The same of a transformer that is not Quintet's."""
    layers, behind = a.layer_costs()
    return cut(layers, num_stages, behind=behind)


@lru_cache(maxsize=20_000)
def _parts(a: Architecture, sizes: tuple[int, ...], num_mtp: int) -> tuple[Part, ...]:
    """The stages with so many layers each."""
    dense, begin, found = a.num_layers - a.num_moe_layers, 0, []
    for stage, size in enumerate(sizes):
        last = stage == len(sizes) - 1
        num_dense = max(0, min(begin + size, dense) - begin)
        part = Part(num_dense=num_dense, num_moe=size - num_dense, num_mtp=num_mtp if last else 0, embedding=stage == 0, head=last)
        found.append(part)
        begin += size
    return tuple(found)


def _weight(time: BlockTime) -> float:
    return time.compute_forward + time.compute_input + time.compute_weight + 2 * time.all_to_all


@lru_cache(maxsize=20_000)
def _balanced(num_dense: int, num_moe: int, ranks: tuple[tuple[int, ...], ...], weigh: tuple[float, ...], num_mtp: int) -> tuple[int, ...]:
    """Layers per stage: from an even share, one layer at a time goes from the busiest rank to the idlest while that helps."""
    dense, moe, embedding, head = weigh
    num_stages = 1 + max(stage for held in ranks for stage in held)
    total = num_dense + num_moe
    sums = list(accumulate([dense] * num_dense + [moe] * num_moe, initial=0.0))
    sizes = [(s + 1) * total // num_stages - s * total // num_stages for s in range(num_stages)]
    least = 1 if num_stages + 2 <= total else 0  # embedding and head may have a stage for themselves where there are so many

    def loads(sizes: list[int]) -> list[float]:
        ends = list(accumulate(sizes, initial=0))
        cost = [sums[ends[s + 1]] - sums[ends[s]] for s in range(num_stages)]
        cost[0] += embedding
        cost[-1] += head + num_mtp * ((moe or dense) + head)
        return [sum(cost[stage] for stage in held) for held in ranks]

    now = loads(sizes)
    for _ in range(4 * num_stages):
        busiest = max(range(len(ranks)), key=now.__getitem__)
        moved = [
            (max(after), other, after)
            for give in ranks[busiest]
            if sizes[give] > least
            for take in ranks[min(range(len(ranks)), key=now.__getitem__)]
            if give != take
            for other in [[n - (s == give) + (s == take) for s, n in enumerate(sizes)]]
            for after in [loads(other)]
        ]
        if not moved or (best := min(moved))[0] >= max(now) - 1e-12:
            break
        _, sizes, now = best
    return tuple(sizes)


@lru_cache(maxsize=4096)
def ranks_of(layout: Layout) -> tuple[tuple[int, ...], ...]:
    """The stages at each place of the pipeline; with DualPipe each is worked on at two places, for half of the micro-batches."""
    return tuple(layout.stages_at(place) for place in range(layout.pp)) if layout.pp > 1 else ((0,),)


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """Seconds of one micro-batch at one stage; all-to-alls are in none of the first three."""

    forward: float
    input: float
    weight: float
    all_to_all: float
    """Of a forward; the input's gradient has as many."""
    all_to_all_again: float

    @property
    def whole(self) -> float:
        """Forward and backward, one op after the other."""
        return self.forward + self.input + self.weight + 2 * self.all_to_all + self.all_to_all_again


def least_seconds(setup: Setup, found: Blocks) -> float:
    """What no schedule can beat: the work of all layers, shared evenly by the pipeline's ranks, without any message between experts."""
    a = setup.architecture
    num_moe = a.num_moe_layers + (setup.num_mtp if a.num_experts else 0)
    counted = (
        (found.dense, a.num_layers - a.num_moe_layers + setup.num_mtp * (not a.num_experts)),
        (found.moe, num_moe),
        (found.head, 1 + setup.num_mtp),
    )
    work = sum(n * (time.compute_forward + time.compute_input + time.compute_weight) for time, n in counted)
    return setup.num_microbatches * work / setup.layout.pp


def stage_time(part: Part, found: Blocks, *, moe: bool) -> StageTime:
    """The sum over a stage's blocks; MTP modules are blocks like the last ones, each with logits of its own."""
    module = found.moe if moe else found.dense
    heads = (1 if part.head else 0) + part.num_mtp
    counted = (
        (found.dense, part.num_dense),
        (found.moe, part.num_moe),
        (module, part.num_mtp),
        (found.embedding, int(part.embedding) + part.num_mtp),
        (found.head, heads),
    )
    return StageTime(
        forward=sum(n * time.compute_forward for time, n in counted if n),
        input=sum(n * time.compute_input for time, n in counted if n),
        weight=sum(n * time.compute_weight for time, n in counted if n),
        all_to_all=sum(n * time.all_to_all for time, n in counted if n),
        all_to_all_again=sum(n * time.dispatch_again for time, n in counted if n),
    )
