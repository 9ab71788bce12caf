"""Numbers as people read them: durations, counts, bytes, and a curve in one line of text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

_BARS = "▁▂▃▄▅▆▇█"


def duration(seconds: float | None) -> str:
    """`4.2s`, `3m 07s`, `5h 02m`, `12d 4h`; `--` for None and for what is not finite."""
    if seconds is None or not math.isfinite(seconds):
        return "--"
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600}h"


def count(number: float) -> str:
    """`950`, `12.3K`, `1.31M`, `14.8T`: at most three digits and a factor of 1000."""
    return _scaled(number, 1000, ("", "K", "M", "B", "T", "P", "E"))


def num_bytes(number: float) -> str:
    """`512 B`, `2.11 GiB`: at most three digits and a factor of 1024."""
    return _scaled(number, 1024, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def _scaled(number: float, base: int, names: tuple[str, ...]) -> str:
    for name in names:
        if abs(number) < min(base, 999.5) or name == names[-1]:
            break
        number /= base
    text = f"{number:.3g}" if abs(number) < 999.5 else f"{number:.0f}"
    return f"{text}{name}"


def sparkline(values: Sequence[float], *, width: int) -> str:
    """The values as one line of bars, averaged into at most `width` columns; what is not finite is left out."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite or width < 1:
        return ""
    columns = min(width, len(finite))
    edges = [len(finite) * i // columns for i in range(columns + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    steps = len(_BARS) - 1
    return "".join(_BARS[round((m - low) / (high - low) * steps) if high > low else 0] for m in means)
