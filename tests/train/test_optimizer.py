"""The optimizer against torch's own AdamW and clipping, and bf16 parameters against their fp32 masters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quintet.errors import CheckpointError
from quintet.spec.run import Optimizer, Precision
from quintet.train.optimizer import AdamW
from quintet.train.precision import cast

SHAPES = {"matrix": (3, 5), "scale": (5,), "experts": (2, 3, 4)}


class Parameters(nn.Module):
    """A matrix, a norm's scale and a stack of matrices."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))


def pair(seed: int, optimizer: Optimizer, precision: Precision = "fp32") -> tuple[Parameters, AdamW]:
    module = Parameters(torch.Generator().manual_seed(seed))
    parameters, masters = cast(module, precision)
    return module, AdamW(parameters, masters, optimizer)


def step(module: nn.Module, optimizer: AdamW, gradients: dict[str, Tensor], learning_rate: float = 0.01) -> None:
    for name, parameter in module.named_parameters():
        parameter.grad = gradients[name].to(parameter.dtype, copy=True)  # the optimizer scales what it takes over
    optimizer.collect(alone=True)
    optimizer.step(learning_rate, optimizer.gradient_norm())


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
        for name, parameter in ours.named_parameters():
            parameter.grad = gradients[name].clone()
        adamw.collect(alone=True)
        torch.testing.assert_close(adamw.gradient_norm(), norm)
        adamw.step(learning_rate, adamw.gradient_norm())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(adamw.state()[f"exp_avg_sq.{name}"], reference.state[theirs.get_parameter(name)]["exp_avg_sq"])


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
    for name, parameter in module.named_parameters():
        parameter.grad = gradients[name].clone()
    adamw.collect(alone=True)
    expected = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    torch.testing.assert_close(adamw.gradient_norm(), expected)


def test_bf16_parameters_are_their_rounded_masters_after_every_step(generator: torch.Generator) -> None:
    module, adamw = pair(0, Optimizer(), "bf16")
    for _ in range(5):
        step(module, adamw, some_gradients(generator))
        for name, parameter in module.named_parameters():
            master = adamw.state()[f"master.{name}"]
            assert (parameter.dtype, master.dtype) == (torch.bfloat16, torch.float32)
            assert torch.equal(parameter.detach(), master.bfloat16())
    assert not torch.equal(adamw.state()["master.matrix"], module.matrix.detach().float()), "the masters know more than bf16"


def test_masters_start_from_the_values_before_rounding_and_are_those_of_an_fp32_run(generator: torch.Generator) -> None:
    exact, exact_adamw = pair(0, Optimizer())
    rounded, rounded_adamw = pair(0, Optimizer(), "bf16")
    for _ in range(3):
        gradients = {name: gradient.bfloat16().float() for name, gradient in some_gradients(generator).items()}
        step(exact, exact_adamw, gradients)
        step(rounded, rounded_adamw, gradients)
    for name, parameter in exact.named_parameters():
        assert torch.equal(parameter.detach(), rounded_adamw.state()[f"master.{name}"])


def test_updates_too_small_for_bf16_add_up_in_the_master() -> None:
    module, adamw = pair(0, Optimizer(weight_decay=0.0), "bf16")
    with torch.no_grad():
        module.scale.fill_(1.0)
        adamw.slots["scale"].master.fill_(1.0)
    ones = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    values = []
    for _ in range(8):
        step(module, adamw, ones, learning_rate=0.001)
        values.append(float(module.scale[0].detach()))
    # bf16 has 1 - 1/256 = 0.99609375 and then 0.9921875 below 1: eight steps of 0.001 end at 0.992.
    assert values[0] == 1.0
    assert values[-1] == 0.9921875
    torch.testing.assert_close(adamw.state()["master.scale"], torch.full((5,), 0.992))


def test_gradients_of_several_micro_batches_add_up_in_fp32() -> None:
    module, adamw = pair(0, Optimizer(), "bf16")
    for value in (256.0, 1.0, 1.0):  # in bf16, 256 + 1 is 256
        module.scale.grad = torch.full((5,), value, dtype=torch.bfloat16)
        adamw.collect(alone=False)
        assert module.scale.grad is None
    gradient = adamw.slots["scale"].gradient
    assert gradient is not None
    assert gradient.tolist() == [258.0] * 5


def test_a_parameter_without_a_gradient_stays(generator: torch.Generator) -> None:
    module, adamw = pair(0, Optimizer())
    before = module.experts.detach().clone()
    module.matrix.grad = torch.ones(3, 5)
    adamw.collect(alone=True)
    adamw.step(0.1, adamw.gradient_norm())
    assert torch.equal(module.experts.detach(), before)


def test_discarded_gradients_leave_nothing(generator: torch.Generator) -> None:
    module, adamw = pair(0, Optimizer())
    module.matrix.grad = torch.ones(3, 5)
    adamw.collect(alone=True)
    adamw.discard()
    assert all(slot.gradient is None for slot in adamw.slots.values())
    assert (adamw.num_steps, float(adamw.state()["exp_avg.matrix"].abs().sum())) == (0, 0.0)


def test_the_state_holds_masters_only_where_parameters_are_rounded() -> None:
    assert not [name for name in pair(0, Optimizer())[1].state() if name.startswith("master")]
    assert [name for name in pair(0, Optimizer(), "bf16")[1].state() if name.startswith("master")] == [f"master.{n}" for n in SHAPES]


def test_a_negative_count_of_steps_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"step count \(-1\) is negative"):
        pair(0, Optimizer())[1].restore_count(-1)
