"""Wall time from launch to exit of the commands that should answer at once, in rotating order, median of several.

    python benchmarks/startup.py [--rounds 9] [--recipe recipes/laptop.toml] [--json FILE]

An interpreter that does nothing runs along: the ratio to it is what compares between machines. Every command runs once before its
times count, so compiled Python files and the disk cache are there.

The other scripts take from here what a result must state (`circumstances`) and how contestants in processes of their own
take turns (`take_turns`, `answer`).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quintet.monitor.machine import cpu_name, num_cores

ROOT = Path(__file__).resolve().parent.parent
QUINTET = str(Path(sys.executable).with_name("quintet"))
"""The installed command of this interpreter."""


def circumstances(*packages: str) -> dict[str, Any]:
    """What every result states: date, commit, hardware, how busy the machine is, versions, and the command."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short=12", "HEAD") or "unknown",
        "uncommitted_changes": bool(_git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results")),
        "processor": cpu_name(),
        "cores": num_cores(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}},
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *_without_result(sys.argv[1:])]),
    }


def _without_result(arguments: Sequence[str]) -> list[str]:
    """The arguments but for where the result goes, which says nothing of what was measured."""
    dropped = {i + by for i, word in enumerate(arguments) if word == "--json" for by in (0, 1)}
    return [word for i, word in enumerate(arguments) if i not in dropped and not word.startswith("--json=")]


def headline(facts: Mapping[str, Any]) -> str:
    """The circumstances in one line."""
    changed = " with uncommitted changes" if facts["uncommitted_changes"] else ""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    where = f"{facts['processor']}, {facts['cores']} cores, load {facts['load_average']}"
    return f"{facts['date'][:16]}Z, commit {facts['commit']}{changed}, {where}, {versions}"


def write_json(path: Path | None, facts: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Write circumstances and result where `--json` says, if it does."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"circumstances": facts, **result}, indent=1) + "\n")


def take_turns(workers: Mapping[str, Sequence[str]], *, rounds: int, threads: int) -> dict[str, list[dict[str, float]]]:
    """Start a process per contestant, let them take one turn after another in rotating order, and return their answers by name.

    A worker calls `answer`. Raises RuntimeError, naming the contestant, if one dies.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    names = list(workers)
    crew: dict[str, subprocess.Popen[str]] = {}
    answers: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    try:
        for name in names:
            command = [sys.executable, *workers[name]]
            crew[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for name in names:
            _read(crew[name], name)
        for i in range(rounds):
            for name in rotated(names, i):
                stdin = crew[name].stdin
                assert stdin is not None
                print("go", file=stdin, flush=True)
                answers[name].append(json.loads(_read(crew[name], name)))
    finally:
        for process in crew.values():
            process.communicate()
    return answers


def answer(turn: Callable[[], dict[str, float]]) -> None:
    """A worker's life: say that it is ready, then take a turn for each line on standard input."""
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(turn()), flush=True)


def rotated(names: Sequence[str], by: int) -> list[str]:
    """The names, beginning with another one each round."""
    by %= len(names)
    return [*names[by:], *names[:by]]


def _read(process: subprocess.Popen[str], name: str) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the process of {name!r} ended with {process.wait()} before its turn; its own message stands above")
    return line


def _git(*arguments: str) -> str:
    try:
        found = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def commands(recipe: str) -> dict[str, list[str]]:
    """What is timed, by name; the bare interpreter first."""
    return {
        "python -c pass": [sys.executable, "-c", "pass"],
        "quintet --help": [QUINTET, "--help"],
        "quintet train --help": [QUINTET, "train", "--help"],
        "quintet train RECIPE --dry-run": [QUINTET, "train", recipe, "--dry-run"],
        "quintet info RECIPE": [QUINTET, "info", recipe],
    }


def seconds(command: Sequence[str]) -> float:
    """Wall time of one run. Raises CalledProcessError if it fails."""
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def imports_torch(arguments: Sequence[str]) -> bool:
    """Whether `quintet ARGUMENTS` loads torch."""
    program = "import sys; from quintet.cli.main import main; main(sys.argv[1:]); sys.exit(3 if 'torch' in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-c", program, *arguments], check=False, stdout=subprocess.DEVNULL)
    if done.returncode not in (0, 3):
        raise RuntimeError(f"quintet {' '.join(arguments)} ended with {done.returncode}")
    return done.returncode == 3


def main() -> None:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="runs of each command that count")
    parser.add_argument("--recipe", default=str(ROOT / "recipes/laptop.toml"))
    parser.add_argument("--json", type=Path, help="write the result there too")
    given = parser.parse_args()
    facts = circumstances("torch")
    timed = commands(given.recipe)
    times: dict[str, list[float]] = {name: [] for name in timed}
    for i in range(given.rounds + 1):
        for name in rotated(list(timed), i):
            times[name].append(seconds(timed[name]))
    rows: dict[str, dict[str, float | bool]] = {}
    bare = statistics.median(times["python -c pass"][1:])
    for name, (_, *counted) in times.items():
        median = statistics.median(counted)
        torch = name.startswith("quintet") and imports_torch(timed[name][1:])
        rows[name] = {"median": median, "min": min(counted), "max": max(counted), "ratio": median / bare, "imports_torch": torch}
    print(headline(facts))
    print(f"seconds from launch to exit, {given.rounds} rounds")
    print(f"{'':34}{'median':>8}{'min':>8}{'max':>8}{'ratio':>8}  imports torch")
    for name, row in rows.items():
        figures = f"{row['median']:8.3f}{row['min']:8.3f}{row['max']:8.3f}{row['ratio']:8.1f}"
        print(f"{name:34}{figures}  {'yes' if row['imports_torch'] else 'no'}")
    write_json(given.json, facts, {"rounds": given.rounds, "seconds": rows})


if __name__ == "__main__":
    main()
