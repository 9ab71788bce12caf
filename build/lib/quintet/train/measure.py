"""What this machine reaches, measured in less than a minute, as a cluster for the planner: products, copies and attention of a device, and
of a CPU every kind of call that a step is made of, with all its ranks at work at once, since they share memory and caches.

Figures of a CPU (`spec.cluster.Eager`) are fitted to a few sizes each by least squares of relative errors. Weights come from a pool that no
cache holds, as in a step. What a layer does besides products and attention is what a real one of each kind takes longer.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw

from quintet.cost.architecture import of_model
from quintet.model.block import Block
from quintet.model.moe import MixtureOfExperts
from quintet.model.rope import rotation
from quintet.ops.attention import attend_block, attend_block_backward, attention
from quintet.ops.cross_entropy import head_loss
from quintet.ops.pointwise import REFERENCE
from quintet.parallel import collectives
from quintet.parallel.collectives import Group
from quintet.parallel.expert import AllToAllDispatch
from quintet.parallel.mesh import make_mesh
from quintet.plan.block_time import Policy, moved_bytes
from quintet.plan.eager_time import core_work, eager_block
from quintet.plan.software import generation
from quintet.spec.cluster import Attention, Calls, Cluster, Eager, Gpu, Link, Rates
from quintet.spec.layout import Layout
from quintet.spec.model import Model
from quintet.spec.run import Train
from quintet.train.device import measured_peak, prepare, synchronize

LENGTHS = (256, 1024)
"""Sequence lengths between which attention's rate is told by a curve."""
ROUNDS = 5
POOL_BYTES = 1 << 26
"""Of weights and gradients that take turns, so that no cache holds them."""
PRODUCTS = tuple(itertools.product((64, 256, 1024), ((256, 256), (512, 128), (128, 512), (1024, 256), (256, 1024))))
"""Rows; outputs and inputs."""
GROUPED = tuple(itertools.product((8, 32, 128), ((512, 256), (256, 256), (256, 128))))
"""Rows of each expert; outputs and inputs."""
NUM_EXPERTS = 16
MESSAGES = (1 << 12, 1 << 17, 1 << 20, 1 << 23)
"""Bytes of a whole message."""
SEQUENCES = ((1, 64), (1, 256), (4, 256))
"""Sequences and tokens of each, that a layer and attention are measured with."""
MODEL = Model(
    vocab_size=4096,
    hidden_size=256,
    num_layers=2,
    num_dense_layers=1,
    num_heads=4,
    q_lora_rank=128,
    kv_lora_rank=64,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    dense_ffn_size=768,
    expert_ffn_size=256,
    num_routed_experts=NUM_EXPERTS,
    num_shared_experts=1,
    num_experts_per_token=4,
)
"""Whose layers are measured."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What was measured: seconds, and what they went to."""

    seconds: float
    calls: float = 1.0
    flops: float = 0.0
    num_bytes: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a device, or one of several ranks of a CPU, reaches."""

    peak: Rates
    memory_bandwidth: float
    attention: Attention
    eager: Eager | None = None


def device_figures(device: torch.device) -> Figures:
    """Of a device alone."""
    peak = Rates(fp32=measured_peak(device, "fp32"), bf16=measured_peak(device, "bf16"))
    return Figures(peak=peak, memory_bandwidth=copy_bandwidth(device), attention=attention_curve(device, peak=peak.bf16))


def rank_figures() -> Figures:
    """Of one rank of a CPU, as `run_on_ranks` started it and the others."""
    device = prepare(Train(device="cpu"))
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    found = replace(device_figures(device), eager=eager_figures())
    dist.barrier()
    dist.destroy_process_group()
    return found


def measured_cluster(found: Sequence[Figures], *, name: str, memory_bytes: float, num_devices: int, num_cores: int) -> Cluster:
    """A cluster of devices that have these figures (of ranks: their mean), each with so much memory and so many cores."""
    first, eager = found[0], _mean([one.eager for one in found if one.eager is not None])
    link = Link(bandwidth=first.memory_bandwidth, share=1.0, latency=1e-5)
    if eager is not None and eager.gather.per_byte:
        link = Link(bandwidth=1 / eager.gather.per_byte, share=1.0, latency=eager.gather.call)
    gpu = Gpu(
        name=name,
        peak=first.peak,
        reachable=Rates(fp32=1.0, bf16=1.0),
        sustained=1.0,
        memory_bytes=memory_bytes,
        memory_bandwidth=first.memory_bandwidth,
        num_cores=num_cores,
        attention=first.attention,
        watts=0.0,
        dollars_per_hour=0.0,
    )
    return Cluster(gpu=gpu, num_gpus=num_devices, domain=max(1, num_devices), link=link, network=link, eager=eager)


def copy_bandwidth(device: torch.device, *, num_bytes: int = 1 << 27) -> float:
    """Bytes read and written per second by a copy that no cache holds."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / _least(lambda: target.copy_(source), device)


def attention_curve(device: torch.device, *, peak: float, heads: int = 8, width: int = 64) -> Attention:
    """Share x S / (S + half) through the rates of causal attention at two lengths, forward and backward."""
    forward, backward = [], []
    for length in LENGTHS:
        q, k, v = (torch.randn(1, heads, length, width, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        flops = 2 * length * length * heads * width  # half of both products
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        gradient = torch.ones_like(out)
        forward.append(flops / _least(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True), device) / peak)  # type: ignore[misc]

        def back(out: Tensor = out, q: Tensor = q, gradient: Tensor = gradient) -> None:
            torch.autograd.grad(out, q, gradient, retain_graph=True)

        backward.append(2.5 * flops / _least(back, device) / peak)
    share, half = _through(forward)
    share_back, half_back = _through(backward)
    return Attention(forward=share, forward_half=half, backward=share_back, backward_half=half_back)


def _through(rates: list[float]) -> tuple[float, float]:
    """Share and half of the curve through both rates; a flat one where the longer length is no faster."""
    (short, long), (few, many) = LENGTHS, rates
    if many <= few:
        return many, 0.0
    slope = few / short - many / long
    half = min((many - few) / slope, long) if slope > 0 else float(long)
    return many * (1 + half / long), half


# ----------------------------------------------------------------------------------------------- a CPU's calls


def eager_figures() -> Eager:
    """Every kind of call, measured on this rank while the others of the default group do the same."""
    product, grouped = products(), grouped_products()
    core, ring = core_attention(), ring_attention()
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
        accumulate=accumulating(),
        update=updating(),
        **messages(make_mesh(Layout(dp=dist.get_world_size()))["dp"]),
    )
    group = make_mesh(Layout(dp=dist.get_world_size(), ep=dist.get_world_size()))["ep"]
    found: dict[str, Calls] = {"loss": rest_of_loss(known)}
    for name, moe, ep in (("dense", False, None), ("moe", True, None), ("routed", True, group)):
        found[name], found[f"{name}_backward"] = rest_of_layer(known, moe=moe, ep=ep)
    return replace(known, **found)


def products() -> list[Calls]:
    """Of a product with a weight, of its input's gradient and of its weight's."""
    samples: list[list[Sample]] = [[], [], []]
    for rows, (outputs, inputs) in PRODUCTS:
        weights = _pool(outputs, inputs)
        x, gradient = (torch.randn(rows, width).bfloat16() for width in (inputs, outputs))
        works = (lambda: x @ next(weights).t(), lambda: gradient @ next(weights), lambda: gradient.t() @ x)  # noqa: B023
        work, moved = 2 * rows * outputs * inputs, 2 * (rows * (outputs + inputs) + outputs * inputs)
        for kind, one in zip(samples, works, strict=True):
            kind.append(Sample(seconds=_seconds(one), flops=work, num_bytes=moved))
    return [fit(kind) for kind in samples]


def grouped_products() -> list[Calls]:
    """The same of a grouped product; a call for each expert."""
    samples: list[list[Sample]] = [[], [], []]
    for rows, (outputs, inputs) in GROUPED:
        weights = _pool(NUM_EXPERTS, outputs, inputs)
        x, gradient = (torch.randn(NUM_EXPERTS * rows, width).bfloat16() for width in (inputs, outputs))
        ends = torch.arange(1, NUM_EXPERTS + 1, dtype=torch.int32) * rows
        works = (
            lambda: F.grouped_mm(x, next(weights).transpose(1, 2), offs=ends),  # noqa: B023
            lambda: F.grouped_mm(gradient, next(weights), offs=ends),  # noqa: B023
            lambda: F.grouped_mm(gradient.t(), x, offs=ends),  # noqa: B023
        )
        work = 2 * NUM_EXPERTS * rows * outputs * inputs
        moved = 2 * NUM_EXPERTS * (rows * (outputs + inputs) + outputs * inputs)
        for kind, one in zip(samples, works, strict=True):
            kind.append(Sample(seconds=_seconds(one), calls=NUM_EXPERTS, flops=work, num_bytes=moved))
    return [fit(kind) for kind in samples]


def core_attention() -> tuple[Calls, Calls]:
    """Forward and backward."""
    samples: tuple[list[Sample], list[Sample]] = ([], [])
    for sequences, length in SEQUENCES:
        q, k, v = _heads(sequences, length)
        calls, flops = core_work(sequences, length, heads=MODEL.num_heads, widths=MODEL.qk_head_dim + MODEL.v_head_dim)
        both = _both(lambda q=q, k=k, v=v: attention(q, k, v, scale=0.1), (q, k, v))  # type: ignore[misc]
        for kind, seconds, factor in zip(samples, both, (1, 2.5), strict=True):
            kind.append(Sample(seconds=seconds, calls=calls, flops=factor * flops))
    return fit(samples[0]), fit(samples[1])


def ring_attention() -> tuple[Calls, Calls]:
    """One part of a ring, forward and backward."""
    samples: tuple[list[Sample], list[Sample]] = ([], [])
    for sequences, length in SEQUENCES:
        q, k, v = (x.detach() for x in _heads(sequences, length))
        calls, flops = core_work(sequences, length, heads=MODEL.num_heads, widths=MODEL.qk_head_dim + MODEL.v_head_dim)
        out, lse = attend_block(q, k, v, scale=0.1, causal=True)
        works = (
            lambda: attend_block(q, k, v, scale=0.1, causal=True),  # noqa: B023
            lambda: attend_block_backward(out, q, k, v, out, lse, scale=0.1, causal=True),  # noqa: B023
        )
        for kind, one, factor in zip(samples, works, (1, 2.5), strict=True):
            kind.append(Sample(seconds=_seconds(one), calls=calls, flops=factor * flops))
    return fit(samples[0]), fit(samples[1])


def accumulating() -> Calls:
    """Adding a weight's gradient in bf16 to one in fp32."""
    numel = 1 << 18
    sums, gradients = itertools.cycle(torch.zeros(POOL_BYTES // 4).split(numel)), torch.randn(numel).bfloat16()
    return Calls(per_byte=_seconds(lambda: next(sums).add_(gradients)) / (2 * numel))


def updating() -> Calls:
    """The gradient's norm, AdamW and the new weights in bf16, as `train.optimizer` goes through a bucket."""
    numel = POOL_BYTES // 16
    master, gradient, first, second = (torch.zeros(numel) for _ in range(4))
    weights, count = torch.zeros(numel, dtype=torch.bfloat16), torch.tensor(1.0)

    def update() -> None:
        torch._foreach_norm([gradient], 2, dtype=torch.float32)
        gradient.mul_(0.5)
        adamw(
            [master],
            [gradient],
            [first],
            [second],
            [],
            [count],
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.95,
            lr=1e-3,
            weight_decay=0.1,
            eps=1e-8,
            maximize=False,
        )
        weights.copy_(master)

    return Calls(per_byte=_seconds(update) / (2 * numel))


def messages(group: Group) -> dict[str, Calls]:
    """Each kind of message, by the bytes that this rank sends; nothing where it is alone."""
    kinds: dict[str, tuple[Callable[[Tensor], object], float]] = {
        "gather": (lambda whole: collectives.all_gather(whole[: len(whole) // group.size], group), 1.0),
        "scatter": (lambda whole: collectives.reduce_scatter(whole, group), 1.0),
        "reduce": (lambda whole: collectives.all_reduce(whole, group), 2.0),
        "exchange": (lambda whole: collectives.all_to_all(whole, group, send=even, receive=even), 1.0),
        "send": (lambda whole: collectives.Shift([whole], group).wait(), group.size / max(1, group.size - 1)),
    }
    if group.size == 1:
        return dict.fromkeys(kinds, Calls())
    found = {}
    for name, (send, times) in kinds.items():
        samples = []
        for size in MESSAGES:
            numel = size // 4 // group.size * group.size
            whole, even = torch.zeros(numel), [numel // group.size] * group.size
            seconds = _together(lambda send=send, whole=whole: send(whole))  # type: ignore[misc]
            samples.append(Sample(seconds=seconds, num_bytes=times * 4 * numel * (group.size - 1) / group.size))
        found[name] = fit(samples)
    return found


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
        both = _both(lambda x=x, turn=turn: layer(x, turn, None)[0], (x, *layer.parameters()))  # type: ignore[misc]
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
        samples.append(Sample(seconds=max(sum(_both(run, (hidden, head))) - counted, 0.0), num_bytes=2 * numel))
    return fit(samples)


def fit(samples: Sequence[Sample]) -> Calls:
    """The figures, none of them negative, with the least squares of relative errors."""
    weight = torch.tensor([1 / max(sample.seconds, 1e-9) for sample in samples], dtype=torch.float64)
    rows = torch.tensor([[s.calls, s.flops, s.num_bytes] for s in samples], dtype=torch.float64) * weight[:, None]
    best, chosen = float("inf"), torch.zeros(3, dtype=torch.float64)
    for used in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in (1, 2, 3)):
        columns = rows[:, list(used)]
        scale = columns.norm(dim=0)
        if (scale == 0).any():
            continue
        found = torch.linalg.lstsq(columns / scale, torch.ones(len(samples), 1, dtype=torch.float64)).solution[:, 0] / scale
        error = float((columns @ found - 1).square().sum())
        if (found >= 0).all() and error < best - 1e-9:
            best, chosen = error, torch.zeros(3, dtype=torch.float64).index_put((torch.tensor(used),), found)
    call, per_flop, per_byte = chosen.tolist()
    return Calls(call=call, per_flop=per_flop, per_byte=per_byte)


def _pool(*shape: int) -> itertools.cycle[Tensor]:
    """Weights in bf16 that take turns."""
    numel = torch.Size(shape).numel()
    return itertools.cycle(torch.full((max(1, POOL_BYTES // 2 // numel), *shape), 0.05, dtype=torch.bfloat16))


def _heads(sequences: int, length: int) -> list[Tensor]:
    widths = (MODEL.qk_head_dim, MODEL.qk_head_dim, MODEL.v_head_dim)
    return [torch.randn(sequences, MODEL.num_heads, length, width).bfloat16().requires_grad_() for width in widths]


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


def _mean(found: Sequence[Eager]) -> Eager | None:
    def of(name: str) -> Calls:
        calls = [getattr(eager, name) for eager in found]
        return Calls(**{part.name: statistics.mean(getattr(one, part.name) for one in calls) for part in fields(Calls)})

    return Eager(**{field.name: of(field.name) for field in fields(Eager)}) if found else None


def _both(forward: Callable[[], Tensor], inputs: Iterable[Tensor]) -> tuple[float, float]:
    """Median seconds of a forward and of its backward to the inputs."""
    held, there, back = tuple(inputs), list[float](), list[float]()
    for _ in range(3 * ROUNDS):
        begin = _now()
        out = forward()
        middle = _now()
        torch.autograd.grad(out, held, torch.ones_like(out), allow_unused=True)
        there.append(middle - begin)
        back.append(_now() - middle)
    return statistics.median(there[1:]), statistics.median(back[1:])


def _seconds(work: Callable[[], object]) -> float:
    """Median seconds of a call, after one that does not count, in rounds of some milliseconds."""
    work()
    times, begin = 4, _now()
    for _ in range(times):
        work()
    times = max(1, min(100, round(0.004 * times / max(_now() - begin, 1e-9))))
    found = []
    for _ in range(ROUNDS):
        begin = _now()
        for _ in range(times):
            work()
        found.append((_now() - begin) / times)
    return statistics.median(found)


def _together(send: Callable[[], object]) -> float:
    """The least seconds of a message between ranks, which any other program may hold up."""
    found = []
    for _ in range(4 * ROUNDS):
        begin = time.perf_counter()
        send()
        found.append(time.perf_counter() - begin)
    return min(found)


def _now() -> float:
    """Seconds of this thread on its core, where it computes alone, so that other programs disturb less; else of the clock."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _least(work: Callable[[], object], device: torch.device) -> float:
    """The least seconds of some rounds, after one that does not count."""
    work()
    best = float("inf")
    for _ in range(ROUNDS):
        synchronize(device)
        begin = _now()
        work()
        synchronize(device)
        best = min(best, _now() - begin)
    return best
