"""How long it takes from the start of a process to the first step of a resumed run, by phases. Imports no torch."""

from __future__ import annotations

import time

import psutil  # type: ignore[import-untyped]


class Phases:
    """Seconds of phases that follow one another without a gap."""

    def __init__(self, since: float | None = None) -> None:
        """since: when the first one began, in seconds since 1970; by default now."""
        self.seconds: dict[str, float] = {}
        self._last = time.time() if since is None else since

    def end(self, phase: str) -> None:
        """A phase ends here, and the next one begins."""
        now = time.time()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def since_process_start() -> Phases:
    """Phases that begin where this process did; `start` has passed."""
    phases = Phases(psutil.Process().create_time())
    phases.end("start")
    return phases
