"""Layouts that earlier drafts of this system claimed, with what they claimed of them, and whether that can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quintet.errors import UsageError, did_you_mean
from quintet.plan.estimate import Estimate, utilization, work_shares
from quintet.plan.formulas import bubble_seconds
from quintet.spec.layout import Layout

CLAIMED_MFU, CLAIMED_BUBBLE, CLAIMED_COMMUNICATION = 0.92, (0.03, 0.05), 0.015
"""What all of them claim: shares of the peak and of the step."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A claimed layout."""

    layout: Layout
    """In our axes."""
    claim: str
    """As it was written."""
    devices: int
    """For how many devices."""
    factors: Mapping[str, int]
    """The degrees as they were multiplied."""


PRESETS = {
    "16x64x8": Preset(
        layout=Layout(pp=16, dp=512, ep=64, zero=1, schedule="1f1b"),
        claim="16 x 64 x 8: 16 stages, 64 ways of experts, 8 replicas",
        devices=8192,
        factors={"pp": 16, "ep": 64, "dp": 8},
    ),
    "tp8-pp16-dp64": Preset(
        layout=Layout(tp=8, pp=16, dp=64, ep=32, zero=1, schedule="dualpipe"),
        claim='TP8 PP16 DP64 EP32 SP4 "on 2,048"',
        devices=2048,
        factors={"tp": 8, "pp": 16, "dp": 64},
    ),
    "4x4": Preset(
        layout=Layout(pp=4, dp=4, ep=4, zero=1, schedule="dualpipe"),
        claim="4 x 4 with 64 experts on 16 devices",
        devices=16,
        factors={"pp": 4, "ep": 4},
    ),
}


def preset(name: str) -> Preset:
    """Raises UsageError for an unknown name."""
    if name not in PRESETS:
        raise UsageError(f"no preset {name!r}{did_you_mean(name, PRESETS)}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


def arithmetic(chosen: Preset) -> list[str]:
    """Where its degrees do not make its devices."""
    product = 1
    for degree in chosen.factors.values():
        product *= degree
    text = " x ".join(f"{axis} {degree}" for axis, degree in chosen.factors.items())
    if product == chosen.devices:
        return [f"{text} = {product:,} devices: as claimed"]
    lines = [f"{text} = {product:,} devices, not {chosen.devices:,}; planned on {product:,}"]
    if "SP4" in chosen.claim:
        lines.append(
            "sequence parallelism shares the ranks of tp, so SP4 beside TP8 is no degree of its own; as cp it would take four times as many"
        )
    return lines


def claims(found: Estimate) -> list[str]:
    """Each claimed figure beside what the estimate says, and why it can or cannot hold."""
    gpu, step, used = found.cluster.gpu, found.step, utilization(found)
    reachable = gpu.reachable.bf16
    shares = work_shares(found)
    work = step.forward + step.input_gradient + step.weight_gradient
    moved = step.all_to_all + step.p2p + step.gradients + step.weights + work * (shares["tp messages"] + shares["ring"])
    shown = max(0.0, moved + step.overlap)
    low, high = CLAIMED_BUBBLE
    lines = [
        f"{CLAIMED_MFU:.0%} MFU cannot hold: the best single product reaches {reachable:.1%} of the bf16 peak; "
        f"estimated {used.mfu_causal:.1%} "
        f"(causal) or {used.mfu_full:.1%} (whole attention matrix)"
    ]
    if found.setup.layout.pp > 1:
        stage = [sum(getattr(s, name) for s in found.timed.stages) / found.setup.layout.pp for name in ("forward", "input", "weight")]
        plain = bubble_seconds(
            "1f1b", num_ranks=found.setup.layout.pp, chunks=1, forward=stage[0], backward_input=stage[1], weight=stage[2], pair=0
        )
        verdict = "holds" if found.bubble <= high else "does not hold"
        lines.append(
            f"a bubble of {low:.0%} to {high:.0%} {verdict} with {found.setup.schedule} and "
            f"{found.setup.num_microbatches} micro-batches: estimated "
            f"{found.bubble:.1%} (1F1B: {plain / (plain + found.setup.num_microbatches * sum(stage)):.1%})"
        )
    verdict = "holds" if shown / found.seconds <= CLAIMED_COMMUNICATION else "does not hold"
    lines.append(
        f"{CLAIMED_COMMUNICATION:.1%} of communication {verdict}: messages take {moved / found.seconds:.1%} of the step's length, of which "
        f"{shown / found.seconds:.1%} show"
    )
    return lines
