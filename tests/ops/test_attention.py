"""Core attention: the reference against arrays read by eye, the blocked path against the reference."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quintet.ops import attention as ops
from quintet.ops.attention import (
    QUERY_BLOCK,
    attend_block,
    attend_block_backward,
    attend_block_reference,
    attention,
    attention_reference,
    merge,
    visible,
)

Shapes = tuple[int, int, int, int, int]


def inputs(shapes: Shapes, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k [B, H, S, D] and v [B, H, S, V] that want gradients, for (B, H, S, D, V)."""
    batch, heads, length, width, value_width = shapes
    q, k, v = (torch.randn(batch, heads, length, last, dtype=torch.float32) for last in (width, width, value_width))
    return q.to(dtype).requires_grad_(), k.to(dtype).requires_grad_(), v.to(dtype).requires_grad_()


def with_gradients(call: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """The output and the gradients of q, k and v for one fixed random output gradient."""
    out = call(q, k, v)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def assert_equals_reference(shapes: Shapes, *, document_ids: Tensor | None = None, save_memory: bool = False) -> None:
    """Output and all three gradients, in fp32."""
    tensors = inputs(shapes)
    scale = shapes[3] ** -0.5
    ours = with_gradients(lambda q, k, v: attention(q, k, v, scale=scale, document_ids=document_ids, save_memory=save_memory), *tensors)
    theirs = with_gradients(lambda q, k, v: attention_reference(q, k, v, scale=scale, document_ids=document_ids), *tensors)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=2e-5)


def test_a_query_sees_itself_and_what_came_before() -> None:
    expected = [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert visible(3, 3, document_ids=None, device=torch.device("cpu")).int().tolist() == expected


def test_fewer_queries_than_keys_are_the_last_ones() -> None:
    expected = [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert visible(2, 4, document_ids=None, device=torch.device("cpu")).int().tolist() == expected


def test_a_query_sees_only_its_own_document() -> None:
    ids = torch.tensor([[0, 0, 1, 1]])
    expected = [[[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]]]
    assert visible(4, 4, document_ids=ids, device=ids.device).int().tolist() == expected
    assert visible(1, 4, document_ids=ids, device=ids.device).int().tolist() == [[[[0, 0, 1, 1]]]]


@pytest.mark.parametrize("path", [attention, attention_reference])
def test_queries_without_a_preference_average_what_they_see(path: Callable[..., Tensor]) -> None:
    q, k = torch.zeros(1, 1, 4, 2), torch.randn(1, 1, 4, 2)
    v = torch.tensor([3.0, 5.0, 10.0, 20.0]).view(1, 1, 4, 1)
    assert path(q, k, v, scale=1.0).flatten().tolist() == pytest.approx([3.0, 4.0, 6.0, 9.5])
    ids = torch.tensor([[0, 0, 1, 1]])
    assert path(q, k, v, scale=1.0, document_ids=ids).flatten().tolist() == pytest.approx([3.0, 4.0, 10.0, 15.0])


@pytest.mark.parametrize("path", [attention, attention_reference])
def test_the_scale_multiplies_the_scores(path: Callable[..., Tensor]) -> None:
    q = torch.ones(1, 1, 2, 1)
    k, v = torch.tensor([0.0, 2.0]).view(1, 1, 2, 1), torch.tensor([0.0, 1.0]).view(1, 1, 2, 1)
    assert path(q, k, v, scale=0.5)[0, 0, 1].item() == pytest.approx(torch.tensor(1.0).sigmoid().item())


@pytest.mark.parametrize("save_memory", [False, True])
@pytest.mark.parametrize("length", [1, 2, QUERY_BLOCK - 1, QUERY_BLOCK, QUERY_BLOCK + 1, 2 * QUERY_BLOCK + 45])
def test_the_blocked_path_equals_the_reference_around_the_edges_of_its_blocks(length: int, save_memory: bool) -> None:
    assert_equals_reference((1, 2, length, 6, 4), save_memory=save_memory)


@given(
    shapes=st.tuples(*(st.integers(1, high) for high in (3, 3, 19, 5, 5))),
    block=st.integers(1, 8),
    documents=st.none() | st.lists(st.integers(0, 2), min_size=19, max_size=19),
    save_memory=st.booleans(),
)
def test_any_shape_in_blocks_of_any_size_equals_the_reference(
    shapes: Shapes, block: int, documents: list[int] | None, save_memory: bool
) -> None:
    batch, length = shapes[0], shapes[2]
    ids = None
    if documents is not None:
        ids = torch.stack([torch.tensor(documents).roll(row)[:length] for row in range(batch)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "QUERY_BLOCK", block)
        assert_equals_reference(shapes, document_ids=ids, save_memory=save_memory)


def test_inputs_may_be_transposed_views() -> None:
    q, k, v = (torch.randn(2, 5, 3, 4).transpose(1, 2).requires_grad_() for _ in range(3))
    ours = with_gradients(lambda *t: attention(*t, scale=0.5), q, k, v)
    theirs = with_gradients(lambda *t: attention_reference(*t, scale=0.5), q, k, v)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_the_derivatives_of_the_output(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "QUERY_BLOCK", 2)
    q, k, v = inputs((1, 2, 5, 3, 2), dtype=torch.float64)
    ids = torch.tensor([[0, 0, 1, 1, 1]]) if masked else None
    assert torch.autograd.gradcheck(lambda *t: attention(*t, scale=0.7, document_ids=ids), (q, k, v))


def test_in_bf16_output_and_gradients_stay_within_its_rounding() -> None:
    tensors = inputs((2, 2, QUERY_BLOCK + 20, 16, 8), dtype=torch.bfloat16)
    exact = [t.detach().float().requires_grad_() for t in tensors]
    ours = with_gradients(lambda *t: attention(*t, scale=0.25), *tensors)
    theirs = with_gradients(lambda *t: attention_reference(*t, scale=0.25), *exact)
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == torch.bfloat16
        error = (our.float() - their).norm() / their.norm()
        assert error < 0.01


def kept_elements(length: int, *, save_memory: bool, document_ids: Tensor | None = None) -> int:
    """Elements that attention saves for backward beside nothing else."""
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        attention(*inputs((1, 1, length, 4, 4)), scale=0.5, save_memory=save_memory, document_ids=document_ids)
    return sum(t.numel() for t in kept)


def test_with_save_memory_nothing_of_quadratic_size_is_kept() -> None:
    assert kept_elements(300, save_memory=True) == 3 * 300 * 4
    documents = torch.zeros(1, 300, dtype=torch.int64)
    assert kept_elements(300, save_memory=True, document_ids=documents) == 3 * 300 * 4 + 300
    blocks = 128 * 128 + 128 * 256 + 44 * 300
    assert kept_elements(300, save_memory=False) == 3 * 300 * 4 + blocks


def test_long_sequences_never_keep_their_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "KEEP_PROBABILITIES_BELOW", 200)
    assert kept_elements(201, save_memory=False) == 3 * 201 * 4 < kept_elements(200, save_memory=False)
    assert_equals_reference((1, 1, 201, 4, 4))


def test_recomputed_probabilities_give_the_same_gradients_to_the_bit() -> None:
    tensors = inputs((2, 2, QUERY_BLOCK + 3, 8, 8))
    kept, again = (with_gradients(lambda *t, save=save: attention(*t, scale=0.3, save_memory=save), *tensors) for save in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@given(place=st.integers(0, 8), block=st.integers(1, 5))
def test_later_keys_and_values_change_nothing_before_them(place: int, block: int) -> None:
    q, k, v = (t.detach() for t in inputs((1, 2, 9, 4, 3)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "QUERY_BLOCK", block)
        before = attention(q, k, v, scale=1.0)
        k[:, :, place:], v[:, :, place:] = 50.0, -50.0
        after = attention(q, k, v, scale=1.0)
    assert torch.equal(before[:, :, :place], after[:, :, :place])
    assert not torch.equal(before[:, :, place:], after[:, :, place:])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("widths", [(6, 4), (4, 6), (4, 4)])
def test_the_fused_path_of_other_devices_keeps_the_shapes(widths: tuple[int, int], masked: bool) -> None:
    width, value_width = widths
    q, k, v = (torch.empty(2, 3, 5, last, device="meta") for last in (width, width, value_width))
    ids = torch.zeros(2, 5, dtype=torch.int64, device="meta") if masked else None
    assert attention(q, k, v, scale=0.5, document_ids=ids).shape == (2, 3, 5, value_width)


def test_a_batch_without_sequences_passes() -> None:
    ours = with_gradients(lambda *t: attention(*t, scale=0.5, document_ids=torch.zeros(0, 5)), *inputs((0, 2, 5, 4, 3)))
    assert [tuple(t.shape) for t in ours] == [(0, 2, 5, 3), (0, 2, 5, 4), (0, 2, 5, 4), (0, 2, 5, 3)]


# One block of keys at a time, as a ring sees them.


def block_inputs(batch: int, heads: int, length: int, keys: int, width: int, value_width: int) -> tuple[Tensor, ...]:
    """Random q [B, H, S, D], k [B, H, K, D], v [B, H, K, V] and a gradient of the output [B, H, S, V]."""
    shapes = ((length, width), (keys, width), (keys, value_width), (length, value_width))
    return tuple(torch.randn(batch, heads, *shape) for shape in shapes)


def test_a_block_returns_the_log_of_what_it_divided_by() -> None:
    k, v = torch.tensor([math.log(2.0), math.log(6.0)]).view(1, 1, 2, 1), torch.tensor([4.0, 8.0]).view(1, 1, 2, 1)
    for path in (attend_block, attend_block_reference):
        out, lse = path(torch.ones(1, 1, 1, 1), k, v, scale=1.0, causal=False)
        assert (out.item(), lse.item()) == (pytest.approx((2 * 4 + 6 * 8) / 8), pytest.approx(math.log(8)))


def test_two_outputs_merge_by_their_weights() -> None:
    out, lse = torch.tensor([4.0]).view(1, 1, 1, 1), torch.tensor([math.log(2.0)]).view(1, 1, 1)
    merge(out, lse, torch.tensor([8.0]).view(1, 1, 1, 1), torch.tensor([math.log(6.0)]).view(1, 1, 1))
    assert (out.item(), lse.item()) == (pytest.approx(7.0), pytest.approx(math.log(8)))


def test_merging_with_nothing_changes_nothing_and_nothing_merges_with_nothing() -> None:
    nothing = torch.full((1, 1, 2), -math.inf)
    out, lse = torch.tensor([[[[3.0], [0.0]]]]), torch.tensor([[[1.0, -math.inf]]])
    merge(out, lse, torch.zeros(1, 1, 2, 1), nothing)
    assert out.flatten().tolist() == [3.0, 0.0]
    assert lse.flatten().tolist() == [1.0, -math.inf]
    merge(out := torch.zeros(1, 1, 2, 1), nothing.clone(), torch.full((1, 1, 2, 1), 5.0), torch.zeros(1, 1, 2))
    assert out.flatten().tolist() == [5.0, 5.0]


@given(
    shapes=st.tuples(*(st.integers(1, high) for high in (2, 3, 9, 12, 5, 5))),
    block=st.integers(1, 5),
    causal=st.booleans(),
    documents=st.booleans(),
    cut=st.integers(0, 12),
)
def test_any_block_equals_its_reference_and_two_blocks_equal_one(
    shapes: tuple[int, ...], block: int, causal: bool, documents: bool, cut: int
) -> None:
    batch, _, length, num_keys = shapes[:4]
    keys = max(length, num_keys) if causal else num_keys
    q, k, v, grad = block_inputs(*shapes[:3], keys, *shapes[4:])
    ids = torch.randint(2, (batch, length)), torch.randint(2, (batch, keys))
    if causal:
        ids = ids[1][:, keys - length :], ids[1]
    mine = ids if documents else None
    # The last block is the causal one; the others lie wholly before it.
    cut = min(cut, keys - length if causal else keys - 1)
    parts = [(slice(0, cut), False), (slice(cut, keys), causal)] if cut > 0 else [(slice(0, keys), causal)]

    def of(part: slice) -> dict[str, tuple[Tensor, Tensor] | None]:
        return {"documents": (mine[0], mine[1][:, part]) if mine else None}

    wanted = [t.requires_grad_() for t in (q, k, v)]
    exact, exact_lse = attend_block_reference(*wanted, scale=0.6, causal=causal, documents=mine)
    exact_grads = torch.autograd.grad(exact, wanted, grad)
    q, k, v = (t.detach() for t in wanted)
    out, lse = torch.zeros_like(exact.detach()), torch.full(exact.shape[:3], -math.inf)
    dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "QUERY_BLOCK", block)
        for part, last in parts:
            merge(out, lse, *attend_block(q, k[:, :, part], v[:, :, part], scale=0.6, causal=last, **of(part)))
        for part, last in parts:
            terms = attend_block_backward(grad, q, k[:, :, part], v[:, :, part], out, lse, scale=0.6, causal=last, **of(part))
            dq += terms[0]
            dk[:, :, part], dv[:, :, part] = terms[1:]
    for our, their in zip((out, lse, dq, dk, dv), (exact.detach(), exact_lse.detach(), *exact_grads), strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=2e-5)


def test_a_query_that_sees_no_key_yields_nothing_and_takes_part_in_no_gradient() -> None:
    q, k, v, grad = block_inputs(1, 2, 3, 4, 5, 3)
    ids = torch.tensor([[7, 1, 7]]), torch.tensor([[1, 1, 0, 1]])
    out, lse = attend_block(q, k, v, scale=0.5, causal=False, documents=ids)
    assert not out[:, :, [0, 2]].any()
    assert lse[0, 0].isinf().tolist() == [True, False, True]
    dq, dk, dv = attend_block_backward(grad, q, k, v, out, lse, scale=0.5, causal=False, documents=ids)
    assert not dq[:, :, [0, 2]].any() and not dk[:, :, 2].any() and not dv[:, :, 2].any()
    g, q, out, lse = (t[:, :, 1:2] for t in (grad, q, out, lse))
    alone = attend_block_backward(g, q, k, v, out, lse, scale=0.5, causal=False, documents=(ids[0][:, 1:2], ids[1]))
    for got, expected in zip((dq[:, :, 1:2], dk, dv), alone, strict=True):
        torch.testing.assert_close(got, expected)


def test_blocks_as_wide_as_v3s_heads_in_bf16_stay_within_its_rounding() -> None:
    exact = block_inputs(1, 2, QUERY_BLOCK + 9, 2 * QUERY_BLOCK, 192, 128)
    q, k, v, grad = (t.bfloat16() for t in exact)
    out, lse = attend_block(q, k, v, scale=192**-0.5, causal=True)
    ours = (out, lse, *attend_block_backward(grad, q, k, v, out, lse, scale=192**-0.5, causal=True))
    wanted = [t.requires_grad_() for t in exact[:3]]
    theirs = attend_block_reference(*wanted, scale=192**-0.5, causal=True)
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.float32, *[torch.bfloat16] * 3]
    for our, their in zip(ours, (*theirs, *torch.autograd.grad(theirs[0], wanted, exact[3])), strict=True):
        assert (our.float() - their).norm() < 0.01 * their.norm()
