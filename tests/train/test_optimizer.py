"""The optimizer against torch's own AdamW and clipping, and bf16 parameters against their fp32 masters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quintet.errors import CheckpointError
from quintet.parallel.mesh import single
from quintet.parallel.precision import DTYPES
from quintet.parallel.zero import ShardedParameters
from quintet.spec.run import Optimizer, Precision
from quintet.train.optimizer import AdamW
from tests.parity.test_layouts import MODEL

SHAPES = {"matrix": (3, 5), "scale": (5,), "experts": (2, 3, 4)}


class Parameters(nn.Module):
    """A matrix, a norm's scale and a stack of matrices."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.model = MODEL
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))


def pair(seed: int, optimizer: Optimizer, precision: Precision = "fp32") -> tuple[Parameters, AdamW]:
    module = Parameters(torch.Generator())
    parameters = ShardedParameters(module, single(), dtype=DTYPES[precision], device=torch.device("cpu"))
    values = Parameters(torch.Generator().manual_seed(seed))
    parameters.fill(lambda piece: values.get_parameter(piece.name).detach())
    return module, AdamW(parameters, optimizer)


def collect(module: nn.Module, adamw: AdamW, *gradients: dict[str, Tensor]) -> float:
    """Backward with these gradients, one dictionary for each micro-batch -> their norm."""
    adamw.parameters.begin_step(mtp=False)
    for i, each in enumerate(gradients):
        adamw.parameters.begin_micro_batch(last=i + 1 == len(gradients))
        torch.stack([(parameter.float() * each[name]).sum() for name, parameter in module.named_parameters()]).sum().backward()
        assert all(parameter.grad is None for parameter in module.parameters())
        adamw.parameters.end_micro_batch()
    return float(adamw.parameters.norm_squared().sqrt())


def step(module: nn.Module, adamw: AdamW, gradients: dict[str, Tensor], learning_rate: float = 0.01) -> None:
    adamw.step(learning_rate, collect(module, adamw, gradients))


def held(adamw: AdamW, kind: str) -> dict[str, Tensor]:
    """Masters, gradients or moments by the name of their parameter."""
    found = {}
    for i, bucket in enumerate(adamw.parameters.buckets):
        shards = {"master": bucket.master, "exp_avg": adamw.exp_avg[i], "exp_avg_sq": adamw.exp_avg_sq[i]}
        parts = bucket.gradients() if kind == "gradient" else bucket.parts(shards[kind])
        found |= {part.piece.name: part.values.view(part.piece.box.sizes) for part in parts}
    return found


def some_gradients(generator: torch.Generator, scale: float = 1.0) -> dict[str, Tensor]:
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@given(
    optimizer=st.builds(
        Optimizer,
        beta1=st.sampled_from([0.0, 0.9]),
        beta2=st.sampled_from([0.5, 0.95, 0.999]),
        eps=st.sampled_from([1e-8, 1e-3]),
        weight_decay=st.sampled_from([0.0, 0.1, 1.0]),
        clip_norm=st.sampled_from([0.01, 1.0, 1e6]),
    ),
    scales=st.lists(st.sampled_from([1e-4, 0.1, 1.0, 100.0]), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
@hypothesis_settings(max_examples=25)
def test_in_fp32_it_is_torchs_adamw_with_decay_groups_and_clipping(optimizer: Optimizer, scales: list[float], seed: int) -> None:
    ours, adamw = pair(seed, optimizer)
    theirs = Parameters(torch.Generator().manual_seed(seed))
    groups = [
        {"params": [theirs.matrix, theirs.experts], "weight_decay": optimizer.weight_decay},
        {"params": [theirs.scale], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(optimizer.beta1, optimizer.beta2), eps=optimizer.eps, foreach=False, fused=False)
    generator = torch.Generator().manual_seed(seed + 1)
    for i, scale in enumerate(scales):
        gradients, learning_rate = some_gradients(generator, scale), 0.01 / (i + 1)
        for name, parameter in theirs.named_parameters():
            parameter.grad = gradients[name].clone()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), optimizer.clip_norm)
        for group in reference.param_groups:
            group["lr"] = learning_rate
        reference.step()
        found = collect(ours, adamw, gradients)
        assert found == pytest.approx(float(norm), rel=1e-5)
        adamw.step(learning_rate, found)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(held(adamw, "exp_avg_sq")[name], reference.state[theirs.get_parameter(name)]["exp_avg_sq"])


def test_only_what_has_two_dims_is_decayed() -> None:
    module, adamw = pair(0, Optimizer(weight_decay=0.5))
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    step(module, adamw, {name: torch.zeros(shape) for name, shape in SHAPES.items()}, learning_rate=0.1)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (1.0 if name == "scale" else 1 - 0.1 * 0.5))


def test_the_first_step_moves_every_element_by_the_learning_rate_against_its_gradient() -> None:
    module, adamw = pair(0, Optimizer(weight_decay=0.0, clip_norm=1e9))
    before = module.scale.detach().clone()
    step(module, adamw, {name: torch.full(shape, -3.0) for name, shape in SHAPES.items()}, learning_rate=0.25)
    torch.testing.assert_close(module.scale.detach(), before + 0.25)


def test_the_norm_is_taken_before_clipping_and_over_all_parameters_together(generator: torch.Generator) -> None:
    module, adamw = pair(0, Optimizer(clip_norm=0.5))
    gradients = some_gradients(generator)
    expected = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    assert collect(module, adamw, gradients) == pytest.approx(float(expected), rel=1e-6)


def test_bf16_parameters_are_their_rounded_masters_after_every_step(generator: torch.Generator) -> None:
    module, adamw = pair(0, Optimizer(), "bf16")
    for _ in range(5):
        step(module, adamw, some_gradients(generator))
        for name, parameter in module.named_parameters():
            master = held(adamw, "master")[name]
            assert (parameter.dtype, master.dtype) == (torch.bfloat16, torch.float32)
            assert torch.equal(parameter.detach(), master.bfloat16())
    assert not torch.equal(held(adamw, "master")["matrix"], module.matrix.detach().float()), "the masters know more than bf16"


def test_masters_start_from_the_values_before_rounding_and_are_those_of_an_fp32_run(generator: torch.Generator) -> None:
    exact, exact_adamw = pair(0, Optimizer())
    rounded, rounded_adamw = pair(0, Optimizer(), "bf16")
    for _ in range(3):
        gradients = {name: gradient.bfloat16().float() for name, gradient in some_gradients(generator).items()}
        step(exact, exact_adamw, gradients)
        step(rounded, rounded_adamw, gradients)
    for name, parameter in exact.named_parameters():
        assert torch.equal(parameter.detach(), held(rounded_adamw, "master")[name])


def test_updates_too_small_for_bf16_add_up_in_the_master() -> None:
    module, adamw = pair(0, Optimizer(weight_decay=0.0), "bf16")
    with torch.no_grad():
        module.scale.fill_(1.0)
        held(adamw, "master")["scale"].fill_(1.0)
    ones = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    values = []
    for _ in range(8):
        step(module, adamw, ones, learning_rate=0.001)
        values.append(float(module.scale[0].detach()))
    # bf16 has 1 - 1/256 = 0.99609375 and then 0.9921875 below 1: eight steps of 0.001 end at 0.992.
    assert values[0] == 1.0
    assert values[-1] == 0.9921875
    torch.testing.assert_close(held(adamw, "master")["scale"], torch.full((5,), 0.992))


def test_gradients_of_several_micro_batches_add_up_in_fp32() -> None:
    module, adamw = pair(0, Optimizer(), "bf16")
    collect(module, adamw, *({name: torch.full(shape, value) for name, shape in SHAPES.items()} for value in (256.0, 1.0, 1.0)))
    assert held(adamw, "gradient")["scale"].tolist() == [258.0] * 5  # in bf16, 256 + 1 is 256


def test_discarded_gradients_leave_nothing(generator: torch.Generator) -> None:
    module, adamw = pair(0, Optimizer())
    collect(module, adamw, some_gradients(generator))
    adamw.parameters.discard()
    assert adamw.parameters.updated() == [] and adamw.counts() == {"main": 0, "mtp": 0}
    assert not any(moment.any() for moment in held(adamw, "exp_avg").values())


def test_moments_in_bf16_take_half_the_room_and_follow_those_in_fp32(generator: torch.Generator) -> None:
    (exact, exact_adamw), (half, half_adamw) = pair(0, Optimizer()), pair(0, Optimizer(moments="bf16"))
    for _ in range(4):
        gradients = some_gradients(generator)
        step(exact, exact_adamw, gradients)
        step(half, half_adamw, gradients)
    assert {tensor.dtype for tensor in (*half_adamw.exp_avg, *half_adamw.exp_avg_sq)} == {torch.bfloat16}
    for name, parameter in exact.named_parameters():
        torch.testing.assert_close(half.get_parameter(name), parameter, rtol=0, atol=1e-3)
        assert not torch.equal(half.get_parameter(name), parameter)


@pytest.mark.parametrize("counts", [{"main": -1, "mtp": 0}, {"main": 3}, {"main": 1, "mtp": True}])
def test_impossible_counts_of_steps_are_refused(counts: dict[str, int]) -> None:
    with pytest.raises(CheckpointError, match=r"step counts .* must be main and mtp, neither negative"):
        pair(0, Optimizer())[1].restore_counts(counts)
