"""ZeRO beyond its values (see tests/parity): what it holds and when, in which order ranks speak, and steps that are empty or bad."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quintet.data.loader import Batch
from quintet.errors import NumericsError
from quintet.evaluate.parity import first_failure, judge, trace_reference, trace_steps
from quintet.model.transformer import Transformer
from quintet.parallel import bucket as buckets
from quintet.parallel import collectives, expert, zero
from quintet.parallel.bucket import Bucket
from quintet.parallel.collectives import Group
from quintet.parallel.mesh import make_mesh, single
from quintet.parallel.zero import ShardedParameters
from quintet.spec.curriculum import Settings
from quintet.spec.layout import Layout
from quintet.spec.run import Run
from quintet.train.build import Built, build
from quintet.train.step import run_step
from tests.parity.test_layouts import MODEL, SETTINGS, a_run, batches
from tests.ranks import on_ranks

CPU = torch.device("cpu")


def built(run: Run) -> Built:
    return build(run, make_mesh(run.layout), CPU, on_message=lambda text: None)


def step(made: Built, run: Run, batch: Batch, number: int = 1, *, settings: Settings = SETTINGS) -> None:
    """One step of this rank's rows of the batch."""
    own = batch.rows(slice(made.mesh.at.dp, None, run.layout.dp))
    run_step(made, own, settings=settings, train=run.train, document_mask=False, step=number)


def masters(made: Built) -> list[Tensor]:
    return [bucket.master.clone() for bucket in made.parameters.buckets]


def first_rows(batch: Batch, count: int) -> Batch:
    return batch.rows(slice(count))


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize(
    "layout",
    [Layout(dp=3), Layout(dp=3, zero=1), Layout(dp=3, ep=3, zero=2), Layout(dp=3, zero=3), Layout(dp=4, ep=2, zero=2, zero_ranks=1)],
    ids=str,
)
def test_ranks_whose_share_is_smaller_or_nothing_take_part_all_the_same(layout: Layout, count: int) -> None:
    """Of 1 sequence all ranks but the first get none; of 4, some go through a second micro-batch without rows."""
    run = a_run(layout, micro_batch=1, num_routed_experts=12)
    settings = replace(SETTINGS, batch_sequences=count)
    some = [first_rows(batch, count) for batch in batches(run)]
    expected = trace_reference(run, some, settings, device=CPU)
    found = on_ranks(layout.num_ranks, lambda rank: trace_steps(run, make_mesh(layout), some, settings, device=CPU))
    assert first_failure(judge(expected, found)) is None


Call = tuple[str, tuple[int, ...], int]
"""Of a collective: its name, the group's ranks and the elements that go in, unless ranks may send different numbers."""


@pytest.mark.parametrize("layout", [Layout(dp=2, ep=2, tp=2, zero=1), Layout(dp=4, ep=2, zero=3, zero_ranks=2)], ids=str)
def test_every_rank_makes_the_same_calls_in_the_same_order(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all calls that two ranks are both in, whatever the group: gloo would forgive another order, NCCL would wait for ever. The ranks'
    loads of experts and numbers of rows differ."""
    calls: list[Call] = []

    def noted(name: str) -> Callable[..., Any]:
        real = getattr(collectives, name)

        def call(tensor: Tensor, *rest: Any, **named: Any) -> Any:
            group = next(value for value in rest if isinstance(value, Group))
            calls.append((name, group.ranks, 0 if name == "start_all_to_all" else tensor.numel()))
            return real(tensor, *rest, **named)

        return call

    for name in ("start_all_reduce", "start_reduce_scatter", "start_all_gather", "start_all_to_all"):
        replaced = noted(name)
        monkeypatch.setattr(collectives, name, replaced)
        for module in (buckets, expert, zero):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, replaced)

    def work(rank: int) -> list[Call]:
        run = a_run(layout, micro_batch=1)
        made = built(run)
        for number, batch in enumerate(batches(run), 1):
            step(made, run, batch, number)
        return calls

    found = on_ranks(layout.num_ranks, work)
    for (one, made), (two, others) in itertools.combinations(enumerate(found), 2):
        common = [[call for call in some if {one, two} <= set(call[1])] for some in (made, others)]
        assert common[0] == common[1] and common[0]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_a_step_that_is_not_finite_leaves_no_trace(stage: int, micro_batch: int) -> None:
    run = a_run(Layout(dp=2, zero=stage), micro_batch=micro_batch)  # type: ignore[arg-type]
    good, bad, better = batches(run, count=3)

    def work(rank: int) -> bool:
        made, other = built(run), built(run)
        for each in (made, other):
            step(each, run, good)
        before = masters(made)
        real = made.parameters.norm_squared
        made.parameters.norm_squared = lambda: real() * (float("nan") if rank == 1 else 1.0)  # type: ignore[method-assign]
        with pytest.raises(NumericsError, match=r"step 2: loss .* gradient norm nan"):
            step(made, run, bad, 2)
        made.parameters.norm_squared = real  # type: ignore[method-assign]
        assert all(torch.equal(a, b) for a, b in zip(before, masters(made), strict=True))
        assert all(bucket.gradient is None and bucket.gradient_shard is None for bucket in made.parameters.buckets)
        for each in (made, other):
            step(each, run, better, 2)
        return all(torch.equal(a, b) for a, b in zip(masters(made), masters(other), strict=True))

    assert on_ranks(2, work) == [True, True]


def whole_weights(parameters: ShardedParameters) -> list[Bucket]:
    """The buckets of stage 3 whose whole weights are in memory."""
    return [bucket for bucket in parameters.buckets if bucket.keeps_shards and bucket.weights.untyped_storage().size()]


def names_of(bucket: Bucket) -> set[str]:
    """The parts of the model that a bucket's parameters belong to: `layers.0`, `mtp.1`, `embed.weight`."""
    return {".".join(piece.name.split(".")[:2]) for piece in bucket.pieces}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_stage_3_has_few_layers_whole_at_a_time_and_none_behind_the_backward(recompute: str) -> None:
    run = a_run(Layout(dp=2, zero=3), recompute=recompute, num_layers=8, num_mtp_modules=2, micro_batch=3)

    def work(rank: int) -> None:
        made = built(run)
        assert whole_weights(made.parameters) == [], "nothing is whole before the first forward"
        most: list[int] = []

        def look(*anything: object) -> None:
            parts = set().union(*(names_of(bucket) for bucket in whole_weights(made.parameters)))
            most.append(len({part for part in parts if part.startswith(("layers.", "mtp."))}))

        for name, parameter in made.model.named_parameters():
            parameter.register_post_accumulate_grad_hook(look)
            if name.endswith("attention_norm.weight"):
                made.model.get_submodule(name.removesuffix(".weight")).register_forward_hook(look)
        for number, batch in enumerate(batches(run), 1):
            step(made, run, batch, number)
            assert whole_weights(made.parameters) == [], "nothing stays whole behind an update"
        # One at work, the next one on its way; the module's last norm is whole like embedding and head.
        assert max(most) <= 4 and len(most) > 200

    on_ranks(2, work)


def test_a_forward_without_targets_gathers_no_module_that_predicts_further_tokens() -> None:
    run = a_run(Layout(dp=2, zero=3))

    def work(rank: int) -> None:
        made, other = built(run), built(run)
        for each in (made, other):
            step(each, run, batches(run)[0])
        batch = batches(run)[1]
        with torch.no_grad():
            hidden = made.model(batch.inputs).hidden
            assert torch.isfinite(made.model.loss(hidden, batch.labels, chunk=24))
        held = set().union(*(names_of(bucket) for bucket in whole_weights(made.parameters)))
        assert held == {"embed.weight", "head.weight", "norm.weight", "mtp.0"}
        (module,) = [bucket for bucket in whole_weights(made.parameters) if "mtp.0" in names_of(bucket)]
        assert [piece.name for piece in module.pieces] == ["mtp.0.norm.weight"]
        for each in (made, other):
            step(each, run, batch, 2)
        assert all(torch.equal(a, b) for a, b in zip(masters(made), masters(other), strict=True)), "a look changes nothing"

    on_ranks(2, work)


@pytest.mark.parametrize(("stage", "most"), [(1, 1.0), (2, 0.6), (3, 0.6)])
def test_whole_gradients_are_given_away_while_backward_runs(stage: int, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """`most` of all gradients exist at a time; stage 1 keeps all of them while micro-batches add up."""
    defaults = ShardedParameters.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "closed_at", 3000)
    run = a_run(Layout(dp=2, zero=stage), num_layers=8, micro_batch=1)  # type: ignore[arg-type]

    def work(rank: int) -> tuple[float, float]:
        mesh = make_mesh(run.layout)
        made = build(run, mesh, CPU, on_message=lambda text: None)
        parameters = made.parameters
        held: list[int] = []

        def look(parameter: Tensor) -> None:
            alive = [bucket.numel for bucket in parameters.buckets if bucket.gradient is not None]
            held.append(sum(alive) + sum(reduction.whole.numel() for reduction in parameters._started))

        for parameter in made.model.parameters():
            parameter.register_post_accumulate_grad_hook(look)
        step(made, run, batches(run)[0])
        whole = sum(bucket.numel for bucket in parameters.buckets)
        kept = sum(bucket.master.numel() for bucket in parameters.buckets)
        return max(held) / whole, kept / whole

    for gradients, state in on_ranks(2, work):
        assert gradients <= most and state == 0.5
        assert (gradients > 0.9) == (stage == 1), "the measure sees what there is"


@pytest.mark.parametrize("stage", [1, 2])
def test_weights_arrive_beside_the_next_forward_and_each_part_waits_for_its_own(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = ShardedParameters.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "closed_at", 3000)
    run = a_run(Layout(dp=2, zero=stage), num_layers=6)  # type: ignore[arg-type]

    def work(rank: int) -> None:
        made = built(run)
        step(made, run, batches(run)[0])
        awaited = [bucket for bucket in made.parameters.buckets if bucket._gathering is not None]
        assert awaited == made.parameters.buckets and len(awaited) > 5

        def under_way() -> set[str]:
            return set().union(*(names_of(bucket) for bucket in made.parameters.buckets if bucket._gathering is not None))

        seen = {}
        for part in (*made.model.layers, made.model.norm):
            part.register_forward_hook(lambda module, args, output: seen.update({module: under_way()}))
        made.model(batches(run)[1].inputs)
        for i, part in enumerate(made.model.layers):
            assert f"layers.{i}" not in seen[part]
        assert "layers.5" in seen[made.model.layers[0]], "what comes later is still under way"
        assert {"head.weight", "norm.weight"} & seen[made.model.norm] == set() and "mtp.0" in seen[made.model.norm]
        made.parameters.finish_gathering()
        assert under_way() == set()

    on_ranks(2, work)


def test_buckets_are_closed_by_the_elements_of_a_rank() -> None:
    """The experts of 7 layers have 3,072 elements each, but a rank has a quarter of them."""

    def work(rank: int) -> list[int]:
        run = a_run(Layout(dp=4, ep=4), num_layers=8, num_mtp_modules=0)
        with torch.device("meta"):
            model = Transformer(run.model)
        parameters = ShardedParameters(model, make_mesh(run.layout), dtype=torch.float32, device=CPU, closed_at=5000)
        return [bucket.numel for bucket in parameters.buckets if any(".experts." in piece.name for piece in bucket.pieces)]

    assert on_ranks(4, work) == [[7 * 3072 // 4]] * 4


class _Part(nn.Module):
    """A layer with a weight that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Parameter(torch.empty(8, 8)), nn.Parameter(torch.empty(8, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return torch.tanh(x @ self.used), None


class _Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Part() for _ in range(3))
        self.model = MODEL

    def forward(self, x: Tensor) -> Tensor:
        for part in self.layers:
            x, _ = part(x)
        return x


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_parameter_without_a_gradient_counts_as_zero_and_holds_nothing_up(stage: int) -> None:
    def work(rank: int) -> list[float]:
        with torch.device("meta"):
            model = _Parts()
        parameters = ShardedParameters(model, make_mesh(Layout(dp=2, zero=stage)), dtype=torch.float32, device=CPU)  # type: ignore[arg-type]
        parameters.fill(lambda piece: torch.eye(8))
        norms = []
        for _ in range(2):
            parameters.begin_step(mtp=False)
            for last in (False, True):
                parameters.begin_micro_batch(last=last)
                model(torch.ones(2, 8)).sum().backward()
                parameters.end_micro_batch()
                assert [bucket for bucket in whole_weights(parameters) if names_of(bucket) != {"root"}] == []
            norms.append(float(parameters.norm_squared()))
            for bucket in parameters.updated():
                for part in bucket.parts(bucket.gradient_shard):  # type: ignore[arg-type]
                    assert bool(part.values.any()) == part.piece.name.endswith(".used")
            parameters.discard()
        return norms

    first, second = (sum(terms) for terms in zip(*on_ranks(2, work), strict=True))
    assert first == second > 0


def test_one_device_needs_no_room_for_shards() -> None:
    run = a_run(Layout())
    made = build(run, single(), CPU, on_message=lambda text: None)
    for bucket in made.parameters.buckets:
        assert bucket.master.data_ptr() == bucket.weights.data_ptr() and not bucket.keeps_shards
