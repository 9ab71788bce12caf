"""How many weights one rank of a layout holds, from the spec: the table of `spec.placement` in numbers.

Counts are by the ranks that hold the same values of a weight (the names of `spec.layout.HOLDERS`), because these share ZeRO's shards.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from quintet.cost.balance import part_at
from quintet.spec.layout import Layout
from quintet.spec.model import Model
from quintet.spec.stage import embedding_at_both_ends

BUCKET_NUMEL = 25_000_000
"""Elements of a rank (100 MB of fp32 gradients) at which ZeRO closes a bucket below stage 3, in a large model."""
NUM_BUCKETS = 8
"""In a small one buckets are closed at this part of a rank's weights, so that there is something to overlap."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """Weights of a rank, by unit: what is gathered and freed together at ZeRO's stage 3. Each counts elements by their holders."""

    units: tuple[Counter[str], ...]
    """Of every layer and MTP module here, in the order of forward."""
    root: Counter[str]
    """Of all else: embedding, last norm (those of MTP modules too) and head."""

    @property
    def total(self) -> Counter[str]:
        """Of all that the rank holds, before ZeRO."""
        return sum(self.units, self.root)


def held(model: Model, layout: Layout, *, place: int = 0) -> Held:
    """The weights of each rank at place `place` of the pipeline: equally many on all of them."""
    part, split = part_at(model, layout, place), _split_by_tp(layout)
    dense, moe = (block_weights(model, layout, moe=moe) for moe in (False, True))
    width, vocabulary = model.hidden_size, Counter({split: model.vocab_size * model.hidden_size // layout.tp})
    module = moe + Counter({"replicated": 2 * width + 2 * width**2})
    units = [dense if layer < model.num_dense_layers else moe for layer in part.layers]
    root: Counter[str] = Counter()
    if part.embedding:
        shared = layout.pp > 1 and embedding_at_both_ends(model)
        root += Counter({"both_ends": vocabulary[split]}) if shared else vocabulary
    if part.last:
        root += Counter({"replicated": width})
        root += Counter() if model.tie_embeddings else vocabulary
        units += [module] * model.num_mtp_modules
        root += Counter({"replicated": width * model.num_mtp_modules})
    return Held(units=tuple(units), root=root)


def block_weights(model: Model, layout: Layout, *, moe: bool) -> Counter[str]:
    """The weights that a rank holds of one layer, dense or mixture of experts."""
    width, heads = model.hidden_size, model.num_heads // layout.tp
    query, key_value = model.q_lora_rank, model.kv_lora_rank
    found = Counter({"replicated": width * (key_value + model.qk_rope_head_dim) + key_value + 2 * width})
    found["replicated"] += 0 if query is None else query * (width + 1)
    per_head = (query or width) * model.qk_head_dim + key_value * (model.qk_nope_head_dim + model.v_head_dim) + model.v_head_dim * width
    split = heads * per_head
    if moe:
        found["replicated"] += model.num_routed_experts * width
        split += 3 * width * model.num_shared_experts * model.expert_ffn_size // layout.tp
        routed = 3 * width * model.expert_ffn_size // layout.expert_tp * (model.num_routed_experts // layout.ep)
        found[_expert_holders(layout)] += routed
    else:
        split += 3 * width * model.dense_ffn_size // layout.tp
    found[_split_by_tp(layout)] += split
    return found


def num_shards(layout: Layout, holders: str) -> int:
    """Ranks that divide one set of ZeRO's shards among them, of weights with these holders: the size of the group `holders`.shard."""
    if not layout.zero:
        return 1
    replicas = layout.zero_ranks or layout.num_replicas
    return _times(layout, holders, max(replicas // layout.ep, 1) if holders.startswith("expert") else replicas)


def num_holders(layout: Layout, holders: str) -> int:
    """Ranks that hold the same values of a weight with these holders (of `both_ends`: at the ends)."""
    return _times(layout, holders, layout.expert_dp if holders.startswith("expert") else layout.num_replicas)


def _times(layout: Layout, holders: str, replicas: int) -> int:
    """Replicas, times the places of tp and of pp that hold the same."""
    places = layout.pp > 1 and (layout.arrangement == "mirror" or (holders == "both_ends" and layout.place_of(layout.num_stages - 1) > 0))
    return replicas * (1 if holders.endswith("split") or holders == "both_ends" else layout.tp) * (2 if places else 1)


def bucket_numel(num_weights: int) -> int:
    """Elements at which a bucket is closed, of a rank's weights before ZeRO."""
    return min(BUCKET_NUMEL, -(-num_weights // NUM_BUCKETS))


def _split_by_tp(layout: Layout) -> str:
    return "tp_split" if layout.tp > 1 else "replicated"


def _expert_holders(layout: Layout) -> str:
    if layout.ep > 1:
        return "expert_split" if layout.expert_tp > 1 else "expert"
    return "tp_split" if layout.expert_tp > 1 else "replicated"
