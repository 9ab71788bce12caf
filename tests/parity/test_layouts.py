"""Every layout computes what one device computes: losses, gradient norm, every gradient and every updated weight, step by step.

A new parallel feature adds a row to LAYOUTS.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quintet.data.loader import Batch
from quintet.evaluate.choices import Choices
from quintet.evaluate.parity import Reference, Row, StepTrace, compare, first_failure, judge, trace_reference, trace_steps
from quintet.ops.cross_entropy import IGNORED
from quintet.parallel import bucket, collectives, expert, zero
from quintet.parallel.collectives import Group, Pending
from quintet.parallel.mesh import make_mesh, single
from quintet.schedule import fewest_microbatches
from quintet.spec.curriculum import Settings
from quintet.spec.layout import ARRANGEMENT, Layout
from quintet.spec.model import Model
from quintet.spec.run import Data, Optimizer, Phase, Run, Source, Train
from tests.ranks import on_ranks
from tests.spec.strategies import layouts

CPU = torch.device("cpu")
LENGTH = 32
FOUND = str(Path(__file__).parents[2] / "docs/images/found.json")
"""A schedule of 4 ranks and 16 micro-batches that search has found."""
SETTINGS = Settings(batch_sequences=5, learning_rate=1e-3, mtp_weight=0.3, bias_speed=0.01)
MODEL = Model(
    vocab_size=64,
    hidden_size=16,
    num_layers=3,
    num_dense_layers=1,
    num_heads=4,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=6,
    dense_ffn_size=24,
    expert_ffn_size=8,
    num_routed_experts=8,
    num_shared_experts=1,
    num_experts_per_token=2,
    num_groups=4,
    num_groups_per_token=2,
    num_mtp_modules=1,
    max_context=64,
    init_std=0.1,
)


def a_run(layout: Layout, **changes: Any) -> Run:
    """A tiny run; changes go to the train section, or to the model where it has such a field."""
    model = replace(MODEL, **{name: changes.pop(name) for name in list(changes) if hasattr(MODEL, name)})
    mask, moments, sequences = changes.pop("document_mask", False), changes.pop("moments", "fp32"), changes.pop("sequences", 5)
    train: dict[str, Any] = dict(micro_batch=2, precision="fp32", compile=False, device="cpu", balance_weight=0.01, loss_chunk=24)
    return Run(
        name="parity",
        model=model,
        data=Data(sources=(Source(name="s", paths=("x",), domain="code", weight=1.0),), directory="none", document_mask=mask),
        phases=(Phase(name="only", length="9 steps", sequence_length=LENGTH, batch=(str(sequences),), learning_rate=("1e-2",)),),
        train=Train(**(train | changes)),
        optimizer=Optimizer(moments=moments),
        layout=layout,
    )


def settings_of(run: Run) -> Settings:
    """Of every step."""
    return replace(SETTINGS, batch_sequences=int(run.phases[0].batch[0]))


def batches(run: Run, *, count: int = 2) -> list[Batch]:
    """Random rows, an uneven number of them, with padding at some ends and two documents in each."""
    generator = torch.Generator().manual_seed(7)
    made, num_rows = [], settings_of(run).batch_sequences
    for _ in range(count):
        tokens = torch.randint(run.model.vocab_size, (num_rows, LENGTH + 1), generator=generator)
        labels = tokens[:, 1:].clone()
        labels[1, -5:] = IGNORED
        labels[-1, 3:] = IGNORED
        borders = [(10, 21, 2, 31, 17)[i % 5] for i in range(num_rows)]
        made.append(Batch(inputs=tokens[:, :-1], labels=labels, sizes=[(first, LENGTH + 1 - first, 0) for first in borders]))
    return made


_REFERENCES: dict[str, Reference] = {}


def reference(run: Run) -> Reference:
    """The single device's traces, once for each run."""
    key = repr(replace(run, layout=Layout()))
    if key not in _REFERENCES:
        _REFERENCES[key] = trace_reference(run, batches(run), settings_of(run), device=CPU)
    return _REFERENCES[key]


def rows_of(run: Run) -> list[Row]:
    """The layout's comparisons with one device."""
    expected = reference(run)
    assert all(math.isfinite(step.gradient_norm) for step in expected.exact)

    def work(rank: int) -> list[StepTrace]:
        return trace_steps(run, make_mesh(run.layout), batches(run), settings_of(run), device=CPU, repeat=expected.choices)

    return judge(expected, on_ranks(run.layout.num_ranks, work))


LAYOUTS: list[tuple[Layout, dict[str, Any]]] = [
    (Layout(dp=2), {}),
    (Layout(dp=2, zero=1), {}),
    (Layout(dp=2, zero=2), {}),
    (Layout(dp=2, zero=3), {}),
    (Layout(dp=4, zero=1, zero_ranks=2), {}),
    (Layout(dp=2, zero=3), {"recompute": "full"}),
    (Layout(dp=2, zero=3), {"recompute": "selective", "num_mtp_modules": 2}),
    (Layout(dp=3, zero=2), {"moments": "bf16"}),
    (Layout(tp=2), {}),
    (Layout(tp=4), {"tie_embeddings": True}),
    (Layout(tp=2, expert_tp=2), {}),
    (Layout(cp=2), {}),
    (Layout(cp=4), {"document_mask": True}),
    (Layout(dp=2, ep=2), {}),
    (Layout(dp=4, ep=4), {"recompute": "full"}),
    (Layout(cp=2, ep=2), {}),
    (Layout(dp=2, tp=2), {}),
    (Layout(dp=2, tp=2, zero=3), {}),
    (Layout(dp=2, cp=2, zero=1), {}),
    (Layout(tp=2, cp=2), {"document_mask": True}),
    (Layout(dp=4, ep=2, zero=1), {}),
    (Layout(dp=4, ep=2, zero=2), {}),
    (Layout(dp=4, ep=2, zero=3), {}),
    (Layout(dp=4, ep=2, zero=1, zero_ranks=2), {}),
    (Layout(dp=2, tp=2, ep=2), {}),
    (Layout(dp=2, tp=2, ep=2, expert_tp=2, zero=1), {}),
    (Layout(dp=2, cp=2, ep=4, zero=2), {"recompute": "selective"}),
    (Layout(dp=2, tp=2, cp=2, ep=2, zero=1), {"document_mask": True}),
    (Layout(dp=2, tp=2, cp=2, ep=4, zero=3), {}),
    (Layout(dp=4, tp=2, cp=2, ep=4, zero=1, node_size=16), {"num_mtp_modules": 2}),
    (Layout(dp=2, zero=1), {"num_dense_layers": 3, "num_mtp_modules": 0}),
    (Layout(dp=2, tp=2), {"q_lora_rank": None, "num_shared_experts": 0}),
    (Layout(dp=2, zero=1), {"precision": "bf16"}),
    (Layout(tp=2), {"precision": "bf16"}),
    (Layout(cp=2), {"precision": "bf16"}),
    (Layout(dp=2, ep=2, zero=3), {"precision": "bf16"}),
    (Layout(dp=2, tp=2, cp=2, ep=2, zero=1), {"precision": "bf16"}),
    (Layout(dp=2, ep=2), {"capacity_factor": 1.0}),
    *((Layout(pp=2, schedule=name), {"micro_batch": 1, "num_layers": 4}) for name in ARRANGEMENT),
    (Layout(pp=3, schedule="zbv"), {"num_layers": 7, "num_mtp_modules": 0, "sequences": 3}),
    (Layout(pp=4, schedule="1f1b", cut=(2, 1, 3, 0)), {"num_layers": 6}),
    (Layout(pp=2, dp=2, zero=1, schedule="1f1b"), {"tie_embeddings": True}),
    (Layout(pp=2, dp=2, zero=1), {"num_layers": 4, "recompute": "full"}),
    (Layout(pp=2, dp=2, ep=2, zero=1), {"num_layers": 4, "micro_batch": 1, "sequences": 9}),
    (Layout(pp=2, dp=2, ep=2, zero=1, schedule="dualpipe"), {"micro_batch": 1, "sequences": 9}),
    (Layout(pp=2, tp=2, schedule="interleaved"), {"num_layers": 4, "tie_embeddings": True}),
    (Layout(pp=2, cp=2, schedule="zb1p"), {"document_mask": True}),
    (Layout(pp=2, dp=2, schedule="interleaved-zb"), {"num_layers": 5, "recompute": "selective", "num_mtp_modules": 2}),
    (Layout(pp=4, dp=2, ep=2, schedule="dualpipe"), {"num_layers": 7, "micro_batch": 1, "sequences": 17}),
    (Layout(pp=2, tp=2, cp=2, ep=2, zero=1), {"num_layers": 4, "micro_batch": 1}),
    (Layout(pp=4, schedule="dualpipe", schedule_file=FOUND), {"num_layers": 5, "micro_batch": 1, "sequences": 15}),
    (Layout(pp=8, schedule="dualpipe"), {"num_layers": 9, "micro_batch": 1, "sequences": 16}),
    (Layout(pp=2, dp=2, tp=2, cp=2, ep=4, zero=1, node_size=16), {"num_layers": 4, "micro_batch": 1, "sequences": 9}),
    (Layout(pp=2, dp=2, tp=2, ep=2, zero=1, schedule="dualpipe"), {"micro_batch": 1, "sequences": 9, "precision": "bf16"}),
]


def _id(value: Layout | dict[str, Any]) -> str:
    return str(value).replace(FOUND, "found.json") if isinstance(value, Layout) else ",".join(value)


@pytest.mark.parametrize(("layout", "changes"), LAYOUTS, ids=_id)
def test_a_layout_computes_what_one_device_computes(layout: Layout, changes: dict[str, Any]) -> None:
    rows = rows_of(a_run(layout, **changes))
    assert first_failure(rows) is None
    # Nothing was left out: every parameter's gradient, and every weight or, in fp32, bias.
    kinds = {what: {row.name for row in rows if row.what == what} for what in ("gradient", "weight")}
    assert len(kinds["gradient"]) > 30 and kinds["gradient"] <= kinds["weight"]


@settings(max_examples=6)
@given(st.data())
def test_random_legal_layouts_compute_what_one_device_computes(data: st.DataObject) -> None:
    model = replace(MODEL, num_layers=5)
    layout = data.draw(layouts(model, [LENGTH]).filter(lambda layout: 1 < layout.num_ranks <= 8))
    fewest = fewest_microbatches(layout.pipeline, layout.pp) if layout.pp > 1 else 1
    run = a_run(
        layout,
        num_layers=model.num_layers,
        sequences=max(5, layout.dp * 2 * fewest),
        recompute=data.draw(st.sampled_from(["none", "selective", "full"])),
        document_mask=data.draw(st.booleans()),
    )
    assert first_failure(rows_of(run)) is None


def forgets_to_sum(tensor: Tensor, group: Group) -> Pending:
    """A reduce-scatter that keeps this rank's own part."""
    return Pending(tensor.chunk(group.size)[group.rank].clone(), None)


def sums_twice(tensor: Tensor, group: Group, **named: Any) -> Pending:
    """An all-reduce that counts everything twice."""
    return Pending(collectives.start_all_reduce(tensor, group, **named).wait() * 2, None)


_sum_in_order = collectives.sum_in_order


def forgets_the_last(terms: Tensor) -> Tensor:
    """A sum of scattered terms that lacks one of them."""
    return _sum_in_order(terms[:-1])


_back = expert._Back.wait


def in_another_order(back: expert._Back) -> Tensor:
    """The gradients of rows as they come back, but each for another row."""
    arrived = _back(back)
    return torch.cat((arrived[:-1].flip(0), arrived[-1:]))  # the last one may be spare


def own_part(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of gathered tokens, without the other ranks' terms."""
    return grads[0].chunk(ctx.group.size, ctx.dim)[ctx.group.rank].contiguous(), None, None


_wait = collectives.Shift.wait


def zeros_instead(shift: collectives.Shift) -> list[Tensor]:
    """What the previous rank sent, lost."""
    return [torch.zeros_like(tensor) for tensor in _wait(shift)]


FAULTS: dict[str, tuple[Layout, object, str, Any]] = {
    "a reduce-scatter that does not sum": (Layout(dp=2, zero=1), bucket, "start_reduce_scatter", forgets_to_sum),
    "a sum that lacks one of four terms": (Layout(dp=4, zero=1), collectives, "sum_in_order", forgets_the_last),
    "an all-reduce that sums twice": (Layout(dp=2), zero, "start_all_reduce", sums_twice),
    "row gradients in a wrong order": (Layout(dp=2, ep=2), expert._Back, "wait", in_another_order),
    "tokens gathered whose gradients are not summed": (Layout(tp=2), collectives._Gather, "backward", staticmethod(own_part)),
    "a ring that passes zeros on": (Layout(cp=2), collectives.Shift, "wait", zeros_instead),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_collective_is_caught_and_its_first_victim_named(fault: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, owner, name, broken = FAULTS[fault]
    run = a_run(layout, precision=precision)
    reference(run)  # before the fault
    monkeypatch.setattr(owner, name, broken)
    rows = rows_of(run)
    failure = first_failure(rows)
    assert failure is not None and failure.step == 1
    # By far more than rounding: what bf16 is allowed, but for the largest of its own errors.
    off, allowed = max((row.error, row.tolerance) for row in rows if row.what == "gradient")
    assert off > 2 * allowed


def test_in_bf16_few_tokens_agree_because_both_repeat_the_choices_of_fp32() -> None:
    # One of two sequences goes elsewhere: on its own, either computation tips some router's choice, and its gradient is off by a third.
    run = a_run(Layout(dp=2), precision="bf16", sequences=2, capacity_factor=1.2, balance_weight=1e-4)
    expected = reference(run)
    assert expected.choices is not None and expected.rounded is not None

    def off(repeat: Choices | None) -> float:
        found = trace_steps(run, single(), batches(run), settings_of(run), device=CPU, repeat=repeat)
        return max(row.error for row in compare(expected.exact, [found], tolerance=1) if row.what == "gradient")

    run = replace(run, layout=Layout())
    assert off(expected.choices) < 0.05 < 0.15 < off(None)
