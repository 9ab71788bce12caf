"""All figures of a CPU: those of the calls of `measured_calls`, and what real layers and a real loss take longer than what these count."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import fields, replace

import torch
import torch.distributed as dist

from quintet.cost.architecture import of_model
from quintet.model.block import Block
from quintet.model.moe import MixtureOfExperts
from quintet.model.rope import rotation
from quintet.ops.cross_entropy import head_loss
from quintet.ops.pointwise import REFERENCE
from quintet.parallel.collectives import Group
from quintet.parallel.expert import AllToAllDispatch
from quintet.parallel.mesh import make_mesh
from quintet.plan.block_time import Policy, moved_bytes
from quintet.plan.eager_time import eager_block
from quintet.plan.software import generation
from quintet.spec.cluster import Attention, Calls, Cluster, Eager, Gpu, Link, Rates
from quintet.spec.layout import Layout
from quintet.train import measured_calls as calls
from quintet.train.measured_calls import MODEL, NUM_EXPERTS, SEQUENCES
from quintet.train.stopwatch import Sample, both_ways, fit


def eager_figures() -> Eager:
    """Every kind of call, measured on this rank while the others of the default group do the same."""
    product, grouped = calls.products(), calls.grouped_products()
    core, ring = calls.core_attention(), calls.ring_attention()
    unknown = ("dense", "dense_backward", "moe", "moe_backward", "routed", "routed_backward", "loss")
    known = Eager(
        product=product[0],
        product_input=product[1],
        product_weight=product[2],
        grouped=grouped[0],
        grouped_input=grouped[1],
        grouped_weight=grouped[2],
        core=core[0],
        core_backward=core[1],
        ring=ring[0],
        ring_backward=ring[1],
        **dict.fromkeys(unknown, Calls()),
        accumulate=calls.accumulating(),
        update=calls.updating(),
        **calls.messages(make_mesh(Layout(dp=dist.get_world_size()))["dp"]),
    )
    group = make_mesh(Layout(dp=dist.get_world_size(), ep=dist.get_world_size()))["ep"]
    found: dict[str, Calls] = {"loss": rest_of_loss(known)}
    for name, moe, ep in (("dense", False, None), ("moe", True, None), ("routed", True, group)):
        found[name], found[f"{name}_backward"] = rest_of_layer(known, moe=moe, ep=ep)
    return replace(known, **found)


def rest_of_layer(known: Eager, *, moe: bool, ep: Group | None) -> tuple[Calls, Calls]:
    """What a layer takes besides products and attention, forward and backward, by the bytes of its element-wise functions; with `ep` one
    whose experts these ranks share, all of them at once, but without the time of the messages."""
    layer, ranks = Block(MODEL, dense=not moe, kernels=REFERENCE), 1 if ep is None else ep.size
    if ep is not None:
        assert isinstance(layer.ffn, MixtureOfExperts)
        layer.ffn.dispatch = AllToAllDispatch(ep, None, NUM_EXPERTS, MODEL.hidden_size)
    for name, parameter in layer.named_parameters():
        own = parameter[: NUM_EXPERTS // ranks] if "experts" in name else parameter
        parameter.data = (torch.ones_like(own) if "norm" in name else torch.randn_like(own) * 0.05).bfloat16()
    for buffer in layer.buffers():
        buffer.zero_()
    samples: tuple[list[Sample], list[Sample]] = ([], [])
    for sequences, length in SEQUENCES:
        turn, a = rotation(MODEL, torch.arange(length)), of_model(MODEL)
        x = torch.randn(sequences, length, MODEL.hidden_size).bfloat16().requires_grad_()
        both = both_ways(lambda x=x, turn=turn: layer(x, turn, None)[0], (x, *layer.parameters()))  # type: ignore[misc]
        policy = _policy(sequences, length, ep=ranks)
        silent = replace(known, accumulate=Calls(), exchange=Calls())
        one = eager_block(a, policy, _with(silent), generation("eager"), moe=moe)
        counted_seconds = (one.compute_forward, one.compute_input + one.compute_weight)
        for kind, seconds, counted, num_bytes in zip(samples, both, counted_seconds, moved_bytes(a, policy, moe=moe), strict=True):
            kind.append(Sample(seconds=max(seconds - counted, 0.0), num_bytes=num_bytes))
    return fit(samples[0]), fit(samples[1])


def rest_of_loss(known: Eager) -> Calls:
    """What the loss takes besides the head's products, by the logits' bytes."""
    head = torch.randn(MODEL.vocab_size, MODEL.hidden_size).bfloat16().requires_grad_()
    samples = []
    for tokens in (128, 512):
        hidden, labels = torch.randn(tokens, MODEL.hidden_size).bfloat16().requires_grad_(), torch.zeros(tokens, dtype=torch.int64)
        run = lambda: head_loss(hidden, head, labels, chunk=256, kernel=REFERENCE.cross_entropy)  # noqa: B023, E731
        numel = tokens * MODEL.vocab_size
        flops, num_bytes = 2 * numel * MODEL.hidden_size, 2 * (numel + (tokens + MODEL.vocab_size) * MODEL.hidden_size)
        counted = sum(kind.seconds(flops=flops, num_bytes=num_bytes) for kind in (known.product, known.product_input, known.product_weight))
        samples.append(Sample(seconds=max(sum(both_ways(run, (hidden, head))) - counted, 0.0), num_bytes=2 * numel))
    return fit(samples)


def _policy(sequences: int, length: int, *, ep: int) -> Policy:
    return Policy(
        tokens=sequences * length,
        sequence_length=length,
        tp=1,
        cp=1,
        ep=ep,
        expert_tp=1,
        expert_stride=1,
        gather_rows=False,
        precision="bf16",
        recompute="none",
        recompute_share=1.0,
    )


def _with(eager: Eager) -> Cluster:
    """A cluster of which only these figures are read."""
    gpu = Gpu(
        name="cpu",
        peak=Rates(bf16=1.0),
        reachable=Rates(bf16=1.0),
        memory_bytes=1.0,
        memory_bandwidth=1.0,
        num_cores=1,
        attention=Attention(forward=1, forward_half=0, backward=1, backward_half=0),
        watts=0.0,
        dollars_per_hour=0.0,
    )
    link = Link(bandwidth=1.0)
    return Cluster(gpu=gpu, link=link, network=link, eager=eager)


def mean(found: Sequence[Eager]) -> Eager | None:
    """Of the figures of several ranks; None of none."""

    def of(name: str) -> Calls:
        calls = [getattr(eager, name) for eager in found]
        return Calls(**{part.name: statistics.mean(getattr(one, part.name) for one in calls) for part in fields(Calls)})

    return Eager(**{field.name: of(field.name) for field in fields(Eager)}) if found else None
