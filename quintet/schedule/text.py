"""Schedules as JSON text, so that one that was constructed can be kept, drawn again and run."""

from __future__ import annotations

import json
import re
from typing import Any

from quintet.errors import SpecError
from quintet.schedule.op import Op, Pair, Work
from quintet.schedule.table import Schedule

_OP = re.compile(r"(\d+)([FBIW])(\d+)")
_PAIR = re.compile(r"\((\d+F\d+);(\d+B\d+)\)")


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
        tree: Any = json.loads(text)
        routes = tuple(tuple(int(rank) for rank in str(route).split()) for route in tree["routes"])
        table = tuple(tuple(_work(word, origin) for word in str(row).split()) for row in tree["table"])
        schedule = Schedule(name=str(tree["name"]), num_microbatches=int(tree["num_microbatches"]), routes=routes, table=table)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"{origin} is no schedule: {type(error).__name__} {error}; `quintet schedule --save` writes them") from None
    _refuse_routes(schedule, origin)
    return schedule


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
