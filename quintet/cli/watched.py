"""A training call with everything that watches it: metrics, TensorBoard, the terminal and the status file."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from quintet.errors import DONE, INTERRUPTED
from quintet.monitor.sinks import Fanout, open_sinks
from quintet.monitor.status import StatusFile
from quintet.spec.run import Run

_OUTCOMES = {DONE: "trained to the end", INTERRUPTED: "stopped by a signal, after a complete checkpoint"}


def watched(run: Run, run_directory: Path, call: Callable[[Fanout], int], *, resumed: bool = False) -> int:
    """Call `call` with the run's sinks and return its exit code, which status.json then holds too, as it does an error's."""
    console = Console(stderr=True)
    with StatusFile(run_directory, resumed=resumed) as status:
        with open_sinks(run.monitor, run_directory, console=console, title=run.name, others=[status]) as sinks:
            exit_code = call(sinks)
        status.finish(exit_code, _OUTCOMES.get(exit_code, f"ended with exit code {exit_code}"))
    if exit_code == INTERRUPTED:
        console.print(f"stopped; continue with: quintet resume {shlex.quote(str(run_directory))}", markup=False, soft_wrap=True)
    return exit_code
