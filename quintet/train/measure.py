"""What this machine reaches, measured in some seconds: products, copies, attention and messages, as a cluster for the planner."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F

from quintet.spec.cluster import Attention, Cluster, Gpu, Link, Rates
from quintet.train.device import measured_peak, synchronize

LENGTHS = (256, 1024)
"""Sequence lengths between which attention's rate is told by a curve."""
MESSAGE_BYTES = (1 << 12, 1 << 23)
"""Of the messages that tell latency and bandwidth."""
ROUNDS = 5


def measured_cluster(device: torch.device, *, name: str, memory_bytes: float, num_devices: int, link: Link | None = None) -> Cluster:
    """A cluster of this machine's devices (on CPU: of ranks that share its cores alike), with measured rates.

    Rates are those of the current number of threads. Without a link, messages are taken to be as fast as copies.
    """
    peak = Rates(fp32=measured_peak(device, "fp32"), bf16=measured_peak(device, "bf16"))
    copied = copy_bandwidth(device)
    link = link or Link(bandwidth=copied, share=1.0, latency=1e-5)
    gpu = Gpu(
        name=name,
        peak=peak,
        reachable=Rates(fp32=1.0, bf16=1.0),
        sustained=1.0,
        memory_bytes=memory_bytes,
        memory_bandwidth=copied,
        num_cores=torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1,
        attention=attention_curve(device, peak=peak.bf16),
        watts=0.0,
        dollars_per_hour=0.0,
    )
    return Cluster(gpu=gpu, num_gpus=num_devices, domain=max(1, num_devices), link=link, network=link)


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

        def back(out: torch.Tensor = out, q: torch.Tensor = q, gradient: torch.Tensor = gradient) -> None:
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


def link_of(short: float, long: float) -> Link:
    """The link on which all-gathers of both sizes of MESSAGE_BYTES take these seconds."""
    return Link(bandwidth=MESSAGE_BYTES[1] / 2 / max(long - short, 1e-9), share=1.0, latency=min(short, 1.0))


def gather_seconds() -> tuple[float, float]:
    """Seconds of an all-gather of each size, as a rank that `run_on_ranks` started."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = []
    for size in MESSAGE_BYTES:
        own = torch.ones(size // 2, dtype=torch.uint8)
        parts = [torch.empty_like(own) for _ in range(2)]
        found.append(_least(lambda own=own, parts=parts: dist.all_gather(parts, own), torch.device("cpu")))  # type: ignore[misc]
    dist.destroy_process_group()
    return found[0], found[1]


def _least(work: Callable[[], object], device: torch.device) -> float:
    """The least seconds of some rounds, after one that does not count."""
    work()
    best = float("inf")
    for _ in range(ROUNDS):
        synchronize(device)
        begin = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best
