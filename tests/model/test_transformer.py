"""The whole model: causality, documents, initial values, tied embeddings, and the published shape."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quintet.cost.flops import parameters
from quintet.model.loss import targets_by_depth
from quintet.model.transformer import Transformer
from quintet.ops.cross_entropy import head_loss_reference
from quintet.spec import parse
from quintet.spec.model import Model, Yarn
from tests.checkpoint.models import SMALL, VARIANTS, like_small
from tests.model.build import build, gradients, some_tokens
from tests.spec.strategies import models

TWO = like_small(num_mtp_modules=2)
LENGTH = 12


def states(net: Transformer, tokens: Tensor) -> list[Tensor]:
    """Hidden states of every depth for rows of S + 1 tokens."""
    output = net(tokens[:, :-1], targets=targets_by_depth(tokens[:, 1:], net.model.num_mtp_modules))
    return [output.hidden.detach(), *(depth.detach() for depth in output.mtp)]


@settings(max_examples=20)
@given(place=st.integers(0, LENGTH), other=st.integers(1, TWO.vocab_size - 1), model=st.sampled_from([TWO, like_small(q_lora_rank=None)]))
def test_no_depth_looks_at_a_token_later_than_its_own(place: int, other: int, model: Model) -> None:
    net, tokens = build(model), some_tokens(model, 1, LENGTH + 1)
    changed = tokens.clone()
    changed[:, place:] = (changed[:, place:] + other) % model.vocab_size
    for depth, (before, after) in enumerate(zip(states(net, tokens), states(net, changed), strict=True)):
        blind = max(place - depth, 0)  # depth k at place i has seen token i + k
        torch.testing.assert_close(before[:, :blind], after[:, :blind], rtol=1e-4, atol=1e-5)
        if blind < LENGTH - depth:
            assert (before[:, blind] - after[:, blind]).abs().max() > 1e-3, "and it does look at its own"


def test_rows_of_a_batch_do_not_meet() -> None:
    net, tokens = build(TWO), some_tokens(TWO, 3, LENGTH + 1)
    for together, alone in zip(states(net, tokens), states(net, tokens[1:2]), strict=True):
        torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


@settings(max_examples=20)
@given(lengths=st.lists(st.integers(1, 6), min_size=2, max_size=4), extended=st.booleans(), data=st.data())
def test_a_document_in_a_packed_row_reads_as_if_it_were_alone(lengths: list[int], extended: bool, data: st.DataObject) -> None:
    model = like_small(yarn=Yarn(factor=4.0, original_context=16)) if extended else SMALL
    net, tokens = build(model), some_tokens(model, 1, sum(lengths))
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    packed = net.logits(tokens, document_ids=ids).split(lengths, 1)
    for part, document in zip(packed, tokens.split(lengths, 1), strict=True):
        torch.testing.assert_close(part, net.logits(document), rtol=1e-3, atol=1e-4)

    changed = data.draw(st.integers(0, len(lengths) - 1), label="changed document")
    others = torch.where(ids == changed, (tokens + 1) % model.vocab_size, tokens)
    for place, after in enumerate(net.logits(others, document_ids=ids).split(lengths, 1)):
        if place != changed:
            torch.testing.assert_close(after, packed[place], rtol=1e-4, atol=1e-5)


def test_without_document_ids_a_document_reads_the_one_before() -> None:
    net, tokens = build(SMALL), some_tokens(SMALL, 1, 8)
    ids = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    crossing, masked = net.logits(tokens), net.logits(tokens, document_ids=ids)
    torch.testing.assert_close(crossing[:, :4], masked[:, :4], rtol=1e-4, atol=1e-5)
    assert (crossing[:, 4:] - masked[:, 4:]).abs().amax((0, 2)).min() > 1e-3


def initialized(model: Model, seed: int) -> Transformer:
    """A model as training begins with it."""
    net = Transformer(model)
    net.initialize(seed)
    return net


def test_initial_values_depend_on_the_seed_alone() -> None:
    first = initialized(SMALL, 7).state_dict()
    torch.rand(5)  # the global generator moves on
    again, other = initialized(SMALL, 7).state_dict(), initialized(SMALL, 8).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], other[name]) == (first[name].ndim == 1) for name in first)


def test_a_bf16_model_starts_from_the_rounded_values() -> None:
    net = Transformer(SMALL).bfloat16()
    net.initialize(7)
    expected = initialized(SMALL, 7)
    for ours, theirs in zip(net.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16())


def test_matrices_begin_with_the_published_deviation_norms_with_1_and_biases_with_0() -> None:
    net = initialized(like_small(vocab_size=2048, hidden_size=64, init_std=0.006), 0)
    for name, parameter in net.named_parameters():
        if parameter.ndim == 1:
            assert "norm" in name and (parameter == 1).all()
        else:
            spread = 4 / parameter.numel() ** 0.5  # four deviations of the estimate
            assert parameter.mean().item() == pytest.approx(0, abs=0.006 * spread), name
            assert parameter.std().item() == pytest.approx(0.006, rel=spread), name
    biases = [layer.router.expert_bias for layer in net.moe_layers().values()]
    assert all(not bias.any() and bias.dtype == torch.float32 for bias in biases)


def test_initializing_resets_what_was_there() -> None:
    net = initialized(SMALL, 0)
    expected = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for tensor in net.state_dict().values():
        tensor.fill_(3.0)
    net.initialize(0)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in net.state_dict().items())


def test_tied_embeddings_are_one_matrix_that_learns_from_both_uses() -> None:
    tied, apart = build(like_small(tie_embeddings=True)), Transformer(SMALL)
    weights = tied.state_dict()
    assert "head.weight" not in weights and tied.head_weight is tied.embed.weight
    apart.load_state_dict(weights | {"head.weight": weights["embed.weight"].clone()})
    tokens = some_tokens(SMALL, 2, 9)

    def grads(net: Transformer) -> dict[str, Tensor]:
        hidden = net(tokens[:, :-1]).hidden.flatten(0, 1)
        return gradients(net, head_loss_reference(hidden, net.head_weight, tokens[:, 1:].flatten()))

    ours, theirs = grads(tied), grads(apart)
    torch.testing.assert_close(ours["embed.weight"], theirs["embed.weight"] + theirs["head.weight"])
    torch.testing.assert_close(tied.logits(tokens), apart.logits(tokens))


@settings(max_examples=25)
@given(models())
def test_a_built_model_has_the_parameters_that_the_spec_counts(model: Model) -> None:
    with torch.device("meta"):
        net = Transformer(model)
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters(model).total_with_mtp
    assert len(net.moe_layers()) == model.num_moe_layers + model.num_mtp_modules


@pytest.mark.parametrize("recipe", ["laptop", "v3-16b", "v3-671b"])
def test_a_recipes_model_is_built_on_the_meta_device_within_seconds(recipe: str, root: Path) -> None:
    model = parse.read(root / "recipes" / f"{recipe}.toml").model
    begin = time.perf_counter()
    with torch.device("meta"):
        net = Transformer(model)
    assert time.perf_counter() - begin < 10
    count = sum(parameter.numel() for parameter in net.parameters())
    assert count == parameters(model).total_with_mtp
    if recipe == "v3-671b":
        assert count - parameters(model).mtp == 671_026_404_352  # 671B, as published


@pytest.mark.parametrize("model", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_are_those_of_the_head_on_the_hidden_states(model: Model) -> None:
    net, tokens = build(model), some_tokens(model, 2, 5)
    logits = net.logits(tokens)
    assert logits.shape == (2, 5, model.vocab_size) and logits.isfinite().all()
    torch.testing.assert_close(logits, net(tokens).hidden @ net.head_weight.t())
