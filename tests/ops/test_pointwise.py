"""Element-wise operations: the references against their formulas, the fused functions against the references."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from quintet.ops.pointwise import (
    REFERENCE,
    Kernels,
    assemble_qkv,
    can_compile,
    cross_entropy,
    fused,
    rms_norm,
    rotate,
    scaled_swiglu,
    swiglu,
)

DTYPES = [torch.float32, torch.bfloat16]


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    """Same dtype, and equal but for its rounding, as the length of the difference."""
    assert ours.dtype == theirs.dtype
    limit = 1e-6 if ours.dtype == torch.float32 else 2**-8
    assert (ours.double() - theirs.double()).norm() <= limit * theirs.double().norm()


def test_rms_norm_divides_by_the_root_of_the_mean_square() -> None:
    x, weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([1.0, 10.0])
    root = math.sqrt(12.5)
    torch.testing.assert_close(rms_norm(x, weight, 0.0)[0], torch.tensor([3 / root, 40 / root]))
    assert rms_norm(x, weight, 1e-6)[1].tolist() == [0.0, 0.0], "eps keeps a vector of zeros finite"
    assert rms_norm(x, weight, 12.5)[0].tolist() == pytest.approx([3 / 5, 40 / 5])


def test_rms_norm_of_bf16_rounds_only_its_result() -> None:
    x, ones = torch.randn(4, 256).bfloat16(), torch.ones(256).bfloat16()
    exact = x.double() / x.double().square().mean(1, keepdim=True).sqrt()
    assert torch.equal(rms_norm(x, ones, 0.0), exact.bfloat16())


def test_swiglu_gates_the_second_half_by_the_first() -> None:
    gate_up = torch.tensor([0.0, 1.0, 100.0, 5.0, 2.0, 3.0])
    sigmoid = 1 / (1 + math.exp(-1))
    assert swiglu(gate_up).tolist() == pytest.approx([0.0, 2 * sigmoid, 300.0])
    assert scaled_swiglu(gate_up[None], torch.tensor([0.5]))[0].tolist() == pytest.approx([0.0, sigmoid, 150.0])
    assert scaled_swiglu(gate_up[None], torch.tensor([0.0]))[0].tolist() == [0.0] * 3


def test_a_quarter_turn_maps_neighbours_a_b_to_minus_b_a() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    cos, sin = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])  # turn the first pair, leave the second
    assert rotate(x, cos, sin).tolist() == [-2.0, 1.0, 3.0, 4.0]


@given(st.lists(st.floats(-1e4, 1e4), min_size=3, max_size=3))
def test_rotating_is_multiplying_by_a_complex_number(angles: list[float]) -> None:
    x, angle = torch.randn(2, 6), torch.tensor(angles)
    expected = torch.view_as_real(torch.view_as_complex(x.view(2, 3, 2)) * torch.polar(torch.ones(3), angle)).flatten(1)
    torch.testing.assert_close(rotate(x, angle.cos(), angle.sin()), expected)


def test_queries_and_keys_are_assembled_head_by_head_with_one_shared_rotary_key() -> None:
    batch, length, heads, nope, rope, value = 2, 3, 2, 4, 6, 5
    q, kv = torch.randn(batch, length, heads, nope + rope), torch.randn(batch, length, heads, nope + value)
    k_pe, angle = torch.randn(batch, length, rope), torch.randn(length, rope // 2)
    cos, sin = angle.cos(), angle.sin()
    out_q, out_k, out_v = assemble_qkv(q, kv, k_pe, cos, sin)
    for b in range(batch):
        for s in range(length):
            key = rotate(k_pe[b, s], cos[s], sin[s])
            for h in range(heads):
                assert torch.equal(out_q[b, h, s], torch.cat((q[b, s, h, :nope], rotate(q[b, s, h, nope:], cos[s], sin[s]))))
                assert torch.equal(out_k[b, h, s], torch.cat((kv[b, s, h, :nope], key)))
                assert torch.equal(out_v[b, h, s], kv[b, s, h, nope:])
    assert all(t.is_contiguous() for t in (out_q, out_k, out_v))


def test_cross_entropy_of_even_odds_is_ln_2_and_pushes_by_a_half() -> None:
    loss, grad = cross_entropy(torch.tensor([[7.0, 7.0], [7.0, 7.0]]), torch.tensor([1, -100]))
    assert loss.tolist() == pytest.approx([math.log(2), 0.0])
    assert grad.tolist() == [[0.5, -0.5], [0.0, 0.0]]


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=9), st.floats(0.01, 30))
def test_cross_entropy_equals_torchs_and_its_gradient_autograds(labels: list[int], size: float) -> None:
    logits, targets = (torch.randn(len(labels), 5) * size).requires_grad_(), torch.tensor(labels)
    loss, grad = cross_entropy(logits.detach(), targets)
    expected = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), logits)[0], rtol=1e-4, atol=1e-5)


def test_a_machine_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not can_compile(torch.device("cpu"))
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/c++" if name == "c++" else None)
    assert can_compile(torch.device("cpu"))


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    """The fused functions; each compiles at its first call, forward and backward, once per dtype."""
    if not can_compile(torch.device("cpu")):
        pytest.skip("torch.compile needs a C++ compiler")
    return fused()


def _rms_norm(dtype: torch.dtype) -> list[Tensor | float]:
    return [torch.randn(6, 16).to(dtype), torch.rand(16).to(dtype), 1e-6]


def _swiglu(dtype: torch.dtype) -> list[Tensor | float]:
    return [torch.randn(6, 16).to(dtype)]


def _scaled_swiglu(dtype: torch.dtype) -> list[Tensor | float]:
    return [torch.randn(6, 16).to(dtype), torch.rand(6)]


def _assemble_qkv(dtype: torch.dtype) -> list[Tensor | float]:
    q, kv, k_pe = (torch.randn(2, 3, *shape).to(dtype) for shape in ((4, 12), (4, 20), (4,)))
    angle = torch.randn(3, 2)
    return [q, kv, k_pe, angle.cos(), angle.sin()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [_rms_norm, _swiglu, _scaled_swiglu, _assemble_qkv], ids=lambda make: make.__name__[1:])
def test_a_fused_function_and_its_gradients_equal_the_reference(
    make: Callable[[torch.dtype], list[Tensor | float]], dtype: torch.dtype, kernels: Kernels
) -> None:
    arguments, name = make(dtype), make.__name__[1:]
    # cos and sin come without gradients in the model; every other tensor has one.
    wanted = [a.requires_grad_() for a in arguments[:3] if isinstance(a, Tensor)]
    results = []
    for function in (getattr(kernels, name), getattr(REFERENCE, name)):
        out = function(*arguments)
        outs = out if isinstance(out, tuple) else (out,)
        seeded = torch.Generator().manual_seed(1)
        grads = torch.autograd.grad(outs, wanted, [torch.randn(o.shape, generator=seeded).to(o.dtype) for o in outs])
        results.append([*(o.detach() for o in outs), *grads])
    for ours, theirs in zip(*results, strict=True):
        assert ours.stride() == theirs.stride()
        assert_near(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fused_cross_entropy_equals_the_reference_where_no_gradient_is_recorded(dtype: torch.dtype, kernels: Kernels) -> None:
    logits, labels = torch.randn(6, 16).to(dtype), torch.tensor([1, 2, -100, 3, 15, 0])
    with torch.no_grad():
        ours, theirs = kernels.cross_entropy(logits, labels), REFERENCE.cross_entropy(logits, labels)
    for our, their in zip(ours, theirs, strict=True):
        assert_near(our, their)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fused_parts_of_a_split_cross_entropy_equal_the_reference(dtype: torch.dtype, kernels: Kernels) -> None:
    logits, target, here = torch.randn(5, 16).to(dtype), torch.tensor([1, 0, 15, 3, 0]), torch.tensor([True, False, True, True, False])
    log_sum, valid = torch.randn(5) + 3, torch.tensor([True, True, True, False, True])
    with torch.no_grad():
        for ours, theirs in zip(*(each.part_of_cross_entropy(logits, target, here) for each in (kernels, REFERENCE)), strict=True):
            assert_near(ours, theirs)
        assert_near(*(each.part_of_its_gradient(logits, log_sum, target, here, valid) for each in (kernels, REFERENCE)))


def test_without_gradients_nothing_is_compiled_so_that_new_shapes_cost_nothing(kernels: Kernels) -> None:
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.no_grad():
        for length in range(1, 40):
            x = torch.randn(length, 8)
            assert torch.equal(kernels.swiglu(x), swiglu(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
