"""Weak scaling over two emulated hosts: tokens/s per rank, the step's share of waiting for messages by axis, at several link speeds.

    sudo python benchmarks/scaling.py [--layouts "dp=4 zero=1" ...] [--links 0 4000 1000 250] [--delay MS] [--rounds 5] [--json FILE]

Two network namespaces, joined by a veth pair whose ends `tc` limits to so many Mbit/s in either direction (0: no limit), hold two ranks
each: gloo processes of one thread. Beside them live one rank alone, and two on one host with half the layout. Every rank has as many
sequences whatever the layout (--sequences), so a rank's work stays the same and ideal scaling keeps the step's time. All take turns, two
steps each, in rotating order; between turns only the link changes. That takes root, `ip` and `tc`; without them --links 0 alone is
measured, with all ranks on this host. --delay needs the kernel's netem.

Before a layout of four ranks is timed, they train two steps of the recipe's model in small (as `quintet verify --tiny` does) over that
link, nodes of two ranks each, and every gradient and weight is compared with one device: `off` is the largest error in fp32. More than
1e-4 ends the script.

Waiting is measured from outside: the time inside `wait` of every message, by the axis of its group. It includes waiting for ranks that are
late, and gloo's sums of what was scattered.

Four ranks on fewer cores run at part of their speed, so the times of four ranks are compared with those of the same four without a limit
(`x free`), never with one rank's. What a core for each rank would give lies between two bounds, which are made of CPU seconds and of
bytes that crossed the link, and so do not depend on how busy the machine is:

    efficiency = CPU seconds of a step of one rank alone / (CPU seconds of a rank + seconds that the link is busy)    nothing overlaps
               = the same                                / the larger of the two                                      all that can does

where sums, copies and system calls of communication are in the CPU seconds, and the link is busy for the bytes of the host that sends
more over the limit's speed. Shares of waiting and `x free` need as many cores as ranks, or at least a quiet machine, to mean much.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from startup import ROOT, circumstances, headline, rotated, write_json
from traffic import Trainee, can_emulate, run_of, sent_by, start_ranks

from quintet.data.loader import Batch
from quintet.evaluate.parity import first_failure, judge, trace_reference, trace_steps
from quintet.parallel import bucket, collectives, expert, zero
from quintet.parallel.collectives import Group, Pending, Shift
from quintet.parallel.mesh import make_mesh
from quintet.spec.curriculum import Settings
from quintet.spec.run import Run
from quintet.spec.tiny import tiny

HALVES = {
    "dp=4 zero=1": "dp=2 zero=1",
    "dp=4 zero=1 zero_ranks=2": "dp=2 zero=1",
    "dp=4 ep=2 zero=1": "dp=2 ep=2 zero=1",
    "dp=4 ep=4 zero=1": "dp=2 ep=2 zero=1",
    "dp=2 tp=2 zero=1": "tp=2",
    "cp=4 zero=1": "cp=2 zero=1",
}
"""Layouts of four ranks, the first two of them on one host -> the layout of two ranks that stands beside each."""
LINK_TEST_BYTES = 2 * 2**20
STEPS = 2
"""In a row, so that weights can arrive beside the next forward."""


# What a rank does.


class Waits(Counter[str]):
    """Seconds that this process has waited for messages, by axis: from its making on, `quintet.parallel` reports here."""

    def __init__(self) -> None:
        super().__init__()
        for module in (bucket, collectives, expert, zero):
            for name in ("start_all_reduce", "start_all_gather", "start_reduce_scatter", "start_all_to_all"):
                if hasattr(module, name):
                    setattr(module, name, self._named(getattr(module, name)))
        opened = Shift.__init__

        def open_shift(shift: Shift, *given: Any, **named: Any) -> None:
            opened(shift, *given, **named)
            shift.axis = _axis(*given, **named)  # type: ignore[attr-defined]

        Shift.__init__ = open_shift  # type: ignore[method-assign]
        for waiting in (Pending, Shift):
            waiting.wait = self._timed(waiting.wait, lambda message: message.axis)  # type: ignore[attr-defined]

    def _named(self, start: Callable[..., Pending]) -> Callable[..., Pending]:
        def call(*given: Any, **named: Any) -> Pending:
            pending = start(*given, **named)
            pending.axis = _axis(*given, **named)  # type: ignore[attr-defined]
            return pending

        return call

    def _timed(self, wait: Callable[..., Any], axis: Callable[..., str]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            try:
                return wait(*given, **named)
            finally:
                self[axis(*given, **named)] += time.perf_counter() - begin  # type: ignore[assignment]

        return call


def _axis(*given: Any, **named: Any) -> str:
    """Of the group among a call's arguments."""
    return next(value.axis for value in (*given, *named.values()) if isinstance(value, Group))


def worker(task: Mapping[str, Any]) -> None:
    """The life of a rank: a layout or a step for each line on standard input, an answer to each."""
    torch.set_num_threads(1)
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo", init_method="env://")
    waits, trainee = Waits(), None
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "build":
            trainee = None  # first, so that two never live
            trainee = Trainee(run_of(Path(task["recipe"]), asked["layout"], sequences=asked["sequences"]), sequences=asked["sequences"])
            trainee.step()
            answer: dict[str, Any] = {}
        elif asked["do"] == "link":
            answer = {"bytes_per_second": _link_speed()}
        elif asked["do"] == "parity":
            answer = {"off": _distance_from_one_device(run_of(Path(task["recipe"]), asked["layout"], sequences=9, precision="fp32"))}
        else:
            assert trainee is not None
            answer = _step(trainee, waits)
        print(json.dumps(answer), flush=True)
    if dist.is_initialized():
        os._exit(0)  # gloo's threads may not outlive the interpreter


def _step(trainee: Trainee, waits: Waits) -> dict[str, Any]:
    """Of one of a few steps in a row: seconds by the clock, of CPU, and of waiting by axis; bytes that this host sent over the link."""
    if dist.is_initialized():
        dist.barrier()
    waits.clear()
    wire, cpu, begin = sent_by("eth0"), time.process_time(), time.perf_counter()
    for _ in range(STEPS):
        trainee.step()
    trainee.built.parameters.finish_gathering()
    found: dict[str, Any] = {"wall": (time.perf_counter() - begin) / STEPS, "cpu": (time.process_time() - cpu) / STEPS}
    found["waits"] = {axis: seconds / STEPS for axis, seconds in waits.items()}
    if dist.is_initialized():
        dist.barrier()
    return {**found, "wire": (sent_by("eth0") - wire) / STEPS}


def _distance_from_one_device(run: Run) -> float:
    """The largest error of a gradient or weight in two steps of the run in small, over all ranks; rank 0 knows it, the others say 0."""
    run, device = tiny(run), torch.device("cpu")
    length, settings = run.phases[0].sequence_length, Settings(batch_sequences=9, learning_rate=1e-3, mtp_weight=0.3, bias_speed=1e-3)
    tokens = torch.randint(run.model.vocab_size, (2, 9, length + 1), generator=torch.Generator().manual_seed(0))
    batches = [Batch(inputs=each[:, :-1], labels=each[:, 1:], sizes=[(length + 1, 0)] * 9) for each in tokens]
    found = trace_steps(run, make_mesh(run.layout), batches, settings, device=device)
    gathered: list[Any] | None = [None] * run.layout.num_ranks if dist.get_rank() == 0 else None
    dist.gather_object(found, gathered)
    if gathered is None:
        return 0.0
    rows = judge(trace_reference(run, batches, settings, device=device), gathered)
    if failure := first_failure(rows):
        raise RuntimeError(f"{run.layout}: the {failure.what} {failure.name} of step {failure.step} is off by {failure.error:.1e}")
    return max(row.error for row in rows)


def _link_speed() -> float:
    """Bytes per second from the first rank of one half to the first of the other; 0 on all others."""
    message, rank, other = torch.zeros(LINK_TEST_BYTES // 4), dist.get_rank(), dist.get_world_size() // 2
    dist.barrier()
    begin = time.perf_counter()
    if rank == 0:
        dist.send(message, other)
        dist.recv(message[:1], other)
        return LINK_TEST_BYTES / (time.perf_counter() - begin)
    if rank == other:
        dist.recv(message, 0)
        dist.send(message[:1], 0)
    return 0.0


# Who starts them, and where.


class Crew:
    """Ranks that do together what they are asked."""

    def __init__(self, recipe: Path, hosts: Sequence[str | None], **place: str) -> None:
        self.ranks = start_ranks(__file__, {"recipe": str(recipe)}, hosts, **place)

    def ask(self, **what: Any) -> list[dict[str, Any]]:
        """Every rank's answer. Raises RuntimeError if one of them is gone."""
        for process in self.ranks:
            assert process.stdin is not None
            print(json.dumps(what), file=process.stdin, flush=True)
        return [json.loads(self._read(rank)) for rank in range(len(self.ranks))]

    def _read(self, rank: int) -> str:
        stdout = self.ranks[rank].stdout
        assert stdout is not None
        if line := stdout.readline():
            return line
        raise RuntimeError(f"rank {rank} of {len(self.ranks)} is gone; its own message stands above")

    def end(self) -> None:
        """Let the ranks end."""
        for process in self.ranks:
            process.kill()
            process.communicate()


class Link:
    """Two hosts, namespaces joined by a veth pair."""

    def __init__(self, *, delay: float) -> None:
        self.hosts = [f"quintet-{os.getpid()}-{i}" for i in range(2)]
        self.delay = delay

    def open(self) -> None:
        """Make them."""
        for name in self.hosts:
            _run(f"ip netns add {name}")
        _run(f"ip link add eth0 netns {self.hosts[0]} type veth peer name eth0 netns {self.hosts[1]}")
        for i, name in enumerate(self.hosts):
            _run(f"ip -n {name} addr add {_address(i)}/24 dev eth0", f"ip -n {name} link set lo up", f"ip -n {name} link set eth0 up")

    def limit(self, megabits: int) -> None:
        """Let so much through in either direction, 0 for all; raises CalledProcessError, for a delay also where the kernel has no netem."""
        for name in self.hosts:
            if self.delay:
                rate = f" rate {megabits}mbit" if megabits else ""
                _run(f"tc -n {name} qdisc replace dev eth0 root netem delay {self.delay}ms{rate} limit 20000")
            elif megabits:
                _run(f"tc -n {name} qdisc replace dev eth0 root tbf rate {megabits}mbit burst 128kb latency 400ms")
            else:
                subprocess.run(f"tc -n {name} qdisc del dev eth0 root".split(), check=False, stderr=subprocess.DEVNULL)

    def close(self) -> None:
        """Take them away."""
        for name in self.hosts:
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


def _address(host: int) -> str:
    return f"10.83.62.{host + 1}"


def _run(*commands: str) -> None:
    for command in commands:
        subprocess.run(command.split(), check=True)


@contextmanager
def crews(recipe: Path, link: Link | None) -> Iterator[dict[int, Crew]]:
    """One, two and four ranks; the four on two hosts if there is a link."""
    place = {"address": _address(0), "interface": "eth0"} if link else {}
    made: dict[int, Crew] = {}
    try:
        if link:
            link.open()
        first, second = link.hosts if link else (None, None)
        made = {1: Crew(recipe, [None]), 2: Crew(recipe, [None] * 2), 4: Crew(recipe, [first, first, second, second], **place)}
        yield made
    finally:
        for crew in made.values():
            crew.end()
        if link:
            link.close()


def measure(given: argparse.Namespace, crew: Mapping[int, Crew], link: Link | None, layout: str) -> list[dict[str, Any]]:
    """The rows of one layout: one rank, two ranks, and four at each speed of the link."""
    layouts = {1: "", 2: HALVES[layout], 4: layout}
    _limit(link, 0)
    (off, *_) = (rank["off"] for rank in crew[4].ask(do="parity", layout=f"{layout} node_size=2"))
    for ranks, text in layouts.items():
        crew[ranks].ask(do="build", layout=text, sequences=given.sequences * ranks)
    turns = [(1, 0), (2, 0), *((4, megabits) for megabits in given.links)]
    spent: dict[tuple[int, int], list[list[dict[str, Any]]]] = {turn: [] for turn in turns}
    speeds = {}
    for i in range(given.rounds):
        for name in rotated([json.dumps(turn) for turn in turns], i):
            ranks, megabits = turn = tuple(json.loads(name))
            _limit(link, megabits)
            if ranks == 4 and megabits not in speeds:
                speeds[megabits] = max(rank["bytes_per_second"] for rank in crew[4].ask(do="link"))
            spent[turn].append(crew[ranks].ask(do="step"))
    rows = [
        {"layout": layouts[ranks] or "one rank", "ranks": ranks, "megabits": megabits, **_summary(spent[ranks, megabits])}
        for ranks, megabits in turns
    ]
    alone, free = rows[0], next(row for row in rows if row["ranks"] == 4 and row["megabits"] == min(given.links))
    for row in rows:
        row["off"] = off if row["ranks"] == 4 else None
        row["wall_to_free_link"] = row["wall"] / free["wall"] if row["ranks"] == 4 else None
        row["cpu_to_one_rank"] = row["cpu"] / alone["cpu"]
        row["link_seconds"] = busy = row["wire_bytes"] * 8e-6 / row["megabits"] if row["megabits"] else 0.0
        row["efficiency"] = [alone["cpu"] / (row["cpu"] + busy), alone["cpu"] / max(row["cpu"], busy)]
        row["link_bytes_per_second"] = speeds[row["megabits"]] if row["ranks"] == 4 else None
    return rows


def _limit(link: Link | None, megabits: int) -> None:
    if link:
        link.limit(megabits)


def _summary(rounds: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Medians over rounds: of the slowest rank by the clock, of the ranks' mean CPU time and of their mean share of waiting by axis."""

    def share(ranks: Sequence[Mapping[str, Any]], axis: str) -> float:
        return statistics.mean(rank["waits"].get(axis, 0.0) / rank["wall"] for rank in ranks)

    axes = sorted({axis for ranks in rounds for rank in ranks for axis in rank["waits"]})
    shares = {axis: statistics.median(share(ranks, axis) for ranks in rounds) for axis in axes}
    return {
        "wall": statistics.median(max(rank["wall"] for rank in ranks) for ranks in rounds),
        "cpu": statistics.median(statistics.mean(rank["cpu"] for rank in ranks) for ranks in rounds),
        "waiting": statistics.median(sum(share(ranks, axis) for axis in axes) for ranks in rounds),
        "waiting_by_axis": {axis: value for axis, value in shares.items() if value > 0.001},
        "wire_bytes": statistics.median(max(rank["wire"] for rank in ranks) for ranks in rounds),
    }


def show_head(tokens: int) -> None:
    """Print the table's head; `tokens` are those of a rank and step."""
    print(f"\n{tokens:,} tokens per rank and step; MB: what a host sends over the link; CPU: of a rank to one rank alone; see --help")
    print(f"{'layout':26}{'link Mbit/s':>12}{'measured':>9}{'s/step':>8}{'x free':>8}{'MB':>7}{'CPU s':>7}{'CPU':>6}", end="")
    print(f"{'efficiency':>15}{'waiting':>9}{'off':>9}  by axis", flush=True)


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows of a layout."""
    for row in rows:
        across = row["ranks"] == 4
        speed = f"{row['megabits'] or 'no limit':>12}{row['link_bytes_per_second'] * 8e-6:9.0f}" if across else f"{'one host':>12}{'':9}"
        ratio = f"{row['wall_to_free_link']:8.2f}{row['wire_bytes'] / 1e6:7.1f}" if across else f"{'':15}"
        most = sorted(row["waiting_by_axis"].items(), key=lambda item: -item[1])[:4]
        axes = ", ".join(f"{axis} {100 * share:.0f} %" for axis, share in most)
        least, most_efficient = row["efficiency"]
        print(f"{row['layout']:26}{speed}{row['wall']:8.2f}{ratio}{row['cpu']:7.2f}{row['cpu_to_one_rank']:6.2f}", end="")
        off = f"{row['off']:9.1e}" if across else f"{'':9}"
        print(f"{least:8.2f} .. {most_efficient:.2f}{100 * row['waiting']:7.0f} %{off}  {axes}", flush=True)


def main() -> None:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", choices=list(HALVES), default=list(HALVES), metavar="LAYOUT", help=f"of {list(HALVES)}")
    parser.add_argument("--links", type=int, nargs="+", help="Mbit/s, 0 for no limit; by default 0 4000 1000 250")
    parser.add_argument("--delay", type=float, default=0.0, help="of the link, ms in one direction")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes/laptop.toml")
    parser.add_argument("--sequences", type=int, default=4, help="of a rank and step")
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return worker(given.worker)
    link = Link(delay=given.delay) if can_emulate("tc") else None
    if link is None and (given.delay or any(given.links or [])):
        parser.error("limited links take Linux, root, ip and tc: install iproute2 and run as root, or give --links 0 alone")
    if link is None and given.links is None:
        print("all ranks on this host: limited links take Linux, root, ip and tc (iproute2)", file=sys.stderr)
    given.links = given.links or ([0, 4000, 1000, 250] if link else [0])
    facts = circumstances("torch")
    print(headline(facts))
    tokens = given.sequences * run_of(given.recipe, "", sequences=1).phases[0].sequence_length
    show_head(tokens)
    rows: list[dict[str, Any]] = []
    with crews(given.recipe, link) as crew:
        for layout in given.layouts:
            rows += (found := measure(given, crew, link, layout))
            show(found)
    write_json(given.json, facts, {"tokens_per_rank": tokens, "emulated_hosts": link is not None, "rows": rows})


if __name__ == "__main__":
    main()
