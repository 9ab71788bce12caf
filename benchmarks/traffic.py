"""Bytes of a training step by axis of the mesh: foretold from the recipe, counted by the ranks, and seen by the network interface.

    python benchmarks/traffic.py [--layouts "dp=4 zero=1" "dp=4 ep=4"] [--sequences 8] [--recipe FILE] [--json FILE]

Step: the recipe's model takes one step on each layout, a gloo process of one thread per rank. `foretold` is `quintet.cost.traffic` with
experts chosen equally often, `counted rows` the same with the rows that really travelled, `measured` what the ranks' groups counted: the
mean over ranks, in bytes as the bandwidth-optimal algorithm of each collective sends them. Measured bytes that are more than 1 % off the
foretold ones of counted rows end the script with an error.

Wire: what the loopback device of a network namespace of the ranks' own sent meanwhile, TCP headers and acknowledgements included; an
independent witness. Without root and `ip` it is the machine's loopback device, whose other traffic counts too. Where it sends more than
the ranks counted, gloo's algorithm is not the bandwidth-optimal one: the second table has the factor of every collective, with messages of
--mebibytes on --ranks.

The other scripts take from here how ranks are started, in namespaces or not (`start_ranks`), and how a layout is written on a command line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from startup import ROOT, circumstances, headline, write_json
from torch import Tensor

from quintet.cost.traffic import Rows, step_traffic
from quintet.data.loader import Batch
from quintet.parallel import collectives
from quintet.parallel.collectives import Group
from quintet.parallel.expert import AllToAllDispatch, Route
from quintet.parallel.mesh import make_mesh
from quintet.spec import parse
from quintet.spec.curriculum import Settings
from quintet.spec.layout import Layout
from quintet.spec.legal import require_legal
from quintet.spec.run import Run
from quintet.train.build import Built, build
from quintet.train.step import accumulate, update

LAYOUTS = (
    "dp=4",
    "dp=4 zero=1",
    "dp=4 zero=2",
    "dp=4 zero=3 recompute=full",
    "dp=4 zero=1 zero_ranks=2",
    "dp=4 ep=2 zero=1",
    "dp=4 ep=4 zero=1 recompute=full",
    "tp=4",
    "tp=2 dp=2 zero=1",
    "tp=2 dp=2 ep=2 expert_tp=2 zero=1",
    "cp=4 zero=1",
    "dp=2 cp=2 ep=4 zero=3",
    "pp=4 schedule=1f1b",
    "pp=2 tp=2 schedule=zb1p zero=1",
    "pp=2 dp=2 ep=2 zero=1 micro_batch=1",
    "pp=4 schedule=dualpipe zero=1 micro_batch=1",
)
COLLECTIVES: dict[str, Callable[[Tensor, Group], object]] = {
    "all-reduce": lambda x, group: collectives.all_reduce(x, group),
    "reduce-scatter": lambda x, group: collectives.reduce_scatter(x, group),
    "all-gather": lambda x, group: collectives.all_gather(x, group),
    "all-to-all": lambda x, group: collectives.all_to_all(
        x, group, send=[len(x) // group.size] * group.size, receive=[len(x) // group.size] * group.size
    ),
    "ring shift": lambda x, group: collectives.Shift([x], group).wait(),
}
TOLERANCE = 0.01
REPEATS = 5


def run_of(recipe: Path, text: str, *, sequences: int, precision: str = "bf16") -> Run:
    """The recipe on a layout written as "dp=2 zero=1 recompute=full", with micro-batches of half a rank's sequences or `micro_batch`.
    Raises SpecError."""
    run, given = parse.read(recipe), dict(part.split("=", 1) for part in text.split())
    recompute, micro_batch = given.pop("recompute", "none"), int(given.pop("micro_batch", "0"))
    layout = Layout(**{name: value if name == "schedule" else int(value) for name, value in given.items()})  # type: ignore[arg-type]
    require_legal(layout, run.model, [run.phases[0].sequence_length])
    changes: dict[str, Any] = {"recompute": recompute, "precision": precision}
    micro_batch = micro_batch or max(-(-sequences // layout.dp) // 2, 1)
    return replace(run, layout=layout, train=replace(run.train, micro_batch=micro_batch, compile=False, device="cpu", **changes))


# What a rank does.


class Trainee:
    """A model on its layout, and a batch of random tokens that it takes step after step."""

    def __init__(self, run: Run, *, sequences: int) -> None:
        self.run, self.sequences = run, sequences
        self.built: Built = build(run, make_mesh(run.layout), torch.device("cpu"), on_message=lambda text: None)
        length, vocabulary = run.phases[0].sequence_length, run.model.vocab_size
        tokens = torch.randint(vocabulary, (sequences, length + 1), generator=torch.Generator().manual_seed(1))
        whole = Batch(inputs=tokens[:, :-1], labels=tokens[:, 1:], sizes=[(length + 1, 0)] * sequences)
        self.batch = whole.rows(slice(self.built.mesh.at.dp, None, run.layout.dp))
        self.num_steps = 0

    def step(self) -> Tensor:
        """One optimizer step -> the tokens of this rank that chose each expert [layers, E]."""
        self.num_steps += 1
        settings = Settings(batch_sequences=self.sequences, learning_rate=1e-4, mtp_weight=0.1, bias_speed=0.001)
        sums, load = accumulate(
            self.built, self.batch, settings=settings, train=self.run.train, document_mask=self.run.data.document_mask
        )
        update(self.built, sums, load, settings=settings, step=self.num_steps)
        return load


def step_worker(task: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes and calls by axis of the second step, the rows for each rank of ep, and the bytes that the loopback device sent meanwhile."""
    trainee = Trainee(run_of(Path(task["recipe"]), task["layout"], sequences=task["sequences"]), sequences=task["sequences"])
    trainee.step()
    trainee.built.parameters.finish_gathering()
    groups = trainee.built.mesh.groups
    before = {axis: (group.traffic.num_bytes, group.traffic.num_calls) for axis, group in groups.items()}
    noted = _note_rows()
    _, wire = _on_the_wire(lambda: (trainee.step(), trainee.built.parameters.finish_gathering()))
    times = 2 if trainee.run.train.recompute == "full" else 1  # recomputation sends the same rows again
    sent = {axis: group.traffic.num_bytes - before[axis][0] for axis, group in groups.items()}
    calls = {axis: group.traffic.num_calls - before[axis][1] for axis, group in groups.items()}
    return {"sent": sent, "calls": calls, "rows": [sum(to) // times for to in zip(*noted, strict=True)], "wire": wire}


def _note_rows() -> list[tuple[int, ...]]:
    """A list that gets the rows for each rank of ep whenever tokens are dispatched, from now on."""
    noted: list[tuple[int, ...]] = []
    prepare = AllToAllDispatch.prepare

    def note(dispatch: AllToAllDispatch, experts: Tensor) -> Route:
        route = prepare(dispatch, experts)
        noted.append(route.sizes.send)
        return route

    AllToAllDispatch.prepare = note  # type: ignore[method-assign]
    return noted


def collectives_worker(task: Mapping[str, Any]) -> dict[str, Any]:
    """Of each collective on a message: bytes counted on this rank, and sent by the loopback device."""
    group, found = make_mesh(Layout(dp=dist.get_world_size()))["dp"], {}
    for name, call in COLLECTIVES.items():
        message = torch.zeros(task["mebibytes"] * 2**18)
        call(message, group)
        before = group.traffic.num_bytes
        # The least of several: on a busy machine TCP sends a segment twice.
        wire = min(_on_the_wire(lambda call=call, message=message: call(message, group))[1] for _ in range(REPEATS))  # type: ignore[misc]
        found[name] = {"sent": (group.traffic.num_bytes - before) // REPEATS, "wire": wire}
    return found


def _on_the_wire(work: Callable[[], Any]) -> tuple[Any, int]:
    """Of a work that all ranks do together: what it returns, and what the loopback device sends from its beginning to its end."""
    dist.barrier()
    before = sent_by("lo")
    dist.barrier()  # none begins before all have looked
    result = work()
    dist.barrier()
    return result, sent_by("lo") - before


def sent_by(interface: str) -> int:
    """Bytes that a network interface of this namespace has sent so far."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            return int(counters.split()[8])
    return 0


WORKERS = {"step": step_worker, "collectives": collectives_worker}


def worker(task: Mapping[str, Any]) -> None:
    """The life of a rank: its place stands in the environment, its task in an argument; the answer goes to standard output."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="env://")
    print(json.dumps(WORKERS[task["kind"]](task)), flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads may not outlive the interpreter


# Who starts them, and where.


def start_ranks(
    script: str, task: Mapping[str, Any], hosts: Sequence[str | None], *, address: str = "127.0.0.1", interface: str = "lo"
) -> list[subprocess.Popen[str]]:
    """A process of `script --worker TASK` per rank, in the namespace named for it or (None) here; pipes lead to and from each. Rank 0 is
    reached at `address`, and ranks speak over `interface`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    crew = []
    for rank, host in enumerate(hosts):
        place = {"RANK": rank, "WORLD_SIZE": len(hosts), "MASTER_ADDR": address, "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": interface}
        place |= {"OMP_NUM_THREADS": 1, "MKL_NUM_THREADS": 1, "TORCH_CPP_LOG_LEVEL": "ERROR"}
        prefix = ["ip", "netns", "exec", host] if host else []
        command = [*prefix, sys.executable, script, "--worker", json.dumps(task)]
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        crew.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment))
    return crew


def answers(crew: Sequence[subprocess.Popen[str]]) -> list[Any]:
    """What each rank printed before it ended. Raises RuntimeError if any failed."""
    try:
        printed = [process.communicate()[0] for process in crew]
    finally:
        for process in crew:
            process.kill()
    if failed := [rank for rank, process in enumerate(crew) if process.wait()]:
        raise RuntimeError(f"ranks {failed} of {len(crew)} failed; their own messages stand above")
    return [json.loads(text) for text in printed]


def can_emulate(*tools: str) -> bool:
    """Whether network namespaces can be made here, with these tools."""
    return sys.platform == "linux" and os.geteuid() == 0 and all(map(shutil.which, ("ip", *tools)))


@contextmanager
def own_loopback() -> Iterator[str | None]:
    """A namespace with nothing but a loopback device, or None where none can be made."""
    if not can_emulate():
        yield None
        return
    name = f"quintet-{os.getpid()}"
    try:
        subprocess.run(["ip", "netns", "add", name], check=True)
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


def step_row(given: argparse.Namespace, text: str, host: str | None) -> dict[str, Any]:
    """Of one layout: axis -> calls and bytes, and what the wire saw. Raises RuntimeError if the bytes are not those foretold."""
    run = run_of(given.recipe, text, sequences=given.sequences)
    count = run.layout.num_ranks
    task = {"kind": "step", "recipe": str(given.recipe), "layout": text, "sequences": given.sequences}
    found = answers(start_ranks(__file__, task, [host] * count))
    even = [_foretold(run, rank, given.sequences, None) for rank in range(count)]
    counted = [_foretold(run, rank, given.sequences, rows) for rank, rows in enumerate(_rows(run, found))]
    axes = {}
    for axis in found[0]["sent"]:
        means = {name: sum(each[axis] for each in crew) / count for name, crew in (("foretold", even), ("counted_rows", counted))}
        means["measured"] = sum(rank["sent"][axis] for rank in found) / count
        if abs(means["measured"] - means["counted_rows"]) > TOLERANCE * means["counted_rows"]:
            raise RuntimeError(f"{text}: on {axis} ranks sent {means['measured']:,.0f} bytes, not {means['counted_rows']:,.0f}")
        if means["measured"]:
            axes[axis] = {"calls": found[0]["calls"][axis], **means}
    wire = max(rank["wire"] for rank in found)
    return {"layout": text, "ranks": count, "axes": axes, "wire_ratio": wire / sum(sum(rank["sent"].values()) for rank in found)}


def _foretold(run: Run, rank: int, sequences: int, rows: Rows | None) -> dict[str, float]:
    return step_traffic(
        run.model,
        run.train,
        run.layout,
        sequence_length=run.phases[0].sequence_length,
        batch_sequences=sequences,
        rank=rank,
        rows=rows,
    )


def _rows(run: Run, found: Sequence[Mapping[str, Any]]) -> list[Rows]:
    """The rows that each rank exchanged."""
    layout = run.layout
    sent = [rank["rows"] or [0] * layout.ep for rank in found]  # a stage may have no experts, or all of them

    def arriving(rank: int) -> int:
        return sum(sent[source][layout.coordinates(rank).ep] for source in layout.group_of(rank, "ep"))

    def rows(rank: int) -> Rows:
        own, here = sent[rank][layout.coordinates(rank).ep], arriving(rank)
        sharing = layout.group_of(rank, "tp") if layout.expert_tp > 1 else (rank,)
        return Rows(out=sum(sent[rank]) - own, into=here - own, here=here, there=sum(map(arriving, sharing)) - here)

    return [rows(rank) for rank in range(layout.num_ranks)]


def factors(counts: Sequence[int], mebibytes: int, host: str | None) -> list[dict[str, Any]]:
    """Bytes on the wire over bytes counted, of each collective, on so many ranks."""
    rows = []
    for count in counts:
        found = answers(start_ranks(__file__, {"kind": "collectives", "mebibytes": mebibytes}, [host] * count))
        for name in COLLECTIVES:
            sent, wire = sum(rank[name]["sent"] for rank in found), max(rank[name]["wire"] for rank in found)
            rows.append({"collective": name, "ranks": count, "mebibytes": mebibytes, "counted": sent, "wire": wire, "factor": wire / sent})
    return rows


def show(steps: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> None:
    """Print both tables."""
    print(f"\n{'bytes per rank and step':42}{'axis':20}{'calls':>6}{'foretold':>14}{'counted rows':>14}", end="")
    print(f"{'measured':>14}{'ratio':>9}{'wire':>7}")
    for step in steps:
        for i, (axis, row) in enumerate(step["axes"].items()):
            first, last = step["layout"] if i == 0 else "", f"{step['wire_ratio']:7.2f}" if i == 0 else ""
            print(f"{first:42}{axis:20}{row['calls']:6}{row['foretold']:14,.0f}{row['counted_rows']:14,.0f}", end="")
            print(f"{row['measured']:14,.0f}{row['measured'] / row['counted_rows']:9.5f}{last}")
    print(f"\n{'collective':18}{'ranks':>6}{'counted':>14}{'on the wire':>14}{'factor':>8}")
    for row in rows:
        print(f"{row['collective']:18}{row['ranks']:6}{row['counted']:14,}{row['wire']:14,}{row['factor']:8.2f}")


def main() -> None:
    """Measure, print the tables, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS))
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes/laptop.toml")
    parser.add_argument("--sequences", type=int, default=8, help="of a step, on all ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="on which the factors are measured")
    parser.add_argument("--mebibytes", type=int, default=4, help="of the messages whose factors are measured")
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return worker(given.worker)
    facts = circumstances("torch")
    print(headline(facts))
    with own_loopback() as host:
        steps = [step_row(given, text, host) for text in given.layouts]
        rows = factors(given.ranks, given.mebibytes, host)
    show(steps, rows)
    run = parse.read(given.recipe)
    about = {"model": asdict(run.model), "sequence_length": run.phases[0].sequence_length, "sequences": given.sequences}
    write_json(given.json, facts, {**about, "own_namespace": host is not None, "steps": steps, "collectives": rows})


if __name__ == "__main__":
    main()
