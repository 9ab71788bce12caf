"""How well a training system uses a device and hides its messages: the planner's fitted scalars, all of them, and where they come from.

Everything else that the planner computes with is counted from the spec or is a published component figure (`spec.cluster`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from quintet.errors import UsageError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Software:
    """A generation of a training system. Times are seconds, shares lie between 0 and 1."""

    name: str
    pace: float = 1.0
    """Seconds of all work on the device, divided by what the curves below say. One figure per generation, fitted to a few dense runs."""
    low_pace: float = 1.0
    """The same on top for fp8 and nvfp4 steps: what casting and scaling cost. (Casts counted by their bytes did not improve the fit.)"""
    cores: float = 1.0
    """Share of the device's cores that is left to the computation of an overlapped pair, while kernels move tokens: 112 of 132 in
    DeepSeek's trace."""
    all_to_all: float = 1.0
    """Share of the links' long-message rate that all-to-alls reach beside that computation."""
    grouped: float = 1.0
    """Share of a single product's rate that a grouped product of the same shapes reaches, beyond what its tiles explain."""
    memory: float = 0.80
    """Share of the memory's bandwidth that element-wise kernels reach."""
    moved: float = 2.299
    """Bytes that element-wise kernels move, as a factor on those of fully fused ones."""
    ramp: float = 650
    """Bytes of a row or column that a core loads before it multiplies at full rate: DeepGEMM's products with inner lengths of 512, 1,536
    and 2,048 in fp8 reach 590, 990 and 1,025 TFLOP/s on an H800, of 7,168 and 16,384 1,304 and 1,358 (its README)."""
    launch: float = 8e-6
    """Seconds of the host per kernel; what launching a layer takes longer than running it shows. 0 with CUDA graphs."""
    launch_moe: float = 20e-6
    """The same in a mixture of experts, where more Python lies between kernels; assumed."""
    wait: float = 8e-4
    """Seconds that each forward of a mixture of experts loses where the host waits for the counts of rows, until it is ahead of the device
    again: about 40 kernels' launches; assumed. 0 where tokens are dropped or counts stay on the device."""
    kernels_per_expert: float = 6.0
    """Kernels that each local expert adds to a forward, and twice to a backward, where grouped products are not one kernel."""
    attention: float = 1.0
    """Share of the device's attention rates (`spec.cluster`) that the system's kernel reaches, by the papers of the kernels."""
    tp_hidden: float = 0.355
    """Share of tensor-parallel messages that runs beside products."""
    p2p_hidden: float = 0.601
    """Share of an interleaved pipeline's messages that runs beside computation while it is full."""
    ep_hidden: float = 0.0
    """Share of all-to-alls that runs beside computation outside of DualPipe, whose overlap is simulated."""
    pair_waits: float = 1.0
    """How much longer an overlapped pair takes than its two streams in their order explain."""
    zero_hidden: float = 0.9
    """Share of a backward (and for weights, of a forward) beside which ZeRO's messages run."""
    once_per_node: bool = False
    """Whether a token is sent once per node, and forwarded there (DeepEP, HybridEP), or once per expert."""
    low_gather: bool = False
    """Whether tp gathers fp8 where products take it (Transformer Engine)."""
    low_dispatch: bool = False
    """Whether dispatch sends fp8."""
    imbalance: float = 0.0
    """How many more rows than the mean the busiest rank of an ep group has: its experts and messages take so much longer. Benchmarks
    balance routing by force; of real routing, balanced by bias, the same 10 % are assumed as in memory."""
    straggle: float = 0.003
    """Share by which a step gets longer whenever devices double beyond one domain of fast links."""

    @cached_property
    def alone(self) -> Software:
        """The same outside of overlapped pairs: computation has all cores, and messages what the links give."""
        return replace(self, cores=1.0, all_to_all=1.0)

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def __hash__(self) -> int:  # kept, because searches look these up many times
        return self._hash


_NVIDIA = dict(low_gather=True)


def _generation(name: str, pace: float, low_pace: float = 1.0, **traits: Any) -> Software:
    return Software(name=name, pace=pace, low_pace=low_pace, **traits)


GENERATIONS: dict[str, Software] = {
    found.name: found
    for found in (
        _generation("plain", 1.0),
        _generation("eager", 1.0, launch=0.0, launch_moe=0.0, wait=0.0, tp_hidden=0.0, zero_hidden=0.0, p2p_hidden=0.0, straggle=0.0),
        _generation("megatron 2021", 0.953, tp_hidden=0.0),
        _generation("megatron 2023", 0.960, tp_hidden=0.0),
        _generation("megascale", 1.171),
        _generation("zero-bubble", 0.896),
        _generation("llm-foundry a100", 1.096, attention=0.5, zero_hidden=0.0),
        _generation("llm-foundry h100", 1.042, 0.968, attention=0.29, zero_hidden=0.0),
        _generation("maxtext", 1.024, 1.098, wait=0.0),
        _generation("nemo 24", 0.972, 0.991, **_NVIDIA),
        _generation("nemo 25", 0.989, 1.082, **_NVIDIA),
        _generation("nemo 25 blackwell", 1.000, 0.878, **_NVIDIA),
        _generation("bridge 25", 1.000, 0.978, once_per_node=True, **_NVIDIA),
        _generation("bridge 25 blackwell", 1.000, 0.979, once_per_node=True, **_NVIDIA),
        _generation("bridge 26", 1.000, 1.046, once_per_node=True, **_NVIDIA),
        _generation("bridge 26 blackwell", 1.000, 1.085, once_per_node=True, **_NVIDIA),
        _generation("megatron b200 blackwell", 0.808, tp_hidden=0.0),
        _generation("torchtitan", 0.760, 1.146, attention=0.57),
        _generation("automodel", 0.791, once_per_node=True),
        _generation("primus", 1.036, 1.242),
        _generation(
            "deepseek",
            1.024,
            cores=112 / 132,
            all_to_all=0.724,
            pair_waits=1.09,
            zero_hidden=0.0,  # DualPipe's last backwards leave nothing to hide them, and the cards are busy with all-to-alls before
            imbalance=0.1,
            tp_hidden=0.0,  # its communication cores are busy with all-to-alls
            launch=0.0,
            launch_moe=0.0,
            wait=0.0,
            once_per_node=True,
            low_dispatch=True,
        ),
    )
}
"""By name. Paces are medians over few dense runs (`benchmarks/planner.py --fit`). DeepSeek's three figures are from its published trace of
an overlapped pair of 4 + 4 layers: 118.2 ms of work on 112 of 132 cores, 80.4 ms of all-to-alls, 129 ms in all."""


def generation(name: str, *, device: str = "") -> Software:
    """The generation of this name, on Blackwell devices its figures there. Raises UsageError."""
    if name not in GENERATIONS:
        raise UsageError(f"no software {name!r}{did_you_mean(name, GENERATIONS)}; known: {', '.join(GENERATIONS)}")
    there = f"{name} blackwell" if device.lstrip("G")[:2] in ("B2", "B3") else name
    return GENERATIONS.get(there, GENERATIONS[name])
