"""Whether this machine has room for ranks that are started here: processes for its cores, and bytes for its memory. Imports no torch."""

from __future__ import annotations

from quintet.errors import UsageError
from quintet.monitor import machine
from quintet.monitor.units import num_bytes

RANKS_PER_CORE = 16
"""Processes for each core that still meet in time; beyond it they mostly wait for their turns."""
PROCESS_BYTES = 100_000_000
"""What a rank's process holds beside its tensors: torch's own data, threads, and buffers of gloo."""


def require_room(count: int, *, tensor_bytes: int, most: int | None, what: str, remedy: str) -> None:
    """Raise UsageError where `count` ranks, each with `tensor_bytes`, are more than this machine is for; `most`, if given, is what the user
    allows instead, whatever the machine has. The message says `what` needs them, and the `remedy`."""
    if most is not None:
        if count > most:
            raise UsageError(f"{what} takes {_ranks(count)}, and --max-ranks allows {most:,}; {remedy}")
        return
    cores, free, needed = machine.num_cores(), machine.free_memory(), count * (tensor_bytes + PROCESS_BYTES)
    if count > RANKS_PER_CORE * cores:
        raise UsageError(
            f"{what} takes {_ranks(count)}, each a process on this machine, whose {cores} cores are for {RANKS_PER_CORE * cores} "
            f"({RANKS_PER_CORE} each); {remedy}"
        )
    if needed > free:
        on_ranks = f" on {_ranks(count)}" if count > 1 else ""
        raise UsageError(f"{what} takes about {num_bytes(needed)} of memory{on_ranks}, of which {num_bytes(free)} are free here; {remedy}")


def _ranks(count: int) -> str:
    return f"{count:,} rank{'' if count == 1 else 's'}"
