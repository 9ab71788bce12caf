"""What a setup would do on a cluster: memory of every pipeline rank, seconds of a step term by term, and what a run takes and costs.

`estimate` is pure and takes about a millisecond. Every figure has a name such as `time.all_to_all`; `terms` lists them with values,
and `plan.explain` says how each is computed.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from quintet.plan.memory import RankMemory, rank_memory
from quintet.plan.setup import Setup
from quintet.plan.step_time import StepTime, Timed, step_time
from quintet.spec.cluster import Cluster

HOUR = 3600.0
YEAR = 365.25 * 24 * HOUR
STATE_BYTES = 12
"""Of a parameter in a checkpoint: master weight and two moments of 4 bytes; bf16 moments take 4 less."""


@dataclass(frozen=True, kw_only=True)
class Utilization:
    """Model FLOPs against the device's peak, in the conventions that are published."""

    tflops_causal: float
    """Tera-operations per second and device, with half of the attention matrix, without MTP and router, as DeepSeek counts."""
    tflops_full: float
    """The same with the whole attention matrix."""
    mfu_causal: float
    """The former against the bf16 peak."""
    mfu_full: float
    mfu_own: float
    """All work of the model (causal, with MTP and router) against the peak of the precision that it runs in."""


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """What failures and checkpoints leave of the time."""

    seconds_between_failures: float
    checkpoint_seconds: float
    """That a checkpoint holds the step up."""
    checkpoint_every: float
    """Seconds between checkpoints that lose least: sqrt(2 x checkpoint x time between failures) (Young, 1974)."""
    share: float
    """Of the time that goes into steps that count."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a number of tokens takes."""

    tokens: float
    seconds: float
    """With failures and checkpoints."""
    device_hours: float
    dollars: float
    megawatt_hours: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What was found for a setup on a cluster."""

    setup: Setup
    cluster: Cluster
    timed: Timed
    memory: tuple[RankMemory, ...]
    """Per pipeline rank."""

    @property
    def step(self) -> StepTime:
        """Seconds of a step, term by term."""
        return self.timed.step

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.timed.step.total

    @property
    def tokens_per_second(self) -> float:
        """Per device."""
        return self.setup.batch_sequences * self.setup.sequence_length / self.seconds / self.setup.layout.num_ranks

    @property
    def fullest(self) -> RankMemory:
        """The rank that needs most memory."""
        return max(self.memory, key=lambda rank: rank.total)

    @property
    def fits(self) -> bool:
        """Whether every rank's memory suffices."""
        return self.fullest.total <= self.cluster.gpu.memory_bytes

    @property
    def bubble(self) -> float:
        """Share of the step in which a rank of the pipeline waits for others to fill and drain it."""
        return self.step.bubble / self.seconds

    @property
    def bound(self) -> str:
        """The largest term, in words."""
        return max(bounds(self).items(), key=lambda item: item[1])[0]


def estimate(setup: Setup, cluster: Cluster) -> Estimate:
    """Raises SpecError for a schedule that the layout's ranks and micro-batches do not allow."""
    timed = step_time(setup, cluster)
    memory = rank_memory(setup, timed.parts, device="cpu" if cluster.eager else "cuda")
    return Estimate(setup=setup, cluster=cluster, timed=timed, memory=memory)


def bounds(found: Estimate) -> dict[str, float]:
    """Seconds of a step by what would have to be faster: each share of the busiest rank's work, by kind, and what it waits for."""
    shares = work_shares(found)
    step = found.step
    work = step.forward + step.input_gradient + step.weight_gradient
    seconds = {name: work * share for name, share in shares.items()}
    return seconds | {
        "all-to-all": max(0.0, step.all_to_all + step.overlap),
        "pipeline bubble": step.bubble + step.p2p,
        "ZeRO's messages": step.gradients + step.weights,
        "optimizer": step.optimizer,
        "stragglers": step.straggling,
    }


def work_shares(found: Estimate) -> dict[str, float]:
    """Of forward and backward over all stages, the share of each kind of work."""
    seconds = dict.fromkeys(("matrix products", "attention", "memory bandwidth", "launching", "recomputation", "tp messages", "ring"), 0.0)
    blocks = found.timed.blocks
    for part in found.timed.parts:
        module = blocks.moe if found.setup.architecture.num_experts else blocks.dense
        counted = (
            (blocks.dense, part.num_dense),
            (blocks.moe, part.num_moe),
            (module, part.num_mtp),
            (blocks.embedding, int(part.embedding)),
            (blocks.head, int(part.head) + part.num_mtp),
        )
        for time, num in counted:
            products = time.products + time.products_input + time.products_weight + time.grouped + time.grouped_input + time.grouped_weight
            seconds["matrix products"] += num * products
            seconds["attention"] += num * (time.attention + time.attention_backward)
            seconds["memory bandwidth"] += num * (time.moved + time.moved_backward)
            seconds["launching"] += num * (time.launch + time.launch_backward)
            seconds["recomputation"] += num * time.again
            seconds["tp messages"] += num * (time.tensor + time.tensor_backward)
            seconds["ring"] += num * (time.ring + time.ring_backward)
    total = sum(seconds.values())
    return {name: value / total for name, value in seconds.items()}


def utilization(found: Estimate) -> Utilization:
    """In every published convention."""
    setup, gpu, speed = found.setup, found.cluster.gpu, found.tokens_per_second
    a, length = setup.architecture, setup.sequence_length
    causal, full = (a.flops_per_token(sequence_length=length, causal=causal, mtp=False, gate=False) * speed for causal in (True, False))
    own = a.flops_per_token(sequence_length=length, mtp=setup.mtp) * speed
    return Utilization(
        tflops_causal=causal / 1e12,
        tflops_full=full / 1e12,
        mfu_causal=causal / gpu.peak.bf16,
        mfu_full=full / gpu.peak.bf16,
        mfu_own=own / (gpu.peak.of(setup.precision) or gpu.peak.bf16),
    )


def goodput(found: Estimate) -> Goodput:
    """With checkpoints as often as loses least, written by all ranks at once while the step waits, and half an interval lost per
    failure."""
    cluster, ranks = found.cluster, found.setup.layout.num_ranks
    between = YEAR / (cluster.failures_per_device_year * ranks) if cluster.failures_per_device_year else math.inf
    state = (STATE_BYTES - 2 * (4 - found.setup.moments_bytes)) * found.setup.architecture.parameters
    checkpoint = state / ranks / cluster.storage_bandwidth
    every = max(found.seconds, math.sqrt(2 * checkpoint * between)) if between < math.inf else math.inf
    lost = (
        (checkpoint / every if every < math.inf else 0.0) + (every / 2 + cluster.restart_seconds) / between if between < math.inf else 0.0
    )
    return Goodput(seconds_between_failures=between, checkpoint_seconds=checkpoint, checkpoint_every=every, share=1 / (1 + lost))


def cost(found: Estimate, *, tokens: float) -> Cost:
    """Time, rent and energy of so many tokens."""
    gpu, ranks = found.cluster.gpu, found.setup.layout.num_ranks
    seconds = tokens / (found.tokens_per_second * ranks) / goodput(found).share
    hours = seconds * ranks / HOUR
    return Cost(
        tokens=tokens,
        seconds=seconds,
        device_hours=hours,
        dollars=hours * gpu.dollars_per_hour,
        megawatt_hours=hours * gpu.watts * found.cluster.overhead_power / 1e6,
    )


def terms(found: Estimate) -> dict[str, float]:
    """Every figure by its name: `time.*` in seconds of a step, `memory.*` in bytes of the fullest rank, `block.*` in seconds of one
    micro-batch at one layer."""
    block = found.timed.blocks.moe if found.setup.architecture.num_moe_layers else found.timed.blocks.dense
    return {
        **{f"time.{name}": value for name, value in asdict(found.step).items()},
        "time.total": found.seconds,
        **{f"memory.{name}": value for name, value in asdict(found.fullest).items()},
        "memory.total": found.fullest.total,
        **{f"block.{name}": value for name, value in asdict(block).items()},
    }
