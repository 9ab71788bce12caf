"""Schedules as JSON text, so that one that was constructed can be kept, drawn again and run."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgspec

from quintet.errors import SpecError
from quintet.schedule.build import NAMES, build
from quintet.schedule.op import Op, Pair, Work
from quintet.schedule.table import Schedule

_OP = re.compile(r"(\d+)([FBIW])(\d+)")
_PAIR = re.compile(r"\((\d+F\d+);(\d+B\d+)\)")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,59}")
_MOST_BYTES = 256 << 20


class _Tree(msgspec.Struct, forbid_unknown_fields=True):
    """The JSON as it is written."""

    name: str
    num_microbatches: int
    routes: list[str]
    table: list[str]



def dumps(schedule: Schedule) -> str:
    """The schedule as JSON, with ops as they print; `loads` reads it back equal."""
    tree = {
        "name": schedule.name,
        "num_microbatches": schedule.num_microbatches,
        "routes": [" ".join(map(str, route)) for route in schedule.routes],
        "table": [" ".join(map(str, row)) for row in schedule.table],
    }
    return json.dumps(tree, indent=1) + "\n"


def loads(text: str, *, origin: str) -> Schedule:
    """The schedule that JSON text describes. Raises SpecError for anything else; whether it can run is for `check` to say."""
    try:
        tree = msgspec.json.decode(text, type=_Tree)
        routes = tuple(tuple(int(rank) for rank in route.split()) for route in tree.routes)
        table = tuple(tuple(_work(word, origin) for word in row.split()) for row in tree.table)
    except (ValueError, RecursionError) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"{origin} is no schedule: {error}; `quintet schedule --save` writes them") from None
    if not _NAME.fullmatch(tree.name):
        raise SpecError(f"{origin}: name {tree.name[:80]!r} must be at most 60 letters, digits, '-', '_' and '.'")
    schedule = Schedule(name=tree.name, num_microbatches=tree.num_microbatches, routes=routes, table=table)
    _refuse_routes(schedule, origin)
    return _renamed(schedule)


def read(path: Path) -> Schedule:
    """The schedule in a file. Raises SpecError."""
    try:
        if path.exists() and (not path.is_file() or path.stat().st_size > _MOST_BYTES):
            raise OSError(f"it must be a file of at most {_MOST_BYTES >> 20} MB")
        return loads(path.read_text(), origin=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read the schedule {path}: {error}; `quintet schedule search --save` writes such files") from None


def _renamed(schedule: Schedule) -> Schedule:
    """Another name for what has the name of one that it is not."""
    if schedule.name not in NAMES:
        return schedule
    with suppress(SpecError):
        chunks = schedule.num_stages // schedule.num_ranks
        if build(schedule.name, schedule.num_ranks, schedule.num_microbatches, chunks=chunks) == schedule:
            return schedule
    return replace(schedule, name=f"{schedule.name}-from-file")


def _work(word: str, origin: str) -> Work:
    if match := _PAIR.fullmatch(word):
        return Pair(_op(match[1]), _op(match[2]))
    if _OP.fullmatch(word):
        return _op(word)
    raise SpecError(f"{origin}: {word!r} is no op; write 2F0, 2B0, 2I0, 2W0 or (2F5;5B3)")


def _op(word: str) -> Op:
    match = _OP.fullmatch(word)
    assert match is not None
    return Op(match[2], int(match[1]), int(match[3]))  # type: ignore[arg-type]


def _refuse_routes(schedule: Schedule, origin: str) -> None:
    routes, num_ranks, m = schedule.routes, schedule.num_ranks, schedule.num_microbatches
    if not routes or not routes[0] or len({len(route) for route in routes}) > 1:
        raise SpecError(f"{origin}: routes {[list(route) for route in routes]} must be one or more lists of ranks, all of the same length")
    if strange := sorted({rank for route in routes for rank in route} - set(range(num_ranks))):
        raise SpecError(f"{origin}: routes name rank {strange[0]}, but the table has ranks 0 to {num_ranks - 1}")
    if m < 1 or m % len(routes):
        raise SpecError(f"{origin}: num_microbatches ({m}) must be a positive multiple of the number of routes ({len(routes)})")
