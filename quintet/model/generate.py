"""Text generation with the latent cache: temperature, nucleus (top-p) and greedy sampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from quintet.errors import NumericsError, UsageError
from quintet.model.transformer import Transformer


def choose(logits: Tensor, *, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """logits [B, C] -> token ids [B]. Temperature 0 takes the likeliest; top_p keeps the smallest set of that probability."""
    if temperature < 1e-5:  # no float32 would tell it from greedy
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)
    ordered, indices = probabilities.sort(-1, descending=True)
    # A token stays if the likelier ones before it do not fill top_p yet; the first one does however small that is.
    filled = ordered.cumsum(-1) - ordered >= top_p
    filled[:, 0] = False
    ordered = ordered.masked_fill(filled, 0.0)
    return indices.gather(-1, torch.multinomial(ordered, 1, generator=generator))[:, 0]


def generate(
    model: Transformer,
    prompt: Tensor,
    *,
    num_tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Continue prompt [S] token by token, at most num_tokens, ending before eos_id.

    Raises UsageError for an empty prompt, a text longer than the model's context, or sampling values out of range.
    """
    if not prompt.numel():
        raise UsageError("the prompt has no tokens; give at least one character to continue")
    if prompt.numel() + num_tokens > model.model.max_context:
        raise UsageError(
            f"{prompt.numel()} prompt tokens + {num_tokens} new ones exceed the model's context of {model.model.max_context}; "
            f"ask for at most {max(model.model.max_context - prompt.numel(), 0)} tokens or shorten the prompt"
        )
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise UsageError(f"temperature ({temperature}) must be finite and at least 0, and top_p ({top_p}) above 0 and at most 1")
    if (largest := int(prompt.max())) >= model.model.vocab_size:
        raise UsageError(f"token {largest} of the prompt lies outside the model's vocabulary of {model.model.vocab_size}")
    pick = partial(choose, temperature=temperature, top_p=top_p, generator=generator)
    return _draw(model, prompt, num_tokens, pick, eos_id)


@torch.no_grad()
def _draw(model: Transformer, prompt: Tensor, num_tokens: int, pick: Callable[[Tensor], Tensor], eos_id: int | None) -> Iterator[int]:
    cache = model.empty_cache(1)
    tokens = prompt[None]
    for _ in range(num_tokens):
        logits = model.decode(tokens, cache)
        if not bool(logits.isfinite().all()):
            raise NumericsError("the model's logits are not finite: its weights are damaged; generate from an earlier checkpoint")
        tokens = pick(logits)[None]
        token = int(tokens)
        if token == eos_id:
            return
        yield token
