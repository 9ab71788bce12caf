"""`quintet generate`: continue a prompt with a trained model, printed as it is drawn."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from quintet.cli.bar import Bar
from quintet.cli.options import ModelPath, read
from quintet.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Continue a prompt with a trained model; the text goes to stdout as it is drawn."""

    model: ModelPath
    """A run's directory (its newest checkpoint), or a checkpoint's; one in a store by its URL."""
    prompt: str
    """The text to continue."""
    tokens: int = 120
    """Tokens to draw at most; an end of document ends the text earlier."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token each time."""
    top_p: float = 0.95
    """Draw only from the likeliest tokens that together have this probability."""
    seed: int = 0
    """Seed of the draws; the same seed draws the same text."""


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    given = read(Arguments, arguments, command="generate")
    refuse_broken_text(given.prompt)
    if given.tokens < 0 or not 0 <= given.seed < 2**63:
        raise UsageError(f"--tokens ({given.tokens}) must not be negative, and --seed ({given.seed}) must lie between 0 and 2^63 - 1")
    import torch

    from quintet.checkpoint.place import place
    from quintet.model.generate import generate
    from quintet.train.trained import open_trained

    with Bar(f"reading {given.model}"):
        trained = open_trained(place(given.model))
    ids = torch.from_numpy(trained.tokenizer.encode_batch([given.prompt])[0].astype("int64")).to(trained.device)
    drawn = generate(
        trained.model,
        ids,
        num_tokens=given.tokens,
        temperature=given.temperature,
        top_p=given.top_p,
        eos_id=trained.tokenizer.eos_id,
        generator=torch.Generator(trained.device).manual_seed(given.seed),
    )
    told = pieces(drawn, trained.tokenizer.decode)
    first = next(told, "")  # before anything is printed: what cannot be continued is refused here
    print(given.prompt, first, sep="", end="", flush=True)
    for piece in told:
        print(piece, end="", flush=True)
    print()
    return 0


def refuse_broken_text(prompt: str) -> None:
    """Raise UsageError for a prompt whose bytes are not UTF-8, which Python hands over as lone surrogates."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"--prompt is not UTF-8 text: {os.fsencode(prompt[error.start])!r} after {prompt[: error.start][-20:]!r}; convert it, for "
            "example with iconv -t utf-8"
        ) from None


def pieces(ids: Iterable[int], decode: Callable[[Sequence[int]], str]) -> Iterator[str]:
    """The text of the ids bit by bit; a character whose bytes are spread over several tokens waits for its last one."""
    waiting: list[int] = []
    for token in ids:
        waiting.append(token)
        text = decode(waiting)
        # U+FFFD at the end: a character may still lack bytes, of which it has four at most.
        if not text.endswith("\ufffd") or len(waiting) >= 4:
            yield text
            waiting = []
    if waiting:
        yield decode(waiting)
