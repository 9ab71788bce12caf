"""Where to cut a model into pipeline stages: so that the most expensive stage is as cheap as it can be.

The unit is the operations of one token (see `cost.flops`). A layer costs its products; the embedding's look-up nothing; the last stage
bears the head, once for itself and once for every MTP module, and these modules besides. In V3 that is as much as 3.9 layers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

from quintet.cost.flops import flops_per_token
from quintet.spec.layout import Layout
from quintet.spec.model import Model
from quintet.spec.stage import Part, Stage, stages_of

_NOMINAL_LENGTH = 4096
"""Tokens of a sequence for the cost of attention: one cut serves all phases of a run."""

WORTH_IT = 0.95
"""What the slowest stage must come down to before stages are cut anew, or a step before micro-batches change."""


@lru_cache
def pipeline_stages(model: Model, layout: Layout) -> tuple[Stage, ...]:
    """The stages of a legal layout: by its `cut`, or by cost."""
    if layout.cut is not None:
        return stages_of(model, layout.cut)
    layers, behind = layer_costs(model)
    return stages_of(model, cut(layers, layout.num_stages, behind=behind))


def part_at(model: Model, layout: Layout, place: int) -> Part:
    """What the ranks at a place of pp hold."""
    stages = pipeline_stages(model, layout)
    return Part(tuple(stages[stage] for stage in layout.stages_at(place)))


def layer_costs(model: Model) -> tuple[list[float], float]:
    """The operations of one token in each layer, forward and backward, and those of all that stands behind the last one."""
    flops = flops_per_token(model, sequence_length=min(model.max_context, _NOMINAL_LENGTH), mtp=True)
    attention = (flops.mla_projections + flops.core_attention) / model.num_layers
    moe = (flops.routed_experts + flops.shared_experts + flops.router) / max(model.num_moe_layers, 1)
    dense = flops.dense_ffn / max(model.num_dense_layers, 1)
    layers = [attention + (dense if layer < model.num_dense_layers else moe) for layer in range(model.num_layers)]
    return layers, float(flops.head + flops.mtp)


def recut(model: Model, layout: Layout, seconds: Sequence[float]) -> tuple[int, ...] | None:
    """Layers of each stage, by how long each of the layout's present stages takes; None where the slowest would gain less than 5 %.

    A layer is taken to cost its stage's seconds in proportion to its operations; what stands behind the last layer likewise. Since that may
    be far from true, stages move half of the way, and are timed again.
    """
    layers, behind = layer_costs(model)
    stages = pipeline_stages(model, layout)
    for stage, measured in zip(stages, seconds, strict=True):
        rate = measured / (sum(layers[layer] for layer in stage.layers) + stage.last * behind)
        for layer in stage.layers:
            layers[layer] *= rate
        behind *= rate if stage.last else 1
    counts = _half_way([len(stage.layers) for stage in stages], cut(layers, layout.num_stages, behind=behind))
    found = [sum(layers[layer] for layer in stage.layers) + stage.last * behind for stage in stages_of(model, counts)]
    return counts if max(found) < WORTH_IT * max(seconds) else None


def _half_way(now: Sequence[int], wanted: Sequence[int]) -> tuple[int, ...]:
    """Layers of each stage, where every border between stages goes half of its way, rounded up."""
    ends = zip(itertools.accumulate(now), itertools.accumulate(wanted), strict=True)
    moved = [0, *(a + (b - a + 1) // 2 if b > a else a - (a - b + 1) // 2 for a, b in ends)]
    return tuple(end - begin for begin, end in itertools.pairwise(moved))


def cut(costs: Sequence[float], num_stages: int, *, behind: float = 0.0) -> tuple[int, ...]:
    """Layers of each stage, so that the largest sum of `costs` of a stage, `behind` added to the last one's, is least; of such cuts the one
    with the least sum of squares. Every stage but the last has a layer.

    A dynamic programme over (stages, layers): (largest, sum of squares) of the best cut of the first layers into so many stages.
    """
    num_layers = len(costs)
    assert 1 <= num_stages <= num_layers, (num_stages, num_layers)
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    def with_stage(best: tuple[float, float], begin: int, end: int, extra: float) -> tuple[float, float]:
        cost = sums[end] - sums[begin] + extra
        return max(best[0], cost), best[1] + cost * cost

    best: list[dict[int, tuple[float, float]]] = [{0: (0.0, 0.0)}]
    begins: list[dict[int, int]] = [{}]
    for stage in range(num_stages):
        last = stage == num_stages - 1
        ends = [num_layers] if last else range(stage + 1, num_layers + 1)
        row: dict[int, tuple[float, float]] = {}
        origin: dict[int, int] = {}
        for end in ends:
            found = (math.inf, math.inf)
            for begin, before in best[-1].items():
                if begin < end or (last and begin == end):
                    here = with_stage(before, begin, end, behind if last else 0.0)
                    if here < found:
                        found, origin[end] = here, begin
            row[end] = found
        best.append(row)
        begins.append(origin)
    counts, end = [], num_layers
    for origin in reversed(begins[1:]):
        counts.append(end - origin[end])
        end = origin[end]
    return tuple(reversed(counts))
