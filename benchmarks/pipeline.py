"""Pipelines of sleeping stages: the bubble of each schedule against its simulation, and against other runtimes of the same schedules.

    python benchmarks/pipeline.py [--ranks 8] [--microbatches 16] [--unit 0.2] [--rounds 3] [--overlap] [--dualpipe DIR] [--found FILE]
                                  [--json FILE] [--trace FILE]

Every rank does 3 units of work per micro-batch, a third each for forward, input gradients and weight gradients, whatever the schedule; a
rank with two stages does half of it in each. Work is sleeping, so ranks need no core of their own; tensors have 8 elements. All contestants
run in the same processes (gloo, one per rank, forked once), one step each per round, in rotating order. The bubble is 1 - work / (ranks x
time from the first start to the last end); the medians of all rounds are shown beside the simulation of the same table. `--unit 0` measures
what a runtime costs: the time of a step without work.

With --overlap a quarter of the work is messages (timers, no work): those of a forward and of a backward. Alone, an op waits for its own;
in an overlapped pair each computes while the other's travel, so that a pair takes 0.75 of its parts. Quintet really takes turns; the peer
is told to sleep once for both, as its example's seam has it.

Contestants besides: torch.distributed.pipelining, and DeepSeek's DualPipe from a checkout at DIR (github.com/deepseek-ai/DualPipe),
which is given CPU tensors in place of CUDA's and is otherwise as published. --trace writes the simulated and the measured timelines of one
Quintet schedule's last step side by side for ui.perfetto.dev, and tells where they differ.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from startup import circumstances, headline, rotated, write_json
from torch import Tensor, nn

from quintet.parallel.collectives import Group
from quintet.parallel.pipeline import Pipeline, Turns
from quintet.parallel.recorder import Recorder
from quintet.plan.chain import difference
from quintet.plan.costs import Costs
from quintet.plan.simulate import simulate
from quintet.plan.trace import chrome
from quintet.schedule import NAMES, Schedule, build, check, fewest_microbatches
from quintet.schedule.clock import Timeline
from quintet.schedule.text import loads

SHAPE = (1, 8)
PAIR = 0.75
TORCH = {
    "1f1b": ("Schedule1F1B", 1),
    "interleaved": ("ScheduleInterleaved1F1B", 2),
    "interleaved-zb": ("ScheduleInterleavedZeroBubble", 2),
    "zbv": ("ScheduleZBVZeroBubble", 2),
    "dualpipev": ("ScheduleDualPipeV", 2),
}


@dataclass(frozen=True)
class Setting:
    """What all contestants do: sleep `unit` seconds for a forward of a rank's share."""

    num_ranks: int
    num_microbatches: int
    unit: float
    overlap: bool
    rank: int

    def op(self, stages_per_rank: int) -> float:
        """Seconds of one op of a stage."""
        return self.unit / stages_per_rank


_awake = False
"""Whether nobody sleeps: while contestants warm up."""


def nap(seconds: float) -> None:
    """Sleep, if there is anything to sleep for."""
    if seconds > 0 and not _awake:
        time.sleep(seconds)


class Clock:
    """A rank's device. What one op sleeps, or the two of a pair, in however many naps, ends when it should, but for the last nap's
    oversleeping; another op begins when it begins."""

    def __init__(self) -> None:
        self.at = 0.0

    def begin(self) -> None:
        """An op begins."""
        self.at = time.monotonic()

    def compute(self, seconds: float) -> None:
        """The device is busy."""
        self.until(self.at + seconds)

    def until(self, when: float) -> None:
        """Nothing goes on before this."""
        if not _awake:
            self.at = max(self.at, when)
            nap(self.at - time.monotonic())


class Sleeping:
    """One of our stages, which sleeps. With `overlap`, an eighth of a forward and a quarter of the gradients of inputs is each of two
    messages: a timer that runs while the stage is set aside."""

    def __init__(self, op: float, clock: Clock, *, overlap: bool, is_first: bool, is_last: bool) -> None:
        self.op, self.clock, self.overlap, self.is_first, self.is_last = op, clock, overlap, is_first, is_last

    def room(self, microbatch: int) -> Tensor:
        return torch.empty(SHAPE)

    def forward(self, microbatch: int, x: Tensor | None) -> Turns[Tensor | None]:
        self.clock.begin()
        if self.overlap:
            for _ in range(2):  # attention and dispatch, experts and combine
                self.clock.compute(3 / 8 * self.op)
                yield from self._message(self.op / 8)
        else:
            self.clock.compute(self.op)
        return None if self.is_last else torch.ones(SHAPE)

    def backward(self, microbatch: int, gradient: Tensor | None, *, put_off: bool) -> Turns[Tensor | None]:
        self.clock.begin()
        compute = (0.0 if put_off else self.op) + (self.op / 2 if self.overlap else self.op)
        if self.overlap:
            for _ in range(2):
                yield from self._message(self.op / 4)
                self.clock.compute(compute / 2)
        else:
            self.clock.compute(compute)
        return None if self.is_first else torch.ones(SHAPE)

    def weights(self, microbatch: int) -> None:
        nap(self.op)

    def _message(self, seconds: float) -> Iterator[None]:
        arrives = self.clock.at + seconds
        yield
        self.clock.until(arrives)


Step = Callable[[], None]


def table(name: str, num_ranks: int, num_microbatches: int) -> Schedule:
    """A schedule by its name, or from a file, whose sizes must be these."""
    if not name.endswith(".json"):
        return build(name, num_ranks, num_microbatches)
    schedule = loads(Path(name).read_text(), origin=name)
    if (schedule.num_ranks, schedule.num_microbatches) != (num_ranks, num_microbatches):
        raise SystemExit(f"{name} is for {schedule.num_ranks} ranks and {schedule.num_microbatches} micro-batches")
    return schedule


def ours(name: str, setting: Setting, recorder: Recorder) -> Step:
    """A step of our runtime."""
    schedule = table(name, setting.num_ranks, setting.num_microbatches)
    program, last = check(schedule).program, schedule.num_stages - 1
    op = setting.op(max(schedule.num_stages // setting.num_ranks, 1))
    clock = Clock()
    works = {
        stage: Sleeping(op, clock, overlap=setting.overlap, is_first=stage == 0, is_last=stage == last)
        for _, stage in schedule.stages[setting.rank]
    }
    group = Group("pp", tuple(range(setting.num_ranks)), setting.rank, dist.group.WORLD)
    return lambda: Pipeline(group, works, recorder).run(program)


def torchs(name: str, setting: Setting) -> Step:
    """A step of torch.distributed.pipelining, whose weight gradients are deferred by its dw_builder."""
    from torch.distributed import pipelining
    from torch.distributed.pipelining import schedules

    kind, chunks = TORCH[name]
    num_stages, op = chunks * setting.num_ranks, setting.op(chunks)
    at = [setting.rank + i * setting.num_ranks for i in range(chunks)]
    if name in ("zbv", "dualpipev"):
        at = [setting.rank, num_stages - 1 - setting.rank]
    stages = [
        pipelining.PipelineStage(
            _module(op, op),
            stage,
            num_stages,
            torch.device("cpu"),
            input_args=(torch.ones(SHAPE, requires_grad=True),),
            output_args=(torch.ones(SHAPE, requires_grad=True),),
            group=dist.group.WORLD,
            dw_builder=lambda: lambda: nap(op),
        )
        for stage in at
    ]
    schedule = getattr(schedules, kind)(stages[0] if chunks == 1 else stages, setting.num_microbatches, loss_fn=lambda y, t: (y - t).sum())
    x = torch.ones(setting.num_microbatches, SHAPE[1])

    def step() -> None:
        arguments = (x,) if 0 in at else ()
        schedule.step(*arguments, **({"target": x} if num_stages - 1 in at else {}))

    return step


def deepseeks(name: str, setting: Setting, folder: Path) -> Step:
    """A step of DeepSeek's DualPipe or DualPipeV."""
    sys.path.insert(0, str(folder))
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    import dualpipe
    from dualpipe import comm
    from dualpipe.utils import WeightGradStore, run_backward

    comm.build_from_tensor_shapes = lambda: [torch.empty(SHAPE, requires_grad=True)]
    dualpipe.set_p2p_tensor_shapes([SHAPE])
    dualpipe.set_p2p_tensor_dtype(torch.float32)
    op = setting.op(1 if name == "dualpipe" else 2)

    def weight_gradient() -> None:
        if WeightGradStore.enabled:
            WeightGradStore.put(lambda: nap(op))
        else:
            nap(op)

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.free = (_module(seconds, op, after=weight_gradient) for seconds in (op, 0.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)  # type: ignore[no-any-return]

    def overlapped(
        cls: type, forward: Any, inputs: Any, criterion: Any, labels: Any, backward: Any, loss: Any, outputs: Any, gradients: Any
    ) -> Any:
        nap(PAIR * 3 * op)
        _Nap.awake = True
        outputs0 = [forward.free(*inputs)]
        loss0 = None if criterion is None else criterion(*outputs0, *labels)
        if loss is not None:
            loss.backward()
            loss.detach_()
        else:
            run_backward(outputs, gradients)
        _Nap.awake = False
        return outputs0, loss0

    if setting.overlap:
        Stage.overlapped_forward_backward = classmethod(overlapped)  # type: ignore[attr-defined]
    runtime = (dualpipe.DualPipe if name == "dualpipe" else dualpipe.DualPipeV)((Stage(), Stage()))
    feeds = {0, setting.num_ranks - 1} if name == "dualpipe" else {0}
    rows = setting.num_microbatches // len(feeds)
    x = torch.ones(rows, SHAPE[1]) if setting.rank in feeds else None

    def step() -> None:
        runtime.step(x, num_chunks=setting.num_microbatches, criterion=lambda y, t: (y - t).sum(), labels=(x,))

    return step


class _Nap(torch.autograd.Function):
    """x -> x, asleep for a while forward and backward."""

    awake = False
    """Whether backward does not sleep now, because somebody slept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seconds: float, back: float, after: Callable[[], None] | None) -> Tensor:
        nap(seconds)
        ctx.back, ctx.after = back, after
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not _Nap.awake:
            nap(ctx.back)
            if ctx.after is not None:
                ctx.after()
        return grads[0].clone(), torch.zeros(SHAPE[1]), None, None, None


def _module(seconds: float, back: float, *, after: Callable[[], None] | None = None) -> nn.Module:
    class Napping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(SHAPE[1]))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = _Nap.apply(x, self.weight, seconds, back, after)
            return out

    return Napping()


def contestants(setting: Setting, dualpipe: Path | None, found: list[str], only: list[str], recorder: Recorder) -> dict[str, Step]:
    """Every step that can be run with these sizes, by name; with `only`, those whose name has one of its words."""
    P, M = setting.num_ranks, setting.num_microbatches
    fits = [name for name in NAMES if fewest_microbatches(name, P) <= M and not (name == "dualpipe" and (P % 2 or M % 2))]
    if setting.overlap:  # what has pairs, and for comparison the best that has none
        fits = [name for name in fits if name in ("dualpipe", "dualpipev", "zbv", "1f1b")]
    steps = {f"quintet {name}": ours(name, setting, recorder) for name in (*fits, *found)}
    if not setting.overlap:
        steps |= {f"torch {name}": torchs(name, setting) for name in TORCH if name in fits}
    if dualpipe is not None:
        steps |= {f"DeepSeek {name}": deepseeks(name, setting, dualpipe) for name in ("dualpipe", "dualpipev") if name in fits}
    return {name: step for name, step in steps.items() if not only or any(word in name for word in only)}


def work(rank: int, options: argparse.Namespace, store: dist.Store) -> None:
    """One rank: all contestants take turns; rank 0 writes what it gathered."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=options.ranks)
    setting = Setting(options.ranks, options.microbatches, options.unit, options.overlap, rank)
    recorder = Recorder(rank, range(options.ranks))
    steps = contestants(setting, options.dualpipe, options.found, options.only, recorder)
    found: dict[str, list[float]] = {name: [] for name in steps}
    computed: dict[str, list[float]] = {name: [] for name in steps}
    times: list[Any] = []
    global _awake
    for turn in range(options.rounds + 1):
        _awake = turn == 0  # the first one warms up
        for name in rotated(list(steps), turn):
            gather_objects(rank, options.ranks, None)  # a barrier
            begun, on_cpu = time.monotonic(), time.process_time()
            steps[name]()
            spans = gather_objects(rank, options.ranks, (begun, time.monotonic(), time.process_time() - on_cpu))
            if turn:
                found[name].append(max(end for _, end, _ in spans) - min(begin for begin, _, _ in spans))
                computed[name].append(sum(each for _, _, each in spans))
            if name == f"quintet {options.traced}":
                times = gather_objects(rank, options.ranks, recorder.times)
    if rank == 0:
        rows = [[(str(work), begin, end) for work, begin, end in row] for row in times]
        Path(options.out).write_text(json.dumps({"seconds": found, "cpu": computed, "times": rows}))
    dist.barrier()
    os._exit(0)


def gather_objects(rank: int, count: int, value: Any) -> list[Any]:
    """Everybody's values, on every rank."""
    found: list[Any] = [None] * count
    dist.all_gather_object(found, value)
    return found


def start(options: argparse.Namespace, out: Path) -> None:
    """Fork the ranks from this process, which has imported everything, and wait for them."""

    options.out = out
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(options.ranks):
        child = os.fork()
        if not child:
            store = dist.TCPStore("localhost", port, options.ranks, is_master=rank == 0, wait_for_workers=False)
            try:
                work(rank, options, store)
            finally:
                os._exit(1)
        children.append(child)
    if any(os.waitpid(child, 0)[1] for child in children):
        raise SystemExit("a rank failed")


def simulated(name: str, options: argparse.Namespace) -> Timeline:
    """The same step on paper."""
    costs = Costs(forward=options.unit, backward_input=options.unit, weight=options.unit, pair=PAIR if options.overlap else 1.0)
    return simulate(table(name, options.ranks, options.microbatches), costs).timeline


def main() -> None:
    """Run the contestants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--unit", type=float, default=0.2, help="seconds of a forward of a rank's share (default 0.2)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--overlap", action="store_true", help="a quarter of the work is messages that pairs can hide")
    parser.add_argument("--dualpipe", type=Path, help="a checkout of DeepSeek's DualPipe")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="only contestants whose name has one of these in it")
    parser.add_argument("--found", nargs="*", default=[], metavar="FILE", help="schedules that `quintet schedule search --save` wrote")
    parser.add_argument("--trace", type=Path, help="timelines of a step, simulated and measured")
    parser.add_argument("--traced", default="dualpipe", metavar="SCHEDULE", help="the schedule that --trace is of (default dualpipe)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    facts = circumstances("torch")
    out = Path(os.environ.get("TMPDIR", "/tmp")) / f"pipeline-{os.getpid()}.json"
    start(options, out)
    result = json.loads(out.read_text())
    out.unlink()
    print(headline(facts))
    rows = report(result["seconds"], result["cpu"], options)
    if options.trace and not result["times"]:
        print(f"no trace: {options.traced} did not run")
    elif options.trace:
        paper, real = simulated(options.traced, options), measured(options.traced, options, result["times"])
        options.trace.write_text(chrome({"simulated": paper, "measured": real}))
        print(f"\n{options.traced}: {difference(real, paper)}")
    write_json(options.json, facts, {"options": {k: str(v) for k, v in vars(options).items() if k != "out"}, "rows": rows})


def measured(name: str, options: argparse.Namespace, times: list[list[tuple[str, float, float]]]) -> Timeline:
    """The timeline of a real step, from when each op computed."""
    schedule = table(name, options.ranks, options.microbatches)
    zero = min(row[0][1] for row in times)
    for row, there in zip(schedule.table, times, strict=True):
        assert [str(op) for op in row] == [text for text, _, _ in there]
    return Timeline(
        schedule=schedule,
        starts=[[begin - zero for _, begin, _ in row] for row in times],
        ends=[[end - zero for _, _, end in row] for row in times],
        waits=[0.0] * options.ranks,
    )


def report(seconds: dict[str, list[float]], cpu: dict[str, list[float]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print a line for each contestant -> the same as values."""
    rows: list[dict[str, Any]] = []
    print(f"{options.ranks} ranks, {options.microbatches} micro-batches, unit {options.unit} s, {options.rounds} rounds\n")
    print(f"{'':26s}{'step, s':>10s}{'CPU, s':>10s}{'bubble %':>10s}{'simulated':>11s}{'(all rounds)':>24s}")
    for name, all_of_them in seconds.items():
        median = statistics.median(all_of_them)
        row: dict[str, Any] = {"name": name, "seconds": all_of_them, "cpu_seconds": cpu[name]}
        label = f"quintet {Path(name).stem}" if name.endswith(".json") else name
        shown = f"{label:26s}{median:10.3f}{statistics.median(cpu[name]):10.3f}"
        if options.unit:
            paper = simulated(name.partition(" ")[2], options)
            busy = sum(paper.busy(rank) for rank in range(options.ranks)) / options.ranks
            bubbles = [100 * (1 - busy / each) for each in all_of_them]
            row |= {"bubble": statistics.median(bubbles), "bubbles": bubbles, "simulated": 100 * (1 - busy / paper.makespan)}
            shown += f"{row['bubble']:10.1f}{row['simulated']:11.1f}{' '.join(f'{b:.1f}' for b in bubbles):>24s}"
        print(shown)
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
