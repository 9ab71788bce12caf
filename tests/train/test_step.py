"""One optimizer step: micro-batches add up to the batch, the router's bias moves once, and what is not finite changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quintet.data.loader import Batch, Loader
from quintet.data.prepare import Prepared
from quintet.errors import NumericsError
from quintet.model.router import updated_bias
from quintet.parallel.mesh import single
from quintet.parallel.zero import ShardedParameters
from quintet.spec.curriculum import Settings
from quintet.spec.run import Run
from quintet.train import step as step_module
from quintet.train.build import Built, build
from quintet.train.state import tensors
from quintet.train.step import StepResult, run_step

SETTINGS = Settings(batch_sequences=4, learning_rate=1e-2, mtp_weight=0.3, bias_speed=0.01)


def batch_of(prepared: Prepared, run: Run, num_sequences: int, *, sequence_length: int = 32) -> Batch:
    return Loader(prepared, run.data, sequence_length=sequence_length, seed=0).next_batch(num_sequences)


def built(run: Run) -> Built:
    return build(run, single(), torch.device("cpu"), on_message=lambda text: None)


def whole_tensors(made: Built) -> dict[str, torch.Tensor]:
    found = tensors(made)
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}


def one_step(run: Run, batch: Batch, *, micro_batch: int, document_mask: bool = False) -> tuple[Built, StepResult]:
    made = built(run)
    settings = replace(SETTINGS, batch_sequences=len(batch.inputs))
    train = replace(run.train, micro_batch=micro_batch)
    return made, run_step(made, batch, settings=settings, train=train, document_mask=document_mask, step=1)


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_micro_batches_of_any_size_are_the_whole_batch(run: Run, prepared: Prepared, micro_batch: int, document_mask: bool) -> None:
    batch = batch_of(prepared, run, 4)
    batch = replace(batch, labels=batch.labels.clone())  # which is a view of the inputs' rows
    batch.labels[1, 5:] = -100  # unequal numbers of labels, so that a mean of the micro-batches' means would differ
    whole, expected = one_step(run, batch, micro_batch=4, document_mask=document_mask)
    cut, result = one_step(run, batch, micro_batch=micro_batch, document_mask=document_mask)
    for name in ("loss", "main_loss", "mtp_loss", "balance_loss", "gradient_norm"):
        assert getattr(result, name) == pytest.approx(getattr(expected, name), rel=1e-5)
    assert torch.equal(result.load, expected.load)
    # After one step the first moment is a tenth of the gradient: linear in it, unlike the update.
    for moment, other in zip(whole.optimizer.exp_avg, cut.optimizer.exp_avg, strict=True):
        torch.testing.assert_close(other, moment, rtol=1e-3, atol=1e-7)


def test_a_batch_of_more_than_a_thousand_sequences_is_its_micro_batches(run: Run, prepared: Prepared) -> None:
    batch = batch_of(prepared, run, 1030, sequence_length=4)
    _, whole = one_step(run, batch, micro_batch=1030)
    _, cut = one_step(run, batch, micro_batch=100)
    assert cut.loss == pytest.approx(whole.loss, rel=1e-5)
    assert cut.gradient_norm == pytest.approx(whole.gradient_norm, rel=1e-4)
    assert torch.equal(cut.load, whole.load)
    assert int(cut.load[0].sum()) == 1030 * 4 * run.model.num_experts_per_token


def test_the_loss_is_the_weighted_sum_of_its_parts(run: Run, prepared: Prepared) -> None:
    train = replace(run.train, balance_weight=0.5)
    _, result = one_step(replace(run, train=train), batch_of(prepared, run, 4), micro_batch=2)
    assert result.balance_loss > 0
    assert result.loss == pytest.approx(result.main_loss + 0.3 * result.mtp_loss + 0.5 * result.balance_loss, rel=1e-6)


def test_the_routers_bias_moves_once_per_step_by_the_load_of_the_whole_batch(
    run: Run, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[torch.Tensor] = []

    def noted(bias: torch.Tensor, load: torch.Tensor, speed: float) -> torch.Tensor:
        loads.append(load)
        return updated_bias(bias, load, speed)

    monkeypatch.setattr(step_module, "updated_bias", noted)
    made, result = one_step(run, batch_of(prepared, run, 4), micro_batch=1)
    layers = [*made.model.moe_layers().values()]
    assert len(loads) == len(layers) == 2
    for i, layer in enumerate(layers):
        assert torch.equal(loads[i], result.load[i])
        expected = 0.01 * torch.sign(result.load[i].float().mean() - result.load[i])
        torch.testing.assert_close(layer.router.expert_bias, expected)
        assert layer.router.expert_bias.dtype == torch.float32


def test_a_bias_speed_of_zero_leaves_the_bias(run: Run, prepared: Prepared) -> None:
    made = built(run)
    settings = replace(SETTINGS, bias_speed=0.0)
    run_step(made, batch_of(prepared, run, 4), settings=settings, train=run.train, document_mask=False, step=1)
    assert all(not layer.router.expert_bias.any() for layer in made.model.moe_layers().values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_is_told_and_changes_nothing(run: Run, prepared: Prepared, precision: str, poison: float) -> None:
    run = replace(run, train=replace(run.train, precision=precision))  # type: ignore[arg-type]
    made = built(run)
    batch = batch_of(prepared, run, 4)
    run_step(made, batch, settings=SETTINGS, train=run.train, document_mask=False, step=1)
    with torch.no_grad():
        made.model.head.weight[0, 0] = poison
    before = {name: tensor.clone() for name, tensor in whole_tensors(made).items()}
    with pytest.raises(NumericsError, match=r"step 2: loss \S+, gradient norm \S+; both must be finite\. Nothing was updated"):
        run_step(made, batch, settings=SETTINGS, train=run.train, document_mask=False, step=2)
    assert made.optimizer.counts() == {"main": 1, "mtp": 1}
    for name, tensor in whole_tensors(made).items():
        assert torch.equal(tensor.nan_to_num(7.0), before[name].nan_to_num(7.0)), name
    assert made.parameters.updated() == [] and all(parameter.grad is None for parameter in made.model.parameters())


def test_a_gradient_that_overflows_under_a_finite_loss_is_told(run: Run, prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    made = built(run)
    monkeypatch.setattr(ShardedParameters, "norm_squared", lambda self: torch.tensor(float("inf"), dtype=torch.float64))
    with pytest.raises(NumericsError, match="gradient norm inf"):
        run_step(made, batch_of(prepared, run, 4), settings=SETTINGS, train=run.train, document_mask=False, step=1)


def test_a_model_of_dense_layers_alone_trains(run: Run, prepared: Prepared) -> None:
    dense = replace(run, model=replace(run.model, num_dense_layers=2, num_mtp_modules=0))
    _, result = one_step(dense, batch_of(prepared, run, 4), micro_batch=2)
    assert (result.mtp_loss, result.balance_loss, result.load.numel()) == (0.0, 0.0, 0)
    assert result.loss == result.main_loss > 0


def test_mtp_modules_of_weight_zero_do_not_run_and_do_not_move(run: Run, prepared: Prepared) -> None:
    made = built(run)
    before = {name: parameter.detach().clone() for name, parameter in made.model.named_parameters()}
    settings = replace(SETTINGS, mtp_weight=0.0)
    result = run_step(made, batch_of(prepared, run, 4), settings=settings, train=run.train, document_mask=False, step=1)
    moved = {name for name, parameter in made.model.named_parameters() if not torch.equal(parameter.detach(), before[name])}
    assert moved == {name for name in before if not name.startswith("mtp.")}
    assert result.load[-1].sum() == 0 and result.load[0].sum() > 0
    assert not made.model.get_buffer("mtp.0.block.ffn.router.expert_bias").any()


def test_training_learns(run: Run, prepared: Prepared) -> None:
    made = built(run)
    batch = batch_of(prepared, run, 4)
    losses = [
        run_step(made, batch, settings=SETTINGS, train=run.train, document_mask=False, step=i).main_loss for i in range(1, 16)
    ]
    assert losses[-1] < 0.6 * losses[0]


def test_what_finds_no_room_at_its_expert_is_counted(run: Run, prepared: Prepared) -> None:
    batch = batch_of(prepared, run, 4)
    assert one_step(run, batch, micro_batch=2)[1].num_dropped == 0
    tight = replace(run, model=replace(run.model, capacity_factor=0.5))
    _, result = one_step(tight, batch, micro_batch=2)
    # Each of the 8 experts of both layers takes at most half of its share of a sequence's 32 x 2 assignments: 4.
    assert int(result.load.sum()) // 2 <= result.num_dropped < int(result.load.sum())
