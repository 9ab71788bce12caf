"""What a run is planned on: devices, the links between them, how many there are, and what they cost; a catalogue, or a cluster.toml.

A cluster is domains of devices with fast links (NVLink inside one node, or one rack of GB200) that network cards join. Peaks and memory are
the vendors' dense figures; the reachable share of a peak is the best matrix product that stas00/ml-engineering measured (github.com/
stas00/ml-engineering, compute/accelerator/benchmarks), the others are marked as assumed. Prices are round figures of the rental
market, not offers: give your own in a cluster.toml.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import tomli_w

from quintet.errors import SpecError, UsageError, did_you_mean

TERA, GIGA = 1e12, 1e9
_MOST_DEVICES = 1_048_576


@dataclass(frozen=True, kw_only=True)
class Attention:
    """How near a fused attention kernel comes to the bf16 peak: share x S / (S + half) for S keys."""

    forward: float
    """Share of the peak that a forward of long sequences reaches."""
    forward_half: float
    """Sequence length at which half of it is reached."""
    backward: float
    """The same of a backward."""
    backward_half: float


@dataclass(frozen=True, kw_only=True)
class Rates:
    """A figure for each precision of a product; absent: the device does not have it."""

    fp32: float | None = None
    bf16: float
    fp8: float | None = None
    nvfp4: float | None = None

    def of(self, precision: str) -> float | None:
        """The figure for one precision."""
        found: float | None = getattr(self, precision)
        return found

    def items(self) -> list[tuple[str, float]]:
        """What is there, by precision."""
        return [(field.name, value) for field in fields(self) if (value := self.of(field.name)) is not None]


@dataclass(frozen=True, kw_only=True)
class Link:
    """A device's way to others."""

    bandwidth: float
    """Bytes per second that a device sends, one way, by its data sheet."""
    share: float = 0.8
    """The part of it that long messages reach."""
    latency: float = 5e-6
    """Seconds of the shortest message."""

    def __post_init__(self) -> None:
        _positive(self, "bandwidth")
        if not 0 < self.share <= 1:
            raise SpecError(f"share ({self.share}) must lie above 0 and at most at 1")
        if not 0 <= self.latency < math.inf:
            raise SpecError(f"latency ({self.latency}) must be finite and not negative, in seconds")

    @property
    def effective(self) -> float:
        """Bytes per second of long messages."""
        return self.bandwidth * self.share


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One device."""

    name: str
    """Name in reports."""
    peak: Rates
    """Dense operations per second by the data sheet."""
    reachable: Rates
    """The share of each peak that the best matrix product reaches."""
    sustained: float = 0.9
    """Share of that rate which products keep up inside a step, under the power limit and beside other kernels; fitted per generation."""
    memory_bytes: float
    """Bytes of device memory, as its driver tells them: an H100 of 80 "GB" has 81,559 MiB."""
    memory_bandwidth: float
    """Bytes per second of device memory."""
    num_cores: int
    """Streaming multiprocessors or compute units, which the tiles of a product are dealt to."""
    attention: Attention
    """How near fused attention comes to the bf16 peak."""
    watts: float
    """Power of the device at full load."""
    dollars_per_hour: float
    """Rent of one device, with its share of the host."""

    def __post_init__(self) -> None:
        _positive(self, "memory_bytes", "memory_bandwidth", "num_cores")
        for precision, value in self.peak.items():
            share = self.reachable.of(precision)
            if not 0 < value < math.inf:
                raise SpecError(f"gpu {self.name!r}: peak.{precision} ({value}) must be larger than 0 and finite, in operations per second")
            if share is None or not 0 < share <= 1:
                raise SpecError(
                    f"gpu {self.name!r}: reachable.{precision} ({share}) must lie above 0 and at most at 1: a share of the peak"
                )


@dataclass(frozen=True, kw_only=True)
class Calls:
    """How long an operation takes that runs as it is called: seconds of the call, of its arithmetic and of its bytes, in turn."""

    call: float = 0.0
    """Seconds of each call, whatever its size."""
    per_flop: float = 0.0
    """Seconds of each floating-point operation."""
    per_byte: float = 0.0
    """Seconds of each byte."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if not 0 <= (value := getattr(self, field.name)) < math.inf:
                raise SpecError(f"{field.name} ({value}) must be finite and not negative, in seconds")

    def seconds(self, *, calls: float = 1.0, flops: float = 0.0, num_bytes: float = 0.0) -> float:
        """Of so many calls that do so much together."""
        return calls * self.call + flops * self.per_flop + num_bytes * self.per_byte

    def faster(self, *, flops: float = 1.0, num_bytes: float = 1.0) -> Calls:
        """The same with arithmetic and bytes that go so many times as fast."""
        return Calls(call=self.call, per_flop=self.per_flop / flops, per_byte=self.per_byte / num_bytes)


@dataclass(frozen=True, kw_only=True)
class Eager:
    """A CPU, which runs operations one by one as they are called and hides nothing, as `quintet doctor --cluster` measures it with as
    many ranks at work at once as the machine shall have. Products are in bf16, and count the bytes of both operands and result."""

    product: Calls
    """A product with a weight matrix."""
    product_input: Calls
    """The gradient of its input."""
    product_weight: Calls
    """The gradient of its weight."""
    grouped: Calls
    """Products of experts; a call for each expert."""
    grouped_input: Calls
    grouped_weight: Calls
    core: Calls
    """Core attention; a call for each block of queries."""
    core_backward: Calls
    ring: Calls
    """Core attention of a ring's parts."""
    ring_backward: Calls
    dense: Calls
    """All else that a dense layer does, by the bytes of norms, activations and so on; launching is its call."""
    dense_backward: Calls
    moe: Calls
    """The same of a mixture of experts."""
    moe_backward: Calls
    routed: Calls
    """The same where ranks share the experts; without the messages."""
    routed_backward: Calls
    loss: Calls
    """Of the logits' bytes, without products."""
    accumulate: Calls
    """Adding a weight's gradient up, by its bytes in bf16."""
    update: Calls
    """The optimizer, by the bytes of the weights in bf16."""
    gather: Calls
    """An all-gather, by the bytes that a rank sends."""
    scatter: Calls
    """A reduce-scatter, in fp32."""
    reduce: Calls
    """An all-reduce, in fp32, by the bytes that a rank would have to send."""
    exchange: Calls
    """An all-to-all."""
    send: Calls
    """A message to the next rank of a pipeline or ring."""

    def faster(self, *, flops: float = 1.0, num_bytes: float = 1.0, messages: float = 1.0) -> Eager:
        """The same with arithmetic, memory and messages that are so many times as fast."""
        changed = {
            name: getattr(self, name).faster(num_bytes=messages)
            if name in _MESSAGES
            else getattr(self, name).faster(flops=flops, num_bytes=num_bytes)
            for name in (field.name for field in fields(self))
        }
        return Eager(**changed)


_MESSAGES = ("gather", "scatter", "reduce", "exchange", "send")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal devices in domains of fast links, joined by a network."""

    gpu: Gpu
    """The devices."""
    num_gpus: int = 8
    """How many there are."""
    domain: int = 8
    """Devices that fast links join: a node, or a rack."""
    link: Link
    """Inside a domain, per device."""
    network: Link
    """Between domains, per device."""
    failures_per_device_year: float = 0.173
    """Interruptions of the whole run that one device, with its share of host and network, causes in a year: Llama 3 met 419 in 54 days
    on 16,384 devices (arXiv 2407.21783, section 3.3.4)."""
    restart_seconds: float = 600.0
    """From an interruption to the first new step, assumed."""
    storage_bandwidth: float = 1e9
    """Bytes per second per device in which a checkpoint is written, assumed."""
    overhead_power: float = 1.6
    """Power of hosts, network and cooling, as a factor on the devices' own, assumed."""
    eager: Eager | None = None
    """The measured figures of a CPU; absent: an accelerator, which `gpu` describes."""

    def __post_init__(self) -> None:
        _positive(self, "num_gpus", "domain", "storage_bandwidth")
        if self.num_gpus > _MOST_DEVICES:
            raise SpecError(f"num_gpus ({self.num_gpus:,}) must be at most {_MOST_DEVICES:,}")

    def scaled(self, factors: Mapping[str, float]) -> Cluster:
        """The cluster with link, network, memory, memory_bandwidth, compute or price multiplied: what `--what-if` asks."""
        cluster = self
        for name, factor in factors.items():
            if name not in _SCALED:
                raise UsageError(f"--what-if knows no {name!r}{did_you_mean(name, _SCALED)}; known: {', '.join(_SCALED)}")
            if not 0 < factor < math.inf:
                raise UsageError(f"--what-if {name}={factor}x: the factor must be larger than 0 and finite")
            cluster = _SCALED[name](cluster, factor)
        return cluster

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def __hash__(self) -> int:  # kept, because searches look these up many times
        return self._hash


_SCALED: dict[str, Callable[[Cluster, float], Cluster]] = {
    "link": lambda c, f: replace(_eager(c, messages=f), link=replace(c.link, bandwidth=c.link.bandwidth * f)),
    "network": lambda c, f: replace(c, network=replace(c.network, bandwidth=c.network.bandwidth * f)),
    "memory": lambda c, f: replace(c, gpu=replace(c.gpu, memory_bytes=c.gpu.memory_bytes * f)),
    "memory_bandwidth": lambda c, f: replace(_eager(c, num_bytes=f), gpu=replace(c.gpu, memory_bandwidth=c.gpu.memory_bandwidth * f)),
    "compute": lambda c, f: replace(
        _eager(c, flops=f), gpu=replace(c.gpu, peak=Rates(**{name: peak * f for name, peak in c.gpu.peak.items()}))
    ),
    "price": lambda c, f: replace(c, gpu=replace(c.gpu, dollars_per_hour=c.gpu.dollars_per_hour * f)),
    "failures": lambda c, f: replace(c, failures_per_device_year=c.failures_per_device_year * f),
}


def _eager(cluster: Cluster, **factors: float) -> Cluster:
    return replace(cluster, eager=cluster.eager and cluster.eager.faster(**factors))


def _positive(section: object, *names: str) -> None:
    for name in names:
        if not 0 < getattr(section, name) < math.inf:
            raise SpecError(f"{name} ({getattr(section, name)}) must be larger than 0 and finite")


AMPERE = Attention(forward=0.66, forward_half=400, backward=0.58, backward_half=800)
"""FlashAttention-2 on an A100 with heads of 128, read off its figures (arXiv 2307.08691)."""
HOPPER = Attention(forward=0.680, forward_half=885, backward=0.574, backward_half=1420)
"""cuDNN at V3's shape, TFLOP/s at 4K and 16K: 553 and 638 forward, 422 and 523 backward (arXiv 2603.07685)."""
BLACKWELL = Attention(forward=0.765, forward_half=1703, backward=0.567, backward_half=1161)
"""The same there: 1,324 and 1,698 forward, 1,083 and 1,298 backward."""
CDNA3 = Attention(forward=0.38, forward_half=1000, backward=0.28, backward_half=1400)
"""Assumed: what AMD's kernels are reported to reach varies."""


def _gpu(
    name: str,
    *,
    bf16: float,
    reach: float,
    fp8: float = 0.0,
    fp8_reach: float = 0.7,
    nvfp4: float = 0.0,
    gigabytes: float,
    terabytes_per_second: float,
    cores: int,
    attention: Attention,
    sustained: float,
    watts: float,
    dollars: float,
) -> Gpu:
    def rates(fp32: float, bf16: float, fp8_rate: float, nvfp4_rate: float) -> Rates:
        return Rates(fp32=fp32, bf16=bf16, fp8=fp8_rate if fp8 else None, nvfp4=nvfp4_rate if nvfp4 else None)

    return Gpu(
        name=name,
        peak=rates(bf16 / 2 * TERA, bf16 * TERA, fp8 * TERA, nvfp4 * TERA),  # fp32 is TF32, which products of fp32 matrices may use
        reachable=rates(reach, reach, fp8_reach, fp8_reach * 0.85),
        memory_bytes=gigabytes * GIGA,
        memory_bandwidth=terabytes_per_second * TERA,
        sustained=sustained,
        num_cores=cores,
        attention=attention,
        watts=watts,
        dollars_per_hour=dollars,
    )


_A100 = _gpu(
    "A100",
    bf16=312,
    reach=0.869,
    gigabytes=85.9,
    terabytes_per_second=2.04,
    cores=108,
    attention=AMPERE,
    sustained=0.85,
    watts=400,
    dollars=1.5,
)
_H100 = _gpu(
    "H100",
    bf16=989.5,
    reach=0.803,
    fp8=1979,
    fp8_reach=0.709,
    gigabytes=85.5,
    terabytes_per_second=3.35,
    cores=132,
    attention=HOPPER,
    sustained=0.945,
    watts=700,
    dollars=2.5,
)
_B200 = _gpu(
    "B200",
    bf16=2250,
    reach=0.776,
    fp8=4500,
    fp8_reach=0.763,
    nvfp4=9000,
    gigabytes=192,
    terabytes_per_second=7.7,
    cores=148,
    attention=BLACKWELL,
    sustained=0.758,
    watts=1000,
    dollars=4.5,
)
_GB200 = _gpu(
    "GB200",
    bf16=2450,
    reach=0.744,
    fp8=4900,
    fp8_reach=0.738,
    nvfp4=9800,
    gigabytes=198,
    terabytes_per_second=8.0,
    cores=152,
    attention=BLACKWELL,
    sustained=0.758,
    watts=1200,
    dollars=5.0,
)
_MI300X = _gpu(
    "MI300X",
    bf16=1307,
    reach=0.57,
    fp8=2615,
    fp8_reach=0.48,
    gigabytes=206,
    terabytes_per_second=5.3,
    cores=304,
    attention=CDNA3,
    sustained=0.85,
    watts=750,
    dollars=2.2,
)
_NIC_400 = Link(bandwidth=50 * GIGA, share=0.86, latency=12e-6)
"""One 400 Gbit/s card per device; DeepEP reaches 43 to 58 GB/s over it, a plain all-to-all 45 (arXiv 2603.07685)."""


def _hopper_link(bandwidth: float) -> Link:
    return Link(bandwidth=bandwidth, share=0.8, latency=6e-6)


CATALOGUE: dict[str, Cluster] = {
    "a100": Cluster(gpu=_A100, link=Link(bandwidth=300 * GIGA), network=Link(bandwidth=25 * GIGA, share=0.85, latency=12e-6)),
    "a100-40gb": Cluster(
        gpu=replace(_A100, name="A100 40GB", memory_bytes=42.9 * GIGA, memory_bandwidth=1.555 * TERA),
        link=Link(bandwidth=300 * GIGA),
        network=Link(bandwidth=25 * GIGA, share=0.85, latency=12e-6),
    ),
    "h100": Cluster(gpu=_H100, link=_hopper_link(450 * GIGA), network=_NIC_400),
    "h800": Cluster(gpu=replace(_H100, name="H800", dollars_per_hour=2.0), link=_hopper_link(200 * GIGA), network=_NIC_400),
    "h200": Cluster(
        gpu=replace(
            _H100,
            name="H200",
            memory_bytes=150.7 * GIGA,
            memory_bandwidth=4.8 * TERA,
            reachable=replace(_H100.reachable, fp8=0.734),
            dollars_per_hour=3.0,
        ),
        link=_hopper_link(450 * GIGA),
        network=_NIC_400,
    ),
    "b200": Cluster(gpu=_B200, link=_hopper_link(900 * GIGA), network=_NIC_400),
    "b300": Cluster(
        gpu=replace(
            _B200,
            name="B300",
            peak=replace(_B200.peak, nvfp4=13500 * TERA),
            reachable=replace(_B200.reachable, bf16=0.786, fp8=0.745),
            memory_bytes=288 * GIGA,
            memory_bandwidth=8 * TERA,
            watts=1100,
            dollars_per_hour=5.5,
        ),
        link=_hopper_link(900 * GIGA),
        network=replace(_NIC_400, bandwidth=100 * GIGA),
    ),
    "gb200": Cluster(gpu=_GB200, domain=72, link=_hopper_link(900 * GIGA), network=_NIC_400),
    "gb300": Cluster(
        gpu=replace(
            _GB200,
            name="GB300",
            peak=replace(_GB200.peak, nvfp4=14700 * TERA),
            memory_bytes=279 * GIGA,
            watts=1400,
            dollars_per_hour=6.0,
        ),
        domain=72,
        link=_hopper_link(900 * GIGA),
        network=replace(_NIC_400, bandwidth=100 * GIGA),
    ),
    "mi300x": Cluster(gpu=_MI300X, link=Link(bandwidth=448 * GIGA, share=0.7, latency=10e-6), network=_NIC_400),
}
"""Clusters of 8 devices by the name of their device; `named` makes them larger."""


def named(name: str, *, num_gpus: int) -> Cluster:
    """A cluster of `num_gpus` devices from the catalogue, or from a cluster.toml. Raises UsageError for an unknown name."""
    if name.endswith(".toml"):
        cluster = read(Path(name))
    elif (key := name.lower().replace("_", "-")) in CATALOGUE:
        cluster = CATALOGUE[key]
    else:
        raise UsageError(
            f"no gpu {name!r} in the catalogue{did_you_mean(name.lower(), CATALOGUE)}; known: "
            f"{', '.join(CATALOGUE)}; to define one, write a "
            f"cluster.toml (`quintet plan --write-cluster cluster.toml --gpu h100` writes one to begin with) and give --gpu cluster.toml"
        )
    return replace(cluster, num_gpus=num_gpus)


def read(path: Path) -> Cluster:
    """A cluster from a TOML file with the fields of `Cluster`; unknown keys are refused."""
    try:
        tree = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot read a cluster from {path}: {error}") from None
    _refuse_unknown(tree, Cluster, origin=str(path))
    try:
        return msgspec.convert(tree, Cluster)
    except msgspec.ValidationError as error:
        raise SpecError(f"{path}: {error}") from None


_SECTIONS: dict[str, type] = {"gpu": Gpu, "link": Link, "network": Link, "attention": Attention, "peak": Rates, "reachable": Rates}
_SECTIONS |= {"eager": Eager} | {field.name: Calls for field in fields(Eager)}


def _refuse_unknown(tree: Mapping[str, Any], kind: type, *, origin: str) -> None:
    known = [field.name for field in fields(kind)]
    for name, value in tree.items():
        if name not in known:
            raise SpecError(f"{origin}: unknown key {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
        if name in _SECTIONS and isinstance(value, dict):
            _refuse_unknown(value, _SECTIONS[name], origin=f"{origin}: {name}")


def as_tree(cluster: Cluster) -> dict[str, Any]:
    """The cluster as plain values, as a cluster.toml holds them."""
    tree: dict[str, Any] = _without_none(msgspec.to_builtins(cluster))
    return tree


def dumps(cluster: Cluster) -> str:
    """The text of a cluster.toml."""
    return tomli_w.dumps(as_tree(cluster))


def _without_none(value: Any) -> Any:
    return {name: _without_none(inner) for name, inner in value.items() if inner is not None} if isinstance(value, dict) else value
