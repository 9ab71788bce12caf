"""Planned steps against measured ones on this machine, for layouts of two ranks that have one core each, pipelines among them.

    python benchmarks/plan_here.py [--hidden 256] [--layers 8] [--length 256] [--rounds 5] [--json FILE]

The machine is measured as `quintet doctor --cluster` does, with one thread. One scalar, the pace of our software on this machine, is set
by the step of one device; every other layout is then planned and measured (the median of `--rounds` steps on gloo ranks, one process
each). It wants two quiet cores.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from startup import circumstances, headline, write_json
from traffic import Trainee

from quintet.cli.doctor import message_link
from quintet.launch.local import run_on_ranks
from quintet.plan.estimate import estimate
from quintet.plan.setup import of_run
from quintet.plan.software import Software
from quintet.spec import parse
from quintet.spec.cluster import Cluster, Link
from quintet.spec.layout import Layout
from quintet.spec.run import Run
from quintet.train.measure import measured_cluster

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
        num_mtp_modules=0,
        max_context=max(base.model.max_context, options.length),
    )
    phase = replace(base.phases[0], sequence_length=options.length)
    train = replace(base.train, micro_batch=2, precision="bf16", compile=False, device="cpu", recompute="none")
    return replace(base, model=model, phases=(phase,), train=train, layout=replace(layout, node_size=8))


def step_seconds(run: Run, rounds: int) -> float:
    """The median step of this rank, as `run_on_ranks` started it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    trainee, seconds = Trainee(run, sequences=SEQUENCES), []
    for _ in range(rounds + 1):
        dist.barrier()
        begin = time.perf_counter()
        trainee.step()
        trainee.built.parameters.finish_gathering()
        dist.barrier()
        seconds.append(time.perf_counter() - begin)
    dist.destroy_process_group()
    return statistics.median(seconds[1:])


def measured(options: argparse.Namespace, layout: Layout) -> float:
    run = run_of(options, layout)
    return max(run_on_ranks(layout.num_ranks, step_seconds, (run, options.rounds), preload=("torch", "traffic")))


def planned(options: argparse.Namespace, layout: Layout, cluster: Cluster, software: Software) -> float:
    setup = of_run(run_of(options, layout), software=software, batch_sequences=SEQUENCES, precision="bf16")
    return estimate(setup, replace(cluster, num_gpus=layout.num_ranks)).seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256, help="width of the model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=8, help="its layers")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=5, help="steps that count, per layout")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    facts = circumstances()
    print(headline(facts))
    torch.set_num_threads(1)
    link: Link = message_link()
    cluster = measured_cluster(torch.device("cpu"), name="cpu", memory_bytes=8e9, num_devices=2)
    cluster = replace(cluster, domain=2, link=link, network=link)
    # Nothing runs beside anything on one core; launching is part of the pace.
    alone = Software(
        name="here", launch=0.0, waits_for_host=False, tp_hidden=0.0, zero_hidden=0.0, p2p_hidden=0.0, straggle=0.0, memory=1.0
    )
    one = measured(options, Layout())
    software = replace(alone, pace=planned(options, Layout(), cluster, alone) / one)
    print(
        f"one device {one:.3f} s, pace {software.pace:.2f}; bf16 {cluster.gpu.peak.bf16 / 1e9:.0f} GFLOP/s, messages "
        f"{link.effective / 1e9:.2f} GB/s"
    )
    print(f"{'layout':34} measured   planned    error")
    rows: list[dict[str, Any]] = []
    for layout in LAYOUTS:
        seconds, plan = measured(options, layout), planned(options, layout, cluster, software)
        rows.append({"layout": str(layout), "measured": seconds, "planned": plan, "error": plan / seconds - 1})
        print(f"{layout!s:34} {seconds:8.3f}  {plan:8.3f}   {plan / seconds - 1:+6.1%}", flush=True)
    mean = statistics.mean(abs(row["error"]) for row in rows)
    print(f"mean error {mean:.1%}")
    write_json(options.json, facts, {"pace": software.pace, "one": one, "rows": rows, "mean_error": mean})


if __name__ == "__main__":
    main()
