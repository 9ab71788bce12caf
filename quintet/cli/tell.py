"""Telling the user what went wrong, once, whatever the number of processes."""

from __future__ import annotations

import os


def speaks_for_all() -> bool:
    """Whether this process tells of what befalls all that torchrun started here with the same words: it is the first of them, or alone."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0"


def tell(message: str) -> None:
    """Print an error on stderr, with the rank where there are several."""
    from rich.console import Console
    from rich.text import Text

    rank = os.environ.get("RANK")
    who = "error: " if rank is None else f"rank {rank}: error: "
    Console(stderr=True).print(Text.assemble((who, "bold red"), message), soft_wrap=True)
