"""What this machine reaches, measured in less than a minute, as a cluster for the planner: products, copies and attention of a device, and
of a CPU every kind of call that a step is made of, with all its ranks at work at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from quintet.spec.cluster import Attention, Cluster, Eager, Gpu, Link, Rates
from quintet.spec.run import Train
from quintet.train.device import measured_peak, prepare
from quintet.train.measured_layers import eager_figures, mean
from quintet.train.stopwatch import least

LENGTHS = (256, 1024)
"""Sequence lengths between which attention's rate is told by a curve."""


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
    first, eager = found[0], mean([one.eager for one in found if one.eager is not None])
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
    return 2 * num_bytes / least(lambda: target.copy_(source), device)


def attention_curve(device: torch.device, *, peak: float, heads: int = 8, width: int = 64) -> Attention:
    """Share x S / (S + half) through the rates of causal attention at two lengths, forward and backward."""
    forward, backward = [], []
    for length in LENGTHS:
        q, k, v = (torch.randn(1, heads, length, width, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        flops = 2 * length * length * heads * width  # half of both products
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        gradient = torch.ones_like(out)
        forward.append(flops / least(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True), device) / peak)  # type: ignore[misc]

        def back(out: Tensor = out, q: Tensor = q, gradient: Tensor = gradient) -> None:
            torch.autograd.grad(out, q, gradient, retain_graph=True)

        backward.append(2.5 * flops / least(back, device) / peak)
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
