"""The exception tree: every error a user can meet, and the exit code that it ends the program with.

    QuintetError                 1   anything below
    ├── UsageError               2   the command line or the recipe is wrong
    │   └── SpecError                a value breaks a rule of the recipe
    ├── DataError               10   the text, the tokenizer or the shards are wrong
    ├── CheckpointError         11   no valid checkpoint, or not this model's
    │   └── DamagedError             its bytes are not those that were written: an older one may do
    ├── NumericsError           12   a loss or a gradient is not finite
    ├── RankError               76   another rank is missing or lost: start again
    └── GivenUp                 93   no progress after repeated recovery: do not restart

A message says what was wrong, the values, the rule and the remedy; the words of remedies that several rooms give stand here too.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

DONE = 0
INTERRUPTED = 75
"""Stopped by a signal after a complete checkpoint: `quintet resume` continues."""
KEYBOARD_INTERRUPT = 130
"""Ctrl-C where there was nothing to save; what is done already stays."""


class QuintetError(Exception):
    """Base of all errors that are shown to the user as one message, without a traceback."""

    exit_code: ClassVar[int] = 1


class UsageError(QuintetError):
    """The command line or the recipe asks for something that does not exist."""

    exit_code: ClassVar[int] = 2


class SpecError(UsageError, ValueError):
    """A value of the recipe breaks a rule. Also a ValueError, so that parsers add the path of the value."""


class DataError(QuintetError):
    """Text, tokenizer or token shards cannot be used."""

    exit_code: ClassVar[int] = 10


class CheckpointError(QuintetError):
    """No valid checkpoint, a damaged one, or one of another model."""

    exit_code: ClassVar[int] = 11


class DamagedError(CheckpointError):
    """A checkpoint whose bytes are not those that were written."""


class RankError(QuintetError):
    """Another rank did not arrive, or is gone."""

    exit_code: ClassVar[int] = 76


class NumericsError(QuintetError):
    """A loss or gradient became infinite or not a number."""

    exit_code: ClassVar[int] = 12


class GivenUp(QuintetError):
    """Recovery was tried and made no progress; starting again would not help."""

    exit_code: ClassVar[int] = 93


_EXTRA_OF = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "hf": "hf"}
"""The extra that reaches a URL's protocol."""


def install_line(extra: str) -> str:
    """The command that installs one of this package's extras."""
    return f"pip install -c constraints.txt 'quintet[{extra}]'"


def remedy_to_reach(url: str) -> str:
    """What to do where the package that reaches a URL's store is missing."""
    extra = _EXTRA_OF.get(url.partition(":")[0])
    return f"install it: {install_line(extra)}" if extra else "install that package"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest known name, whatever its case, or an empty string."""
    by_lower = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f" (did you mean {by_lower[near[0]]!r}?)" if near else ""
