"""Hypothesis strategies for valid models and runs; other tests draw from them too."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

from quintet.spec.layout import ARRANGEMENT, Layout, PipelineName
from quintet.spec.model import Model, Yarn
from quintet.spec.run import Checkpoint, Data, Evaluation, Monitor, Optimizer, Phase, Run, Source, Train

names = st.from_regex(r"[a-zA-Z0-9_-]{1,12}", fullmatch=True)
texts = st.text(st.characters(codec="utf-8"), max_size=20)
folders = st.text(st.characters(codec="utf-8", min_codepoint=1), min_size=1, max_size=20).filter(str.strip)
positive_floats = st.floats(min_value=1e-9, max_value=1e9)
shares = st.floats(min_value=0.0, max_value=1.0)


def small(low: int, high: int) -> st.SearchStrategy[int]:
    """Whole numbers from low to high."""
    return st.integers(min_value=low, max_value=high)


@st.composite
def models(draw: st.DrawFn, *, largest: int = 64) -> Model:
    """Valid models whose widths are at most `largest`."""
    group_size, num_groups = draw(small(2, 8)), draw(small(1, 4))
    num_groups_per_token = draw(small(1, num_groups))
    num_layers = draw(small(1, 5))
    width = small(1, largest)
    return Model(
        vocab_size=draw(width),
        hidden_size=draw(width),
        num_layers=num_layers,
        num_dense_layers=draw(small(0, num_layers)),
        num_heads=draw(small(1, 8)),
        q_lora_rank=draw(st.none() | width),
        kv_lora_rank=draw(width),
        qk_nope_head_dim=draw(width),
        qk_rope_head_dim=2 * draw(width),
        v_head_dim=draw(width),
        dense_ffn_size=draw(width),
        expert_ffn_size=draw(width),
        num_routed_experts=group_size * num_groups,
        num_shared_experts=draw(small(0, 3)),
        num_experts_per_token=draw(small(1, group_size * num_groups_per_token)),
        num_groups=num_groups,
        num_groups_per_token=num_groups_per_token,
        routed_scaling_factor=draw(positive_floats),
        normalize_gates=draw(st.booleans()),
        num_mtp_modules=draw(small(0, 3)),
        tie_embeddings=draw(st.booleans()),
        max_context=draw(small(1, 4096)),
        yarn=draw(st.none() | st.builds(Yarn, factor=st.floats(min_value=1, max_value=100), original_context=small(1, 4096))),
    )


@st.composite
def curves(draw: st.DrawFn) -> tuple[str, ...]:
    """Sentences of a valid curve, at least 1 everywhere."""
    unit = draw(st.sampled_from(["steps", "tokens", "%"]))
    most = 100 if unit == "%" else 10**6
    bounds = sorted(draw(st.lists(small(1, most), max_size=4, unique=True)))
    value = st.floats(min_value=1, max_value=1e4).map(repr)
    pieces = st.one_of(
        value,
        value.map("linear from 1 to {}".format) | value.map("cosine from 2.5 to {}".format),
    )
    middle = [f"{draw(pieces)} until {bound}{'%' if unit == '%' else ' ' + unit}" for bound in bounds]
    last = draw(value | st.just("hold")) if bounds else draw(value)
    return (*middle, last)


@st.composite
def phases(draw: st.DrawFn, *, max_context: int) -> Phase:
    """Valid phases for a model of `max_context`."""
    return Phase(
        name=draw(texts),
        length=draw(st.sampled_from(["1 steps", "600 steps", "14.8T tokens", "20M tokens"])),
        sequence_length=draw(small(1, max_context)),
        batch=draw(curves()),
        learning_rate=draw(curves()),
        mtp_weight=draw(curves()),
        bias_speed=draw(curves()),
    )


def divisor(count: int, *, at_most: int = 8) -> st.SearchStrategy[int]:
    """A number that divides `count`."""
    return st.sampled_from([d for d in range(1, at_most + 1) if count % d == 0])


@st.composite
def pipelines(draw: st.DrawFn, num_layers: int) -> tuple[int, PipelineName | None, int]:
    """Ways to split so many layers, a schedule that does it, and its chunks."""
    schedule = draw(st.sampled_from(sorted(ARRANGEMENT)))
    chunks = draw(small(2, 3))
    per_rank = {"line": 1, "loop": chunks, "v": 2, "mirror": 1}[ARRANGEMENT[schedule]]
    pp = draw(small(1, max(num_layers // per_rank, 1)))
    if pp == 1 or (ARRANGEMENT[schedule] == "mirror" and pp % 2):
        return 1, draw(st.sampled_from([None, schedule])), chunks
    return pp, schedule, chunks


@st.composite
def layouts(draw: st.DrawFn, model: Model, sequence_lengths: list[int]) -> Layout:
    """Legal layouts of a model."""
    length = math.gcd(*sequence_lengths)
    cp = draw(divisor(length // 2)) if length % 2 == 0 else 1
    split = math.gcd(model.num_heads, model.vocab_size, model.num_shared_experts * model.expert_ffn_size, length // cp)
    tp = draw(divisor(math.gcd(split, model.dense_ffn_size if model.num_dense_layers else 0)))
    ep = draw(divisor(model.num_routed_experts))
    dp = ep * draw(small(1, 4))
    pp, schedule, chunks = draw(pipelines(model.num_layers))
    zero: Any = draw(st.sampled_from([0, 1, 2, 3] if pp == 1 else [0, 1]))
    return Layout(
        dp=dp,
        tp=tp,
        pp=pp,
        schedule=schedule,
        chunks=chunks,
        ep=ep,
        cp=cp,
        expert_tp=draw(st.sampled_from([1, tp])) if model.expert_ffn_size % tp == 0 else 1,
        zero=zero,
        zero_ranks=draw(st.sampled_from([None, ep, dp * cp])) if zero else None,
        node_size=draw(st.sampled_from([1, 10**6])),
    )


sources = st.builds(
    Source,
    name=names,
    paths=st.lists(folders, min_size=1, max_size=3).map(tuple),
    domain=st.sampled_from(["code", "prose"]),
    weight=positive_floats,
    text_key=texts,
)
data = st.builds(
    Data,
    sources=st.lists(sources, min_size=1, max_size=3, unique_by=lambda source: source.name).map(tuple),
    directory=folders,
    tokenizer=st.none() | texts,
    held_out=shares,
    fim_rate=shares,
    document_mask=st.booleans(),
    strict=st.booleans(),
    max_document_bytes=small(1, 10**9),
)
optional_counts = st.none() | small(1, 10**6)
trains = st.builds(
    Train,
    steps=optional_counts,
    micro_batch=small(1, 64),
    precision=st.sampled_from(["bf16", "fp32"]),
    recompute=st.sampled_from(["none", "selective", "full"]),
    balance_weight=shares,
    loss_chunk=small(1, 4096),
    compile=st.booleans(),
    device=st.sampled_from(["auto", "cpu", "cuda"]),
    num_threads=st.none() | small(1, 4096),
    arrival_timeout=st.none() | positive_floats,
)


@st.composite
def runs(draw: st.DrawFn) -> Run:
    """Valid runs, every section drawn."""
    model = draw(models())
    curriculum = draw(st.lists(phases(max_context=model.max_context), min_size=1, max_size=2))
    optimizer = st.builds(Optimizer, beta1=shares, beta2=shares, eps=positive_floats, weight_decay=shares, clip_norm=positive_floats)
    return Run(
        name=draw(names.filter(lambda name: not name.startswith("."))),
        model=model,
        data=draw(data),
        phases=tuple(curriculum),
        optimizer=draw(optimizer),
        train=draw(trains),
        evaluation=draw(st.builds(Evaluation, every=optional_counts, num_sequences=small(1, 100))),
        checkpoint=draw(st.builds(Checkpoint, every=optional_counts, keep_last=small(1, 9), keep_every=optional_counts)),
        monitor=draw(st.builds(Monitor, live=st.booleans(), prompts=st.lists(texts, max_size=3).map(tuple))),
        layout=draw(layouts(model, [phase.sequence_length for phase in curriculum])),
        directory=draw(folders),
        seed=draw(small(0, 2**63 - 1)),
    )
