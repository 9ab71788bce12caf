"""The degrees of parallelism, who sits where, and every rule between the degrees, the model and the batch.

Ranks are numbered with tp innermost, then cp, dp and pp: rank = ((pp_index dp + dp_index) cp + cp_index) tp + tp_index, so that what
talks most lies closest. The dp x cp replicas at one place of pp, numbered dp_index cp + cp_index, are divided into neighbouring runs of
ep ranks that together hold all experts once; an expert's own replicas are the ranks at the same place of each run.

The pipeline schedule decides how the model's stages lie on the P places of pp:

    line     stage s at place s                            gpipe, 1f1b, zb1p
    loop     stage s at place s mod P, `chunks` each       interleaved, interleaved-zb
    v        2 P stages, down the places and up again      zbv, dualpipev
    mirror   stages s and P - 1 - s at place s             dualpipe: every stage lies twice, and so does every weight
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Literal

from quintet.errors import SpecError, did_you_mean
from quintet.spec.model import Model

Degree = Literal["dp", "tp", "pp", "ep", "cp", "expert_tp"]
PipelineName = Literal["gpipe", "1f1b", "interleaved", "zb1p", "interleaved-zb", "zbv", "dualpipev", "dualpipe"]
Arrangement = Literal["line", "loop", "v", "mirror"]

ARRANGEMENT: dict[PipelineName, Arrangement] = {
    "gpipe": "line",
    "1f1b": "line",
    "zb1p": "line",
    "interleaved": "loop",
    "interleaved-zb": "loop",
    "zbv": "v",
    "dualpipev": "v",
    "dualpipe": "mirror",
}
"""How the stages of each schedule lie on the places of pp; the schedules themselves are in `quintet.schedule`."""


@dataclass(frozen=True)
class Coordinates:
    """Where a rank sits on each axis; `expert_dp` counts the replicas of its experts, `ep` its place among them."""

    pp: int
    dp: int
    cp: int
    tp: int
    ep: int
    expert_dp: int
    expert_tp: int

    def along(self, axis: str) -> int:
        """The place on one axis."""
        place: int = getattr(self, axis)
        return place


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many ways each dimension is split; all 1 is a single device."""

    dp: int = 1
    """Data-parallel replicas: each takes its share of the batch."""
    tp: int = 1
    """Tensor-parallel ways: heads, feed-forwards and vocabulary are split, and the tokens outside of them."""
    pp: int = 1
    """Pipeline-parallel ways: the layers are split into stages."""
    ep: int = 1
    """Expert-parallel ways, inside dp x cp: the routed experts are split."""
    cp: int = 1
    """Context-parallel ways: the sequence is split, and keys and values go round a ring."""
    expert_tp: int = 1
    """Tensor-parallel ways of each routed expert: 1 (experts whole) or tp."""
    zero: Literal[0, 1, 2, 3] = 0
    """ZeRO stage: what replicas shard (1 optimizer state; 2 gradients too; 3 weights too)."""
    zero_ranks: int | None = None
    """Replicas that share one set of ZeRO's shards (hybrid sharding); absent: all of dp x cp."""
    node_size: int = 8
    """Devices of one node, between which links are fast."""
    schedule: PipelineName | None = None
    """Pipeline schedule; absent: dualpipev where experts are split, whose all-to-all it hides, zbv where they are not, and in steps with
    fewer than 2 pp micro-batches."""
    chunks: int = 2
    """Stages of each rank in the interleaved schedules."""
    schedule_file: str | None = None
    """A schedule that `quintet schedule search --save` wrote, for steps of as many micro-batches as it has; its stages must lie as those of
    `schedule`, which other steps go by."""
    cut: tuple[int, ...] | None = None
    """Layers of each pipeline stage; absent: as equal in cost as layers can be shared out."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "zero" and isinstance(value, int) and value < 1:
                raise SpecError(f"layout.{field.name} ({value}) must be at least 1")
        if self.schedule is not None and self.schedule not in ARRANGEMENT:
            near = did_you_mean(self.schedule, ARRANGEMENT)
            raise SpecError(f"layout.schedule {self.schedule!r} is not a schedule{near}; schedules: {', '.join(ARRANGEMENT)}")

    @property
    def num_ranks(self) -> int:
        """Devices that the layout takes."""
        return self.dp * self.tp * self.pp * self.cp

    @property
    def num_replicas(self) -> int:
        """Ranks of a stage that hold the same dense weights: dp x cp."""
        return self.dp * self.cp

    @property
    def expert_dp(self) -> int:
        """Ranks of a stage, at one place of tp, that hold the same experts."""
        return self.num_replicas // self.ep

    @property
    def pipeline(self) -> PipelineName:
        """The name of the schedule, chosen or by default."""
        return self.schedule or ("dualpipev" if self.ep > 1 else "zbv")

    def schedule_for(self, num_microbatches: int) -> PipelineName:
        """The name of the schedule for a step of so many micro-batches on each replica. Those of the default have the same stages."""
        return "zbv" if self.schedule is None and num_microbatches < 2 * self.pp else self.pipeline

    @property
    def arrangement(self) -> Arrangement:
        """How stages lie on the places of pp; a line without a pipeline."""
        return ARRANGEMENT[self.pipeline] if self.pp > 1 else "line"

    @property
    def num_stages(self) -> int:
        """Parts that the model is cut into."""
        return self.pp * {"line": 1, "loop": self.chunks, "v": 2, "mirror": 1}[self.arrangement]

    def place_of(self, stage: int) -> int:
        """The place on pp where a stage lies; of two, the one for micro-batches that enter at place 0."""
        turn, place = divmod(stage, self.pp)
        return self.pp - 1 - place if self.arrangement == "v" and turn else place

    def stages_at(self, place: int) -> tuple[int, ...]:
        """The stages that lie at a place of pp, ascending."""
        if self.arrangement == "mirror":
            return tuple(sorted({place, self.pp - 1 - place}))
        return tuple(stage for stage in range(self.num_stages) if self.place_of(stage) == place)

    def home(self, place: int) -> int:
        """The first of the places that hold the same stages as this one."""
        return min(place, self.pp - 1 - place) if self.arrangement == "mirror" else place

    def end(self, place: int) -> int:
        """The first of the places that hold the token embedding where this one does and both ends need it, else its home."""
        return 0 if place in (0, self.place_of(self.num_stages - 1)) else self.home(place)

    def num_microbatches(self, batch_sequences: int, micro_batch: int) -> int:
        """Micro-batches that each replica makes of its share of a batch; where the schedule wants an even number, the last may be empty."""
        count = max(-(-batch_sequences // (self.dp * micro_batch)), 1)
        return count + count % 2 if self.arrangement == "mirror" else count

    def degree(self, axis: str) -> int:
        """Ranks along an axis."""
        degree: int = getattr(self, axis)
        return degree

    def coordinates(self, rank: int) -> Coordinates:
        """Where `rank` sits."""
        rest, tp = divmod(rank, self.tp)
        replica, pp = rest % self.num_replicas, rest // self.num_replicas
        return Coordinates(
            pp=pp,
            dp=replica // self.cp,
            cp=replica % self.cp,
            tp=tp,
            ep=replica % self.ep,
            expert_dp=replica // self.ep,
            expert_tp=tp if self.expert_tp > 1 else 0,
        )

    def group_of(self, rank: int, axis: str) -> tuple[int, ...]:
        """The ranks that `rank` exchanges with along an axis of `GROUPS`, itself among them, ascending."""
        at, same = self.coordinates(rank), GROUPS[axis]
        num_at_place = self.num_ranks // self.pp
        places = range(self.pp) if axis == "pp" else sorted({at.pp, self.pp - 1 - at.pp})
        others = (place * num_at_place + i for place in places for i in range(num_at_place))
        key = same(self, at)
        return tuple(other for other in others if same(self, self.coordinates(other)) == key)

    def groups(self, axis: str) -> list[tuple[int, ...]]:
        """All groups of an axis of `GROUPS`, each ascending, by their first ranks."""
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.num_ranks):
            found.setdefault(GROUPS[axis](self, self.coordinates(rank)), []).append(rank)
        return [tuple(ranks) for ranks in found.values()]

    def nodes_of(self, ranks: Iterable[int]) -> tuple[int, ...]:
        """The nodes that the ranks lie on."""
        return tuple(sorted({rank // self.node_size for rank in ranks}))

    @property
    def options(self) -> str:
        """The degrees that are not 1, as they are written on a command line."""
        names = ("pp", "dp", "cp", "tp", "ep", "expert_tp", "zero_ranks")
        return " ".join(f"--layout.{name.replace('_', '-')} {value}" for name in names if (value := getattr(self, name)) not in (1, None))

    def __str__(self) -> str:
        shown = {"pp": self.pp, "dp": self.dp, "cp": self.cp, "tp": self.tp, "ep": self.ep, "expert_tp": self.expert_tp, "zero": self.zero}
        text = " ".join(f"{name}={value}" for name, value in shown.items() if value != (0 if name == "zero" else 1))
        pipeline = f" {self.pipeline}{self.chunks if self.arrangement == 'loop' else ''}" if self.pp > 1 else ""
        pipeline += f" {self.schedule_file}" if self.schedule_file else ""
        return (text or "one device") + (f" zero_ranks={self.zero_ranks}" if self.zero_ranks else "") + pipeline


Key = Callable[[Layout, Coordinates], tuple[int, ...]]

HOLDERS: dict[str, Key] = {
    "replicated": lambda layout, at: (layout.home(at.pp),),
    "tp_split": lambda layout, at: (layout.home(at.pp), at.tp),
    "expert": lambda layout, at: (layout.home(at.pp), at.ep),
    "expert_split": lambda layout, at: (layout.home(at.pp), at.ep, at.tp),
    "both_ends": lambda layout, at: (layout.end(at.pp), at.tp),
}
"""The ranks that hold the same values of a parameter, by what splits it: nothing; tp; ep; ep and expert_tp. `both_ends` is a token
embedding that the first and the last stage of a pipeline need."""


def _shard(holders: Key) -> Key:
    """Of the holders, those that divide one set of ZeRO's shards among them: each alone without ZeRO."""

    def key(layout: Layout, at: Coordinates) -> tuple[int, ...]:
        replica = at.dp * layout.cp + at.cp
        shared = (replica // (layout.zero_ranks or layout.num_replicas),) if layout.zero else (replica, at.tp, at.pp)
        return (*holders(layout, at), *shared)

    return key


def _replicate(holders: Key) -> Key:
    """Of the holders, those whose shards are equal."""

    def key(layout: Layout, at: Coordinates) -> tuple[int, ...]:
        if not layout.zero:
            return holders(layout, at)
        ranks = layout.zero_ranks or layout.num_replicas
        expert = holders in (HOLDERS["expert"], HOLDERS["expert_split"])
        within = at.expert_dp % max(ranks // layout.ep, 1) if expert else (at.dp * layout.cp + at.cp) % ranks
        return (*holders(layout, at), within, at.tp, at.pp)

    return key


GROUPS: dict[str, Key] = {
    "tp": lambda _, at: (at.pp, at.dp, at.cp),
    "dp": lambda _, at: (at.pp, at.cp, at.tp),
    "cp": lambda _, at: (at.pp, at.dp, at.tp),
    "ep": lambda _, at: (at.pp, at.tp, at.expert_dp),
    "pp": lambda _, at: (at.dp, at.cp, at.tp),
    # Ranks that share the sequences of one dp replica.
    "sequence": lambda _, at: (at.pp, at.dp),
    "stage": lambda _, at: (at.pp,),
    **{f"{name}.shard": _shard(holders) for name, holders in HOLDERS.items()},
    **{f"{name}.replicate": _replicate(holders) for name, holders in HOLDERS.items()},
}
"""Axis -> what the ranks of one group have in common. `.shard` and `.replicate` are ZeRO's."""


def broken_rules(layout: Layout, model: Model, sequence_lengths: Iterable[int]) -> list[str]:
    """Each rule that the layout breaks, with the values; empty if it is legal."""
    return list(_rules(layout, model, sequence_lengths))


def _rules(layout: Layout, model: Model, sequence_lengths: Iterable[int]) -> Iterator[str]:
    for what, count, axis in (
        ("model.num_heads", model.num_heads, "tp"),
        ("model.vocab_size", model.vocab_size, "tp"),
        ("model.dense_ffn_size", model.dense_ffn_size if model.num_dense_layers else 0, "tp"),
        ("model.num_shared_experts x expert_ffn_size", model.num_shared_experts * model.expert_ffn_size, "tp"),
        ("model.num_routed_experts", model.num_routed_experts, "ep"),
        ("model.expert_ffn_size", model.expert_ffn_size, "expert_tp"),
    ):
        if count % layout.degree(axis):
            yield _divisible(what, count, f"layout.{axis}", layout.degree(axis))
    for length in sorted(set(sequence_lengths)):
        if layout.cp > 1 and length % (2 * layout.cp):
            yield _divisible("sequence_length", length, "2 x layout.cp", 2 * layout.cp, each=2)
        elif length // layout.cp % layout.tp:
            yield _divisible(f"sequence_length / cp ({length} / {layout.cp})", length // layout.cp, "layout.tp", layout.tp)
    if layout.num_replicas % layout.ep:
        yield _divisible("layout.dp x cp", layout.num_replicas, "layout.ep", layout.ep)
    if layout.expert_tp not in (1, layout.tp):
        yield f"layout.expert_tp ({layout.expert_tp}) must be 1 or layout.tp ({layout.tp})"
    yield from _pipeline_rules(layout, model)
    if layout.zero_ranks is not None:
        if layout.num_replicas % layout.zero_ranks:
            yield _divisible("layout.dp x cp", layout.num_replicas, "layout.zero_ranks", layout.zero_ranks)
        if max(layout.zero_ranks, layout.ep) % min(layout.zero_ranks, layout.ep):
            yield f"layout.zero_ranks ({layout.zero_ranks}) must divide layout.ep ({layout.ep}) or be a multiple of it"
        if not layout.zero:
            yield f"layout.zero_ranks ({layout.zero_ranks}) needs layout.zero of 1, 2 or 3"
    if layout.num_ranks > layout.node_size and layout.num_ranks % layout.node_size:
        yield f"the layout's {layout.num_ranks} ranks must fill whole nodes of layout.node_size ({layout.node_size})"


def _pipeline_rules(layout: Layout, model: Model) -> Iterator[str]:
    if layout.pp == 1:
        if layout.cut is not None:
            yield f"layout.cut ({_numbers(layout.cut)}) needs layout.pp above 1"
        if layout.schedule_file is not None:
            yield f"layout.schedule_file ({layout.schedule_file}) needs layout.pp above 1"
        return
    several = layout.num_stages > layout.pp
    stages = f"{layout.num_stages} stages" + (f" ({layout.num_stages // layout.pp} on each rank)" if several else "")
    if layout.num_stages > model.num_layers:
        yield (
            f"layout.pp ({layout.pp}) with {layout.pipeline} makes {stages}, which must be at most model.num_layers ({model.num_layers})"
            + ("; 1f1b and zb1p put one on each rank" if several and layout.pp <= model.num_layers else "")
        )
    if layout.arrangement == "mirror" and layout.pp % 2:
        yield f"layout.pp ({layout.pp}) must be even for dualpipe, whose ranks mirror each other; dualpipev takes any number"
    if layout.arrangement == "loop" and layout.chunks < 2:
        yield f"layout.chunks ({layout.chunks}) must be at least 2 for {layout.pipeline}; with one stage on each rank it is 1f1b or zb1p"
    if layout.zero > 1:
        yield (
            f"layout.zero ({layout.zero}) must be 0 or 1 where layout.pp ({layout.pp}) is above 1: every micro-batch would send its "
            + ("gradients and gather the weights" if layout.zero == 3 else "gradients")
        )
    if layout.cut is not None:
        wrong = []
        if len(layout.cut) != layout.num_stages:
            wrong.append(f"it is for {len(layout.cut)}")
        if (shared := sum(layout.cut)) != model.num_layers:
            wrong.append(f"it shares out {shared}, {abs(shared - model.num_layers)} too {'many' if shared > model.num_layers else 'few'}")
        if few := [stage for stage, count in enumerate(layout.cut) if count < (stage < len(layout.cut) - 1)]:
            wrong.append(f"stage {few[0]} has {layout.cut[few[0]]}")
        if wrong:
            yield (
                f"layout.cut ({_numbers(layout.cut)}) must share out model.num_layers ({model.num_layers}) to {stages}, at least one to "
                f"each but the last, which may do with the head alone: {', and '.join(wrong)}"
            )


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


def _divisible(what: str, count: int, by: str, degree: int, *, each: int = 1) -> str:
    small = [d for d in range(1, math.isqrt(count) + 1) if count % d == 0]
    choices = [d for d in {*small, *(count // d for d in small)} if d % each == 0]
    near = sorted(sorted(choices, key=lambda d: abs(math.log(d / degree)))[:8])
    axis, values = by.removeprefix(f"{each} x "), ", ".join(str(choice // each) for choice in near)
    more = " ..." if len(choices) > len(near) else ""
    return f"{what} ({count}) must be divisible by {by} ({degree}); choose {axis} from {values}{more}"


def without_effect(layout: Layout) -> list[str]:
    """What a legal layout says that changes nothing, each in a sentence."""
    told = []
    if layout.pp == 1 and layout.schedule is not None:
        told.append(f"layout.schedule ({layout.schedule}) has no effect: layout.pp is 1")
    if layout.arrangement != "loop" and layout.chunks != 2:
        where = f"{layout.pipeline} has its own number of stages" if layout.pp > 1 else "layout.pp is 1"
        told.append(f"layout.chunks ({layout.chunks}) has no effect: {where}; interleaved and interleaved-zb take it")
    if layout.zero and layout.num_ranks == 1:
        told.append(f"layout.zero ({layout.zero}) has no effect: a single device has nobody to share with")
    if layout.zero_ranks == layout.num_replicas:
        told.append(f"layout.zero_ranks ({layout.zero_ranks}) has no effect: there are as many replicas, which is the default")
    return told
