"""Every layout computes what one device computes: losses, gradient norm, every gradient and every updated weight, step by step.

A new parallel feature adds a row to LAYOUTS.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from quintet.data.loader import Batch
from quintet.evaluate.parity import TOLERANCES, StepTrace, compare, first_failure, trace_steps
from quintet.ops.cross_entropy import IGNORED
from quintet.parallel.mesh import make_mesh, single
from quintet.spec.curriculum import Settings
from quintet.spec.layout import Layout
from quintet.spec.model import Model
from quintet.spec.run import Data, Optimizer, Phase, Run, Source, Train
from tests.ranks import on_ranks

CPU = torch.device("cpu")
LENGTH = 32
SETTINGS = Settings(batch_sequences=5, learning_rate=1e-2, mtp_weight=0.3, bias_speed=0.01)
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
    mask, moments = changes.pop("document_mask", False), changes.pop("moments", "fp32")
    train: dict[str, Any] = dict(micro_batch=2, precision="fp32", compile=False, device="cpu", balance_weight=0.01, loss_chunk=24)
    return Run(
        name="parity",
        model=model,
        data=Data(sources=(Source(name="s", paths=("x",), domain="code", weight=1.0),), directory="none", document_mask=mask),
        phases=(Phase(name="only", length="9 steps", sequence_length=LENGTH, batch=("5",), learning_rate=("1e-2",)),),
        train=Train(**(train | changes)),
        optimizer=Optimizer(moments=moments),
        layout=layout,
    )


def batches(run: Run, *, count: int = 2) -> list[Batch]:
    """Random rows, an uneven number of them, with padding at some ends and two documents in each."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for _ in range(count):
        tokens = torch.randint(run.model.vocab_size, (SETTINGS.batch_sequences, LENGTH + 1), generator=generator)
        labels = tokens[:, 1:].clone()
        labels[1, -5:] = IGNORED
        labels[4, 3:] = IGNORED
        ids = (torch.arange(LENGTH) > torch.tensor([[9], [20], [1], [30], [16]])).int()
        made.append(Batch(inputs=tokens[:, :-1].contiguous(), labels=labels, document_ids=ids))
    return made


_REFERENCES: dict[str, list[StepTrace]] = {}


def reference(run: Run) -> list[StepTrace]:
    """The single device's trace, once for each run."""
    alone = replace(run, layout=Layout())
    key = repr(alone)
    if key not in _REFERENCES:
        _REFERENCES[key] = trace_steps(alone, single(), batches(alone), SETTINGS, device=CPU)
    return _REFERENCES[key]


def check(run: Run) -> None:
    expected = reference(run)
    assert all(math.isfinite(step.gradient_norm) for step in expected)
    found = on_ranks(run.layout.num_ranks, lambda rank: trace_steps(run, make_mesh(run.layout), batches(run), SETTINGS, device=CPU))
    rows = compare(expected, found, tolerance=TOLERANCES[run.train.precision])
    failure = first_failure(rows)
    assert failure is None, failure
    assert len(rows) > 100


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
]


@pytest.mark.parametrize(("layout", "changes"), LAYOUTS, ids=lambda value: str(value) if isinstance(value, Layout) else ",".join(value))
def test_a_layout_computes_what_one_device_computes(layout: Layout, changes: dict[str, Any]) -> None:
    check(a_run(layout, **changes))
