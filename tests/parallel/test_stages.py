"""A stage does no work twice, whatever is put off, and keeps nothing that it need not."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import torch

from quintet.cost.memory import stage_bytes
from quintet.ops import deferred, grouped_matmul
from quintet.parallel.mesh import make_mesh
from quintet.parallel.stages import ModelStage
from quintet.spec.layout import Layout
from quintet.train.build import build
from quintet.train.step import accumulate
from tests.parity.test_layouts import CPU, a_run, batches, settings_of
from tests.ranks import on_ranks


def counted(layout: Layout, **changes: Any) -> tuple[Counter[str], int]:
    """How often products ran forward and backward and weight gradients were computed in a step on all ranks, and the tensors left."""
    run = a_run(layout, num_layers=4, micro_batch=1, sequences=4, **changes)

    def work(rank: int) -> tuple[Counter[str], int]:
        patch, found = pytest.MonkeyPatch(), Counter[str]()

        def count(owner: Any, name: str, what: str) -> None:
            real = getattr(owner, name)

            def call(*arguments: Any, **named: Any) -> Any:
                found[what] += 1
                return real(*arguments, **named)

            patch.setattr(owner, name, staticmethod(call) if isinstance(owner, type) else call)

        count(deferred, "linear_reference", "forward")
        count(deferred._Linear, "backward", "backward")
        count(grouped_matmul._GroupedMatmul, "forward", "experts forward")
        count(grouped_matmul._GroupedMatmul, "backward", "experts backward")
        real = deferred.deferred

        def weight_gradient(parameter: Any, make: Any) -> Any:
            def counting() -> Any:
                found["weight gradients"] += 1
                return make()

            return real(parameter, counting)

        for module in (deferred, grouped_matmul):
            patch.setattr(module, "deferred", weight_gradient)
        built = build(run, make_mesh(layout), CPU, on_message=lambda text: None)
        accumulate(built, batches(run)[0], settings=settings_of(run), train=run.train, document_mask=False)
        gc.collect()
        stages = [thing for thing in gc.get_objects() if type(thing) is ModelStage]
        return found, sum(len(stage.kept) + len(stage.later) for stage in stages)

    counts = on_ranks(layout.num_ranks, work)
    return sum((found for found, _ in counts), Counter()), sum(left for _, left in counts)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_schedule_that_splits_backward_computes_as_often_as_one_device(recompute: str) -> None:
    expected, _ = counted(Layout(), recompute=recompute)
    assert expected["weight gradients"] == expected["backward"] + expected["experts backward"] > 0
    for schedule in ("zb1p", "zbv", "dualpipev"):
        found, left = counted(Layout(pp=2, schedule=schedule), recompute=recompute)
        assert (found, left) == (expected, 0), schedule


def test_the_output_of_a_stage_is_free_when_it_has_left() -> None:
    """What waits for backward is the edge of the output, not the output."""
    run = a_run(Layout(pp=2, schedule="1f1b"), num_layers=4, micro_batch=1, sequences=2)

    def work(rank: int) -> list[bool]:
        found: list[bool] = []
        built = build(run, make_mesh(run.layout), CPU, on_message=lambda text: None)
        real = ModelStage.forward

        def forward(stage: ModelStage, microbatch: int, x: Any) -> Any:
            y = yield from real(stage, microbatch, x)
            if y is not None:
                place = y.data_ptr()
                tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor and thing is not y and thing.device == CPU]
                found.append(any(tensor.layout == torch.strided and tensor.data_ptr() == place for tensor in tensors))
            return y

        pytest.MonkeyPatch().setattr(ModelStage, "forward", forward)
        accumulate(built, batches(run)[0], settings=settings_of(run), train=run.train, document_mask=False)
        return found

    assert on_ranks(2, work) == [[False, False], []]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_what_a_stage_keeps_for_weight_gradients_is_what_cost_counts(recompute: Any) -> None:
    run = a_run(Layout(pp=2, schedule="zbv"), num_layers=5, micro_batch=1, sequences=4, recompute=recompute, num_mtp_modules=1)

    def work(rank: int) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        built = build(run, make_mesh(run.layout), CPU, on_message=lambda text: None)
        assert built.pipeline is not None
        numbers = {stage: number for number, stage in built.pipeline.stages.items()}
        weights = {parameter.untyped_storage().data_ptr() for parameter in built.model.parameters()}
        real = ModelStage.weights

        def put_off(stage: ModelStage, microbatch: int) -> None:
            cells = [cell.cell_contents for _, make in stage.later[microbatch]._work for cell in make.__closure__ or ()]
            storages = [cell.untyped_storage() for cell in cells if isinstance(cell, torch.Tensor)]
            held = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in weights}
            found.setdefault(numbers[stage.stage], []).append(sum(held.values()))
            real(stage, microbatch)

        pytest.MonkeyPatch().setattr(ModelStage, "weights", put_off)
        accumulate(built, batches(run)[0], settings=settings_of(run), train=run.train, document_mask=False)
        return found

    for place, found in enumerate(on_ranks(2, work)):
        counted = stage_bytes(run.model, run.train, run.layout, place=place, sequence_length=run.phases[0].sequence_length).put_off
        assert set(found) == set(counted)
        for number, held in found.items():  # experts' rows, which are padded, are a mean over the layers
            assert sum(held) / len(held) == pytest.approx(counted[number], rel=0.01), (number, held)


def test_a_model_that_is_given_up_is_freed_with_its_buckets() -> None:
    """A run that cuts its stages anew builds another model: two must not live."""

    def work(rank: int) -> list[bool]:
        run = a_run(Layout(pp=2, schedule="1f1b"), num_layers=4, micro_batch=1, sequences=2)
        built = build(run, make_mesh(run.layout), CPU, on_message=lambda text: None)
        accumulate(built, batches(run)[0], settings=settings_of(run), train=run.train, document_mask=False)
        watched = [weakref.ref(thing) for thing in (built.model, built.parameters, built.parameters.buckets[0])]
        del built
        gc.collect()
        return [reference() is not None for reference in watched]

    assert on_ranks(2, work) == [[False] * 3] * 2
