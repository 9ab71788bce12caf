"""How well a training system uses a device and hides its messages: the planner's fitted scalars, all of them, and where they come from.

Everything else that the planner computes with is counted from the spec or is a published component figure (`spec.cluster`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
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
    """Share of the device's cores that is left to computation while kernels move tokens: 112 of 132 in DeepSeek's trace."""
    all_to_all: float = 1.0
    """Share of the links' long-message rate that all-to-alls reach beside computation."""
    grouped: float = 1.0
    """Share of a single product's rate that a grouped product of the same shapes reaches, beyond what its tiles explain."""
    memory: float = 0.80
    """Share of the memory's bandwidth that element-wise kernels reach."""
    moved: float = 1.294
    """Bytes that element-wise kernels move, as a factor on those of fully fused ones."""
    ramp: float = 1190
    """Bytes of a row or column that a core loads before it multiplies at full rate: an inner length of 128 in bf16, of 256 in fp8."""
    launch: float = 8e-6
    """Seconds of the host per kernel; what launching a layer takes longer than running it shows. 0 with CUDA graphs."""
    waits_for_host: bool = True
    """Whether routing without dropped tokens makes the host wait for the device in every mixture of experts, so that launching shows."""
    kernels_per_expert: float = 6.0
    """Kernels that each local expert adds to a forward, and twice to a backward, where grouped products are not one kernel."""
    tp_hidden: float = 0.480
    """Share of tensor-parallel messages that runs beside products."""
    p2p_hidden: float = 0.864
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
    straggle: float = 0.003
    """Share by which a step gets longer whenever devices double beyond one domain of fast links."""

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
        _generation("eager", 1.0, launch=0.0, waits_for_host=False, tp_hidden=0.0, zero_hidden=0.0, p2p_hidden=0.0, straggle=0.0),
        _generation("megatron 2021", 1.015),
        _generation("megatron 2023", 1.021),
        _generation("megascale", 1.301),
        _generation("zero-bubble", 0.983),
        _generation("llm-foundry a100", 1.043),
        _generation("llm-foundry h100", 0.749, 0.512),
        _generation("maxtext", 1.012, 1.088, waits_for_host=False),
        _generation("nemo 24", 0.977, 0.981, **_NVIDIA),
        _generation("nemo 25", 0.997, 1.055, **_NVIDIA),
        _generation("nemo 25 blackwell", 1.000, 0.892, **_NVIDIA),
        _generation("bridge 25", 1.000, 0.948, once_per_node=True, **_NVIDIA),
        _generation("bridge 25 blackwell", 1.000, 0.987, once_per_node=True, **_NVIDIA),
        _generation("bridge 26", 1.000, 1.040, once_per_node=True, **_NVIDIA),
        _generation("bridge 26 blackwell", 1.000, 1.063, once_per_node=True, **_NVIDIA),
        _generation("megatron b200 blackwell", 0.812),
        _generation("torchtitan", 0.517, 1.302),
        _generation("automodel", 0.809, once_per_node=True),
        _generation("primus", 1.036, 1.235),
        _generation(
            "deepseek",
            0.964,
            cores=112 / 132,
            all_to_all=0.724,
            pair_waits=1.08,
            tp_hidden=0.0,  # its communication cores are busy with all-to-alls
            launch=0.0,
            waits_for_host=False,
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
