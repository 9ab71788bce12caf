"""Telling the user what went wrong, once, whatever the number of processes."""

from __future__ import annotations

import os
import time

WORD_SECONDS = 3.0
"""How long a process that has nothing to say lets another one speak."""


def speaks_for_all() -> bool:
    """Whether this process tells of what befalls all that torchrun started here with the same words: it is the first of them, or alone."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0"


def leave_the_word() -> None:
    """Let the process that speaks for all be first: torchrun stops the others as soon as one has ended."""
    if not speaks_for_all():
        time.sleep(WORD_SECONDS)


def tell(message: str) -> None:
    """Print an error on stderr, with the rank where there are several."""
    from rich.console import Console
    from rich.text import Text

    rank = os.environ.get("RANK")
    who = "error: " if rank is None else f"rank {rank}: error: "
    Console(stderr=True).print(Text.assemble((who, "bold red"), message), soft_wrap=True)
