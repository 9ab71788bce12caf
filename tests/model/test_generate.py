"""Generation: the cache changes no number, and sampling is what its settings say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quintet.errors import UsageError
from quintet.model.generate import choose, generate
from quintet.model.transformer import Transformer
from quintet.spec.model import Model
from tests.checkpoint.models import SMALL, VARIANTS, like_small
from tests.model.build import build, some_tokens


@settings(max_examples=30)
@given(model=st.sampled_from([*VARIANTS.values()]), batch=st.integers(1, 3), parts=st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_logits_with_the_cache_equal_those_without_it(model: Model, batch: int, parts: list[int]) -> None:
    net, tokens, end = build(model), some_tokens(model, batch, sum(parts)), 0
    whole, cache = net.logits(tokens), net.empty_cache(batch)
    for size in parts:
        logits = net.decode(tokens[:, end : end + size], cache)
        end += size
        torch.testing.assert_close(logits, whole[:, end - 1], rtol=1e-4, atol=1e-5)


def test_in_bf16_the_cache_stays_within_its_rounding() -> None:
    model = like_small(expert_ffn_size=16)
    net, tokens = build(model, dtype=torch.bfloat16), some_tokens(model, 2, 12)
    whole, cache = net.logits(tokens).float(), net.empty_cache(2)
    cached = torch.stack([net.decode(token, cache).float() for token in tokens.split(1, 1)], 1)
    assert cache[0].kv.dtype == torch.bfloat16
    assert (cached - whole).norm() / whole.norm() < 0.03


def greedy_without_cache(net: Transformer, prompt: Tensor, num_tokens: int) -> list[int]:
    """The likeliest continuation, from all logits each time."""
    tokens = prompt
    for _ in range(num_tokens):
        tokens = torch.cat((tokens, net.logits(tokens[None])[0, -1:].argmax(-1)))
    return tokens[len(prompt) :].tolist()


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"tie_embeddings": True}], ids=str)
def test_at_temperature_0_the_likeliest_tokens_come_every_time(changes: dict[str, Any]) -> None:
    net = build(like_small(**changes))
    prompt = some_tokens(net.model, 5)
    drawn = [[*generate(net, prompt, num_tokens=10, temperature=0.0)] for _ in range(2)]
    assert drawn[0] == drawn[1] == greedy_without_cache(net, prompt, 10)


def test_the_generator_decides_what_is_drawn() -> None:
    net, prompt = build(SMALL), some_tokens(SMALL, 5)

    def drawn(seed: int) -> list[int]:
        return [*generate(net, prompt, num_tokens=20, temperature=2.0, top_p=1.0, generator=torch.Generator().manual_seed(seed))]

    assert drawn(0) == drawn(0) != drawn(1)


def test_generation_ends_before_the_end_token() -> None:
    net, prompt = build(SMALL), some_tokens(SMALL, 5)
    drawn = [*generate(net, prompt, num_tokens=12, temperature=0.0)]
    eos = drawn[4]
    assert [*generate(net, prompt, num_tokens=12, temperature=0.0, eos_id=eos)] == drawn[: drawn.index(eos)]
    absent = next(token for token in range(SMALL.vocab_size) if token not in drawn)
    assert [*generate(net, prompt, num_tokens=12, temperature=0.0, eos_id=absent)] == drawn


def test_a_text_may_fill_the_context_and_not_one_token_more() -> None:
    net, prompt = build(SMALL), some_tokens(SMALL, 60)
    assert len([*generate(net, prompt, num_tokens=4)]) == 4
    with pytest.raises(UsageError, match=r"60 prompt tokens \+ 5 new ones exceed the model's context of 64; ask for at most 4 tokens"):
        next(generate(net, prompt, num_tokens=5))


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(UsageError, match="no tokens"):
        next(generate(build(SMALL), torch.empty(0, dtype=torch.int64), num_tokens=3))


@pytest.mark.parametrize(
    "values", [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": -1.0}], ids=str
)
def test_sampling_values_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"temperature \(.*\) must be finite and at least 0, and top_p \(.*\) above 0 and at most 1"):
        next(generate(build(SMALL), some_tokens(SMALL, 3), num_tokens=3, **values))


PROBABILITIES = [0.15, 0.5, 0.05, 0.3]


def shares(*, temperature: float, top_p: float, draws: int = 40_000) -> list[float]:
    """How often each of four tokens with PROBABILITIES is drawn."""
    logits = torch.tensor(PROBABILITIES).log().expand(draws, -1)
    drawn = choose(logits, temperature=temperature, top_p=top_p, generator=torch.Generator().manual_seed(0))
    return (torch.bincount(drawn, minlength=4) / draws).tolist()


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (1.0, {0, 1, 2, 3}),
        (0.96, {0, 1, 2, 3}),
        (0.94, {0, 1, 3}),
        (0.79, {1, 3}),
        (0.51, {1, 3}),
        (0.49, {1}),
        (0.01, {1}),
    ],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float, kept: set[int]) -> None:
    total = sum(PROBABILITIES[token] for token in kept)
    expected = [p / total if token in kept else 0.0 for token, p in enumerate(PROBABILITIES)]
    found = shares(temperature=1.0, top_p=top_p)
    assert found == pytest.approx(expected, abs=0.01)
    assert [share > 0 for share in found] == [p > 0 for p in expected]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_raises_probabilities_to_its_inverse(temperature: float) -> None:
    powers = [p ** (1 / temperature) for p in PROBABILITIES]
    assert shares(temperature=temperature, top_p=1.0) == pytest.approx([p / sum(powers) for p in powers], abs=0.01)


def test_temperature_0_takes_the_likeliest_of_each_row() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, -math.inf, 1.0]])
    assert choose(logits, temperature=0.0, top_p=1.0, generator=None).tolist() == [1, 0]


def test_the_least_top_p_takes_the_likeliest() -> None:
    assert choose(torch.tensor([[0.0, 1.0]]), temperature=1.0, top_p=1e-300, generator=None).tolist() == [1]


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=8), st.floats(0.1, 5), st.floats(0.01, 1))
def test_the_likelier_tokens_before_a_drawn_one_do_not_fill_top_p(logits: list[int], temperature: float, top_p: float) -> None:
    token = int(choose(torch.tensor([logits]), temperature=temperature, top_p=top_p, generator=None))
    likelier = sum(math.exp(other / temperature) for other in logits if other > logits[token])
    assert likelier / sum(math.exp(other / temperature) for other in logits) <= top_p + 1e-5
