"""Seconds that a device takes for a matrix product, for attention and for moving bytes, and a group of devices for a collective."""

from __future__ import annotations

import math
from functools import lru_cache

from quintet.spec.cluster import Cluster, Gpu, Link

TILES = ((128, 256), (256, 128), (128, 128))
"""Rows and columns of the output that one core computes at a time."""
SMALL_TILE = 0.9
"""Rate of the smallest tile against the others."""


@lru_cache(maxsize=200_000)
def product_seconds(
    rows: float, outputs: float, inputs: float, *, rate: float, bandwidth: float, cores: int, size: float, ramp: float, count: int = 1
) -> float:
    """Seconds of `count` products [rows, inputs] x [inputs, outputs] in one launch, with `rate` operations and `bandwidth` bytes per
    second at best, on `cores` cores, elements of `size` bytes: the larger of arithmetic and traffic.

    Arithmetic comes in waves of tiles, one per core; a wave that is not full takes as long as a full one.
    """
    if rows <= 0 or outputs <= 0 or inputs <= 0:
        return 0.0
    best = math.inf
    for high, wide in TILES:
        tiles = count * math.ceil(rows / high) * math.ceil(outputs / wide)
        # Persistent kernels begin the next wave early, so that half of an incomplete wave's idle time is won back.
        exact = tiles / cores
        waves = (exact + math.ceil(exact)) / 2 if exact > 1 else 1.0
        work = 2 * high * wide * inputs * waves * cores
        best = min(best, work / (rate if high * wide > 128 * 128 else rate * SMALL_TILE))
    arithmetic = best * (1 + ramp / (size * inputs))
    traffic = count * (rows * inputs + inputs * outputs + rows * outputs) * size / bandwidth
    return max(arithmetic, traffic)


def attention_seconds(gpu: Gpu, flops: float, *, keys: float, backward: bool) -> float:
    """Seconds of fused attention with `flops` operations where sequences, or the parts of a ring, have `keys` keys."""
    curve = gpu.attention
    share, half = (curve.backward, curve.backward_half) if backward else (curve.forward, curve.forward_half)
    return flops / (gpu.peak.bf16 * share * keys / (keys + half))


def within(cluster: Cluster, *, ranks: int, stride: int) -> int:
    """Ranks of a group with this stride that share a domain of fast links."""
    return max(1, min(ranks, cluster.domain // stride))


def gather_seconds(cluster: Cluster, num_bytes: float, *, ranks: int, stride: int) -> float:
    """Seconds of an all-gather (or reduce-scatter) whose whole is `num_bytes`, among `ranks` ranks that lie `stride` apart.

    Inside a domain each rank passes all of it on; between domains the cards of the group's ranks there share it.
    """
    if ranks <= 1:
        return 0.0
    near = within(cluster, ranks=ranks, stride=stride)
    domains = math.ceil(ranks / near)
    seconds = num_bytes * (near - 1) / near / cluster.link.effective + _latency(cluster.link, near)
    if domains > 1:
        seconds = max(seconds, num_bytes * (domains - 1) / domains / (near * cluster.network.effective)) + _latency(
            cluster.network, domains
        )
    return seconds


def exchange_seconds(cluster: Cluster, *, far_bytes: float, near_bytes: float, domains: int) -> float:
    """Seconds of an all-to-all in which a rank sends so much to other domains and to others in its own; both go on at once."""
    far = far_bytes / cluster.network.effective + (cluster.network.latency if far_bytes else 0.0)
    near = near_bytes / cluster.link.effective + (cluster.link.latency if near_bytes else 0.0)
    return max(far, near) + (cluster.link.latency if domains > 1 else 0.0)


def send_seconds(cluster: Cluster, num_bytes: float, *, stride: int) -> float:
    """Seconds of a message to the rank `stride` further."""
    link = cluster.link if stride < cluster.domain else cluster.network
    return link.latency + num_bytes / link.effective


def _latency(link: Link, ranks: int) -> float:
    return link.latency * (1 + math.log2(ranks)) if ranks > 1 else 0.0
