"""Planned steps against measured ones on this machine, for layouts of two ranks that have one core each, pipelines among them.

    python benchmarks/plan_here.py [--hidden 256] [--layers 8] [--experts 16] [--length 256] [--rounds 7] [--only TEXT] [--json FILE]

The machine is measured as `quintet doctor --cluster` does, two ranks at once. One scalar, the pace of our software, is set by the step of
one device, which two processes take at the same time, each for itself; every other layout is then planned and measured (the median of
`--rounds` steps on gloo ranks, one process each). It wants two quiet cores. Functions are not fused, as the measured figures suppose.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from startup import circumstances, headline, write_json
from traffic import Trainee

from quintet.cli.doctor import measured_cpu
from quintet.launch.local import run_on_ranks
from quintet.plan.estimate import Estimate, estimate
from quintet.plan.setup import of_run
from quintet.plan.software import Software, generation
from quintet.spec import parse
from quintet.spec.cluster import Cluster, as_tree, dumps, read
from quintet.spec.layout import Layout
from quintet.spec.run import Run
from quintet.train.device import prepare

LAYOUTS = (
    Layout(dp=2),
    Layout(dp=2, zero=1),
    Layout(dp=2, zero=2),
    Layout(dp=2, zero=3),
    Layout(dp=2, ep=2, zero=1),
    Layout(tp=2),
    Layout(cp=2),
    Layout(pp=2, schedule="gpipe"),
    Layout(pp=2, schedule="1f1b"),
    Layout(pp=2, schedule="interleaved"),
    Layout(pp=2, schedule="zb1p"),
    Layout(pp=2, schedule="zbv"),
    Layout(pp=2, schedule="dualpipev"),
)
SEQUENCES = 16


def run_of(options: argparse.Namespace, layout: Layout) -> Run:
    base = parse.read(Path(__file__).parent.parent / "recipes" / "laptop.toml")
    width = options.hidden
    model = replace(
        base.model,
        hidden_size=width,
        num_layers=options.layers,
        num_heads=max(2, width // 64),
        q_lora_rank=width // 2,
        kv_lora_rank=width // 4,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        dense_ffn_size=3 * width,
        expert_ffn_size=width,
        num_routed_experts=options.experts,
        num_mtp_modules=0,
        max_context=max(base.model.max_context, options.length),
    )
    phase = replace(base.phases[0], sequence_length=options.length)
    train = replace(base.train, micro_batch=2, precision="bf16", compile=False, device="cpu", recompute="none")
    return replace(base, model=model, phases=(phase,), train=train, layout=replace(layout, node_size=8))


def step_seconds(run: Run, rounds: int) -> float:
    """The median step of this rank, as `run_on_ranks` started it; of a single device, each rank for itself."""
    prepare(run.train)
    if run.layout.num_ranks == 1:
        os.environ |= {"WORLD_SIZE": "1", "RANK": "0", "MASTER_PORT": str(int(os.environ["MASTER_PORT"]) + 1 + int(os.environ["RANK"]))}
    dist.init_process_group("gloo")
    trainee, seconds = Trainee(run, sequences=SEQUENCES), []
    for _ in range(rounds + 1):
        dist.barrier()
        begin = time.perf_counter()
        trainee.step()
        trainee.built.parameters.finish_gathering()
        dist.barrier()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def measured(options: argparse.Namespace, layout: Layout) -> float:
    return statistics.mean(run_on_ranks(2, step_seconds, (run_of(options, layout), options.rounds), preload=("torch", "traffic")))


def planned(options: argparse.Namespace, layout: Layout, cluster: Cluster, software: Software) -> Estimate:
    setup = of_run(run_of(options, layout), software=software, batch_sequences=SEQUENCES, precision="bf16")
    return estimate(setup, replace(cluster, num_gpus=layout.num_ranks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256, help="width of the model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=8, help="its layers")
    parser.add_argument("--experts", type=int, default=16, help="its routed experts, a multiple of 8")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=7, help="steps that count, per layout")
    parser.add_argument("--only", default="", help="only layouts whose name has this in it")
    parser.add_argument("--cluster", type=Path, help="a cluster.toml that was measured before, or that shall be written")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    facts = circumstances()
    print(headline(facts))
    if options.cluster and options.cluster.exists():
        cluster = read(options.cluster)
    else:
        cluster = measured_cpu(2)
        if options.cluster:
            options.cluster.write_text(dumps(cluster))
    alone = generation("eager")
    one = measured(options, Layout())
    first = planned(options, Layout(), cluster, alone)
    software = replace(alone, pace=first.seconds / one)
    print(f"one device: measured {one:.3f} s, planned {first.seconds:.3f} s before the pace, {software.pace:.2f}")
    print(f"{'layout':34} measured   planned    error   the largest terms, s")
    rows: list[dict[str, Any]] = []
    for layout in (layout for layout in LAYOUTS if options.only in str(layout)):
        seconds, plan = measured(options, layout), planned(options, layout, cluster, software)
        error, step = plan.seconds / seconds - 1, asdict(plan.step)
        rows.append({"layout": str(layout), "measured": seconds, "planned": plan.seconds, "error": error, "terms": step})
        largest = sorted(step.items(), key=lambda term: -abs(term[1]))[:5]
        told = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in largest)
        print(f"{layout!s:34} {seconds:8.3f}  {plan.seconds:8.3f}   {error:+6.1%}   {told}", flush=True)
    mean = statistics.mean(abs(row["error"]) for row in rows)
    print(f"mean error {mean:.1%}, signed {statistics.mean(row['error'] for row in rows):+.1%}, {len(rows)} layouts")
    told_all = {"pace": software.pace, "one": one, "planned_one": asdict(first.step), "rows": rows, "mean_error": mean}
    write_json(options.json, facts, told_all | {"cluster": as_tree(cluster)})


if __name__ == "__main__":
    main()
