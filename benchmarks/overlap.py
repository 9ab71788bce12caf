"""Overlapped pairs with a real model: do they hide the experts' all-to-all on a slow link between two hosts?

    sudo python benchmarks/overlap.py [--links 0 1000 250 100] [--sequences 32] [--rounds 5] [--json FILE] [--trace FILE]

Two network namespaces, joined by a veth pair whose ends `tc` limits to so many Mbit/s in either direction (0: no limit). Four ranks, gloo
processes of one thread: pp=2 dp=2 ep=2, where the two ranks of a stage, which exchange experts' rows, lie on different hosts, and the two
stages of a replica on one. The same model and batch by four ways, in rotating order:

    dualpipev   its pairs taking turns while rows travel
    in turn     the same table, a pair being a forward and then a backward
    zbv, 1f1b   schedules without pairs

A step's time is that of the slowest rank; `waiting` is the mean share of it that ranks stand still for experts' rows. Four ranks on two
cores share these: while one waits, another may compute, which hides a part of the all-to-all for everybody, and what is hidden by a pair is
little beside it. --device-ms 40 therefore gives every rank a device of its own: attention and routed experts of each layer rest so long
forward, and as long for the gradients of their inputs and again for those of their weights, as if they ran on an accelerator, in a model
so narrow that its true products hardly count. Rows, messages and the link stay what they are. --trace writes the simulated
and the measured timeline of a dualpipev step at the first link side by side; the simulation takes the median time of every stage's ops.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from scaling import Link, Waits
from startup import ROOT, circumstances, headline, rotated, write_json
from torch import Tensor
from traffic import Trainee, can_emulate, run_of, sent_by, start_ranks

from quintet.model.moe import MixtureOfExperts
from quintet.model.transformer import Block, Transformer
from quintet.ops.deferred import deferred
from quintet.parallel import pipeline
from quintet.plan.chain import difference
from quintet.plan.trace import chrome
from quintet.schedule import build
from quintet.schedule.clock import Durations, Timeline, walk

LAYOUT = "pp=2 dp=2 ep=2 zero=1"
NARROW = {"num_heads": 1, "q_lora_rank": None, "kv_lora_rank": 16, "dense_ffn_size": 32, "expert_ffn_size": 16, "vocab_size": 512}
"""Of the recipe's model, where devices are emulated: rows stay as wide as they are."""
WAYS = {"dualpipev": "dualpipev", "in turn": "dualpipev", "zbv": "zbv", "1f1b": "1f1b"}
_in_turns = pipeline._in_turns


class _OnDevice(torch.autograd.Function):
    """Its input, after a rest in each of the three computations of a part; `weight` is one of the part's parameters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seconds: float) -> Tensor:
        ctx.weight, ctx.seconds = weight, seconds
        time.sleep(seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        def make() -> Tensor:
            time.sleep(ctx.seconds)
            return torch.zeros_like(ctx.weight)

        time.sleep(ctx.seconds)
        return grads[0], deferred(ctx.weight, make), None


def give_device(model: Transformer, seconds: float) -> None:
    """Let attention and routed experts of every layer take their time."""
    for block in (module for module in model.modules() if isinstance(module, Block)):
        parts: list[torch.nn.Module] = [block.attention]
        if isinstance(block.ffn, MixtureOfExperts):
            parts.append(block.ffn.experts)
        for part in parts:
            weight = block.attention.kv_norm.weight
            part.register_forward_hook(lambda _, given, out, weight=weight: _OnDevice.apply(out, weight, seconds))


def one_after_the_other(backward: pipeline.Turns[Any], forward: pipeline.Turns[Any]) -> tuple[Any, Any]:
    """A pair that is none."""
    y = pipeline._drained(forward)
    return pipeline._drained(backward), y


def worker(task: Mapping[str, Any]) -> None:
    """The life of a rank: a step for each line on standard input, an answer to each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="env://")
    waits = Waits()
    trainees = {}
    for schedule in dict.fromkeys(WAYS.values()):
        run = run_of(Path(task["recipe"]), f"{LAYOUT} schedule={schedule} micro_batch={task['micro_batch']}", sequences=task["sequences"])
        if task["device_ms"]:
            run = replace(run, model=replace(run.model, **NARROW))
        trainees[schedule] = Trainee(run, sequences=task["sequences"])
        if task["device_ms"]:
            give_device(trainees[schedule].built.model, task["device_ms"] / 1e3)
        trainees[schedule].step()
    for line in sys.stdin:
        way = json.loads(line)
        trainee = trainees[WAYS[way]]
        pipeline._in_turns = one_after_the_other if way == "in turn" else _in_turns  # type: ignore[assignment]
        assert trainee.built.pipeline is not None
        trainee.step()  # whatever another way left behind
        dist.barrier()
        waits.clear()
        wire, begin = sent_by("eth0") if task["has_link"] else 0, time.perf_counter()
        trainee.step()
        seconds = time.perf_counter() - begin
        times = [(str(work), start, end) for work, start, end in trainee.built.pipeline.recorder.times]
        dist.barrier()
        sent = (sent_by("eth0") if task["has_link"] else 0) - wire
        print(json.dumps({"seconds": seconds, "waits": waits["ep"], "wire": sent, "times": times}), flush=True)


def ask(crew: Sequence[Any], way: str) -> list[dict[str, Any]]:
    """Every rank's answer to a step of one way."""
    for process in crew:
        print(json.dumps(way), file=process.stdin, flush=True)
    answers = [process.stdout.readline() for process in crew]
    if not all(answers):
        raise RuntimeError("a rank is gone; its own message stands above")
    return [json.loads(answer) for answer in answers]


def measure(given: argparse.Namespace, crew: Sequence[Any], link: Link | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row for each link and way, and the last dualpipev step's answers at the first link."""
    found: dict[tuple[int, str], list[list[dict[str, Any]]]] = {(megabits, way): [] for megabits in given.links for way in WAYS}
    for turn in range(given.rounds):
        for megabits in given.links:
            if link:
                link.limit(megabits)
            for way in rotated(list(WAYS), turn):
                found[megabits, way].append(ask(crew, way))
    rows = []
    for (megabits, way), rounds in found.items():
        seconds = [max(rank["seconds"] for rank in ranks) for ranks in rounds]
        waiting = [statistics.mean(rank["waits"] / rank["seconds"] for rank in ranks) for ranks in rounds]
        megabytes = max(sum(rank["wire"] for rank in ranks[i::2]) / 2 for ranks in rounds[-1:] for i in (0, 1)) / 1e6
        rows.append(
            {
                "megabits": megabits,
                "way": way,
                "seconds": statistics.median(seconds),
                "all": seconds,
                "waiting": statistics.median(waiting),
                "megabytes": megabytes,
            }
        )
    return rows, found[given.links[0], "dualpipev"][-1]


def timelines(answers: Sequence[Mapping[str, Any]], num_microbatches: int) -> dict[str, Timeline]:
    """The step of replica 0 as it was, and as it would be with each op's median time on ranks that never wait for each other in vain."""
    schedule = build("dualpipev", 2, num_microbatches)
    times = [answers[0]["times"], answers[2]["times"]]
    zero = min(row[0][1] for row in times)
    measured = Timeline(
        schedule=schedule,
        starts=[[start - zero for _, start, _ in row] for row in times],
        ends=[[end - zero for _, _, end in row] for row in times],
        waits=[0.0, 0.0],
    )
    spent: dict[tuple[str, tuple[int, ...]], list[float]] = {}
    for row, there in zip(schedule.table, times, strict=True):
        for work, (text, start, end) in zip(row, there, strict=True):
            assert str(work) == text
            spent.setdefault((work.kind, tuple(op.stage for op in work.ops)), []).append(end - start)
    median = {key: statistics.median(all_of_them) for key, all_of_them in spent.items()}

    def seconds(kind: str, *others: str) -> tuple[float, ...]:
        return tuple(
            next((median[k, (stage,)] for k in (kind, *others) if (k, (stage,)) in median), 0.0) for stage in range(schedule.num_stages)
        )

    durations = Durations(
        forward=seconds("F"),
        backward=seconds("B", "I"),
        backward_input=seconds("I", "B"),
        weight=seconds("W"),
        pair={stages: value for (kind, stages), value in median.items() if kind == "FB"},  # type: ignore[misc]
    )
    return {"simulated": walk(schedule, durations), "measured": measured}


def main() -> None:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", type=int, nargs="+", help="Mbit/s, 0 for no limit; by default 0 1000 250 100")
    parser.add_argument("--sequences", type=int, default=32, help="of a step, on all replicas (default 32)")
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--device-ms", type=float, default=0.0, help="give every rank a device that takes so long for each part of a layer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes/laptop.toml")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(json.loads(given.worker))
        os._exit(0)
    link = Link(delay=0.0) if can_emulate("tc") else None
    given.links = (given.links or [0, 1000, 250, 100]) if link else [0]
    facts = circumstances("torch")
    print(headline(facts))
    task = {"recipe": str(given.recipe), "has_link": link is not None}
    task |= {name: getattr(given, name) for name in ("sequences", "micro_batch", "device_ms")}
    crew: list[Any] = []
    try:
        if link:
            link.open()
        hosts: list[str | None] = [*link.hosts, *link.hosts] if link else [None] * 4
        crew = start_ranks(__file__, task, hosts, **({"address": "10.83.62.1", "interface": "eth0"} if link else {}))
        rows, last = measure(given, crew, link)
    finally:
        for process in crew:
            process.kill()
        if link:
            link.close()
    print(f"{given.sequences} sequences per step in micro-batches of {given.micro_batch}; {given.rounds} rounds\n")
    print(f"{'link Mbit/s':>12}  {'way':10}{'s/step':>8}{'MB':>7}{'waiting':>9}   all rounds")
    for row in rows:
        shown = " ".join(f"{s:.2f}" for s in row["all"])
        name = row["megabits"] or "no limit"
        print(f"{name:>12}  {row['way']:10}{row['seconds']:8.2f}{row['megabytes']:7.1f}{100 * row['waiting']:7.0f} %   {shown}")
    if given.trace:
        both = timelines(last, given.sequences // 2 // given.micro_batch)
        given.trace.write_text(chrome(both))
        print(f"dualpipev: {difference(both['measured'], both['simulated'])}")
    write_json(given.json, facts, {"layout": LAYOUT, **task, "recipe": given.recipe.name, "rows": rows})


if __name__ == "__main__":
    main()
