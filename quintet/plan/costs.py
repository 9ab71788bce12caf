"""What a stage's work costs in seconds: given as such, or computed from a layer's four components on two streams."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

import msgspec

from quintet.errors import SpecError, UsageError, did_you_mean
from quintet.schedule.clock import Durations
from quintet.schedule.table import Schedule


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of a micro-batch as DeepSeek-V3 overlaps it (report, section 3.2.1), in seconds and bytes per rank.

    Attention and MLP compute; dispatch and combine move tokens to their experts and back.
    """

    attention_forward: float
    attention_backward_input: float
    attention_weight: float
    mlp_forward: float
    mlp_backward_input: float
    mlp_weight: float
    dispatch_bytes: float
    """Of the forward's dispatch, and of the backward of combine, which is a dispatch."""
    combine_bytes: float
    """Of the forward's combine, and of the backward of dispatch, which is a combine."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < math.inf:
                raise SpecError(f"layer.{field.name} ({value}) must be finite and not negative")
        if not self.attention_forward + self.mlp_forward > 0:
            raise SpecError("layer.attention_forward and layer.mlp_forward are both 0; one must be above 0")


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What one micro-batch costs a rank that holds 1/P of the model. A schedule with two stages per rank has half of it in each."""

    forward: float = 1.0
    """Seconds of F."""
    backward_input: float = 1.0
    """Seconds of I."""
    weight: float = 1.0
    """Seconds of W. A full backward takes I + W."""
    pair: float = 1.0
    """Time of an overlapped pair as a share of F + I + W; 1 means that nothing is gained."""
    layer: Layer | None = None
    """A layer's components. If given, the four values above are computed from it."""
    layers: int = 1
    """Layers that a rank holds, where `layer` is given."""
    profile: tuple[float, ...] = ()
    """How the cost is spread along the model, first layer to last: relative weights of parts of equal length. Empty: evenly."""
    activation_bytes: float = 1.0
    """Bytes that a rank's share keeps of one micro-batch for the backward; 1 counts micro-batches."""
    kept_for_weight: float = 1.0
    """What is kept between I and W, the inputs of products and the gradients of their outputs, as a share of them: about 1 where nothing is
    recomputed, and several times as much where whole layers are."""
    weight_bytes: float = 0.0
    """Bytes of weights of a rank's share; DualPipe holds two shares."""
    gradient_bytes: float = 0.0
    """Bytes of their gradients, which add up over the micro-batches."""
    optimizer_bytes: float = 0.0
    """Bytes of master weights and moments of a rank's share, which DualPipe's mirrors divide between them."""
    message_bytes: float = 0.0
    """Bytes of one message from stage to stage."""
    p2p_latency: float = 0.0
    """Seconds."""
    p2p_bandwidth: float = float("inf")
    """Bytes per second of a link from one rank to another."""
    all_to_all_latency: float = 0.0
    """Seconds."""
    all_to_all_bandwidth: float = float("inf")
    """Bytes per second of a rank."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("p2p_bandwidth", "all_to_all_bandwidth", "layers"):
                if not value > 0:
                    raise SpecError(f"{field.name} ({value}) must be above 0")
            elif isinstance(value, float | int) and not 0 <= value < math.inf:
                raise SpecError(f"{field.name} ({value}) must be finite and not negative")
        if not self.forward + self.backward_input + self.weight > 0:
            raise SpecError("forward, backward_input and weight are all 0; one must be above 0")
        if any(not 0 <= part < math.inf for part in self.profile) or (self.profile and not sum(self.profile) > 0):
            raise SpecError(f"profile {list(self.profile)} must have no negative or infinite part and one above 0")
        if not 0 < self.pair <= 2:
            raise SpecError(f"pair ({self.pair}) must lie above 0 and at most at 2: an overlapped pair as a share of F + I + W")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What one micro-batch costs at one stage, in seconds and bytes."""

    forward: float
    backward_input: float
    weight: float
    all_to_all: float
    """Of F, and of I: seconds in which the compute stream waits for dispatch or combine, if nothing is overlapped."""
    activation_bytes: float
    share: float
    """Of the whole model, in parts of a rank's mean: 1 where a rank holds 1/P of it."""


DEEPSEEK_V3 = Costs(
    forward=57.6e-3,
    backward_input=84.1e-3,
    weight=41.7e-3,
    pair=0.758,
    message_bytes=4096 * 7168 * 2,
    p2p_latency=10e-6,
    p2p_bandwidth=40e9,
)
"""DeepSeek-V3 on 16 ranks, one sequence of 4096 tokens, from the published step of 19.9 s (arXiv 2505.09343, table 4).

The step's parts divided by how many ops of each kind a rank has on average at P = 16, M = 120: 1F 1.13 s / 19.625, 1W 0.48 s / 11.5,
1B 1.99 s / (8.125 B and 11.5 I), 1F1B 13.95 s / 100.375 pairs. A message is bf16 over one 400 Gbit/s NIC at
40 GB/s; its latency is assumed.
"""

DEEPSEEK_V3_TRACE = Costs(
    layer=Layer(
        attention_forward=3.85e-3,
        attention_backward_input=6.40e-3,
        attention_weight=2.62e-3,
        mlp_forward=5.56e-3,
        mlp_backward_input=5.56e-3,
        mlp_weight=5.56e-3,
        dispatch_bytes=4 * 4096 * 7168,
        combine_bytes=4 * 4096 * 7168 * 2,
    ),
    layers=4,
    message_bytes=4096 * 7168 * 2,
    p2p_latency=10e-6,
    p2p_bandwidth=40e9,
    all_to_all_bandwidth=35e9,
)
"""The same from DeepSeek's published trace of one pair of 4 + 4 MoE layers (github.com/deepseek-ai/profile-data).

Its compute stream is busy for 118.2 ms: attention kernels 1.237 ms forward and 3.78 ms backward a layer, the rest shared among F, I and
W by the weights they multiply with (187 M in attention, 396 M in the experts a token visits). Its dispatches and combines take 80.4 ms: a
token goes to at most 4 nodes, in FP8 there and in bf16 back, which makes 35 GB/s.
"""

PRESETS = {"equal": Costs(), "deepseek-v3": DEEPSEEK_V3, "deepseek-v3-trace": DEEPSEEK_V3_TRACE}
"""Costs by name: `equal` has F = I = W = 1 and gains nothing from overlap."""


def read(text: str) -> Costs:
    """Costs from a preset's name, from a TOML file with `Costs`' fields, or from words such as `forward=1,backward_input=1.2,pair=0.8`.

    Raises UsageError or SpecError for what is none of them.
    """
    if text in PRESETS:
        return PRESETS[text]
    if text.endswith(".toml"):
        try:
            tree = tomllib.loads(Path(text).read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UsageError(f"cannot read costs from {text}: {error}") from None
    elif "=" in text:
        words = [_assignment(word) for word in text.split(",")]
        tree = dict(words)
        if twice := sorted({name for name in tree if [known for known, _ in words].count(name) > 1}):
            raise UsageError(f"the costs name {twice[0]} more than once")
    else:
        raise UsageError(
            f"{text!r} is no costs{did_you_mean(text, PRESETS)}; give {', '.join(PRESETS)}, a .toml file, or forward=1,backward_input=1,..."
        )
    _refuse_unknown(tree, Costs, origin=text)
    if isinstance(tree.get("layer"), dict):
        _refuse_unknown(tree["layer"], Layer, origin=f"{text}: layer")
    try:
        return msgspec.convert(tree, Costs)
    except msgspec.ValidationError as error:
        raise SpecError(f"{text}: {error}") from None


def _assignment(word: str) -> tuple[str, float | int]:
    name, _, value = word.partition("=")
    try:
        return name.strip().replace("-", "_"), int(value) if value.strip().isdecimal() else float(value)
    except ValueError:
        raise UsageError(f"{word!r} in the costs must be a name, '=' and a number, such as forward=0.05") from None


def _refuse_unknown(tree: dict[str, object], kind: type, *, origin: str) -> None:
    known = [field.name for field in fields(kind)]
    for name in tree:
        if name not in known:
            raise SpecError(f"{origin}: unknown cost {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")


def stages(costs: Costs, *, num_ranks: int, num_stages: int) -> list[Stage]:
    """The cost of each of `num_stages` stages of a model that `num_ranks` ranks share."""
    share = share_of_rank(costs)
    found = []
    for part in _parts(costs.profile, num_stages):
        n = part * num_ranks
        found.append(
            Stage(
                forward=n * share.forward,
                backward_input=n * share.backward_input,
                weight=n * share.weight,
                all_to_all=n * share.all_to_all,
                activation_bytes=n * costs.activation_bytes,
                share=n,
            )
        )
    return found


def share_of_rank(costs: Costs) -> Stage:
    """The cost of 1/P of the model, one op after the other."""
    forward, backward_input, weight, all_to_all = costs.forward, costs.backward_input, costs.weight, 0.0
    if layer := costs.layer:
        all_to_all = costs.layers * sum(_all_to_alls(costs, layer))
        forward = costs.layers * (layer.attention_forward + layer.mlp_forward) + all_to_all
        backward_input = costs.layers * (layer.attention_backward_input + layer.mlp_backward_input) + all_to_all
        weight = costs.layers * (layer.attention_weight + layer.mlp_weight)
    activation_bytes = costs.activation_bytes
    return Stage(
        forward=forward, backward_input=backward_input, weight=weight, all_to_all=all_to_all, activation_bytes=activation_bytes, share=1.0
    )


def pair_seconds(costs: Costs, forward: Stage, backward: Stage, *, stages_per_rank: float) -> float:
    """An overlapped pair of these two stages, of which a rank holds `stages_per_rank`."""
    if costs.layer is None:
        return costs.pair * (forward.forward + backward.backward_input + backward.weight)
    one = share_of_rank(costs)
    num_layers = max(1, round(costs.layers / stages_per_rank))
    per_layer = costs.layers / num_layers
    return overlapped(
        costs, num_layers=num_layers, forward=per_layer * forward.forward / one.forward, backward=per_layer * backward.forward / one.forward
    )


def overlapped(costs: Costs, *, num_layers: int, forward: float = 1.0, backward: float = 1.0) -> float:
    """Seconds of a forward and a backward of `num_layers` layers on two streams, in DeepSeek-V3's order (report, figure 4).

    Compute: per layer MLP(I) MLP(W) MLP(F) ATTN(I) ATTN(W), and the next layer's ATTN(F). Communication: DISPATCH(F) DISPATCH(B)
    COMBINE(F), and the next layer's COMBINE(B). `forward` and `backward` scale the work of either. Each waits for its stream and its input.
    """
    layer = costs.layer
    assert layer is not None
    dispatch, combine = _all_to_alls(costs, layer)
    compute = communication = 0.0

    def run(seconds: float, ready: float) -> float:
        nonlocal compute
        compute = max(compute, ready) + seconds
        return compute

    def move(seconds: float, ready: float) -> float:
        nonlocal communication
        communication = max(communication, ready) + seconds
        return communication

    gradient = move(backward * dispatch, 0.0)
    hidden = run(forward * layer.attention_forward, 0.0)
    for index in range(num_layers):
        last = index == num_layers - 1
        tokens = move(forward * dispatch, hidden)
        gradient = run(backward * layer.mlp_backward_input, gradient)
        gradient = move(backward * combine, gradient)
        run(backward * layer.mlp_weight, 0.0)
        hidden = run(forward * layer.mlp_forward, tokens)
        hidden = move(forward * combine, hidden)
        gradient = run(backward * layer.attention_backward_input, gradient)
        if not last:
            gradient = move(backward * dispatch, gradient)
        run(backward * layer.attention_weight, 0.0)
        if not last:
            hidden = run(forward * layer.attention_forward, hidden)
    return max(compute, communication)


def _all_to_alls(costs: Costs, layer: Layer) -> tuple[float, float]:
    """Seconds of a dispatch and of a combine."""
    return (
        costs.all_to_all_latency + layer.dispatch_bytes / costs.all_to_all_bandwidth,
        costs.all_to_all_latency + layer.combine_bytes / costs.all_to_all_bandwidth,
    )


def durations(schedule: Schedule, costs: Costs) -> Durations:
    """What the schedule's ops and messages take."""
    cut = stages(costs, num_ranks=schedule.num_ranks, num_stages=schedule.num_stages)
    per_rank = schedule.num_stages / schedule.num_ranks
    held = {(f, b) for row in schedule.stages for _, f in row for _, b in row}
    return Durations(
        forward=tuple(stage.forward for stage in cut),
        backward=tuple(stage.backward_input + stage.weight for stage in cut),
        backward_input=tuple(stage.backward_input for stage in cut),
        weight=tuple(stage.weight for stage in cut),
        pair={(f, b): pair_seconds(costs, cut[f], cut[b], stages_per_rank=per_rank) for f, b in held},
        latency=costs.p2p_latency,
        wire=costs.message_bytes / costs.p2p_bandwidth,
    )


def _parts(profile: tuple[float, ...], num_stages: int) -> list[float]:
    """The share of the whole that falls to each of `num_stages` equal lengths of the profile; they add up to 1."""
    weights = profile or (1.0,)
    parts = [0.0] * num_stages
    for i, weight in enumerate(weights):
        # Part i covers [i, i + 1) / len(weights) of the model, stage s [s, s + 1) / num_stages; both in units of 1 / (their product).
        begin, end = i * num_stages, (i + 1) * num_stages
        for stage in range(begin // len(weights), -(-end // len(weights))):
            overlap = min(end, (stage + 1) * len(weights)) - max(begin, stage * len(weights))
            parts[stage] += weight * overlap / num_stages
    return [part / sum(weights) for part in parts]
