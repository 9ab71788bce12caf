"""The planner's memory against what is really allocated: states on the meta device at any size, activations on this machine's CPU.

    python benchmarks/plan_memory.py [--only TEXT] [--json FILE]

States: weights, gradients, master weights and moments of the first, a middle and the last rank of a pipeline, built as training builds
them, on the meta device. Activations: small models go through one step on gloo ranks, and torch's profiler tells what is allocated between
the step's begin and the first backward of each rank: all micro-batches that the rank then has in flight. The mean over ranks that hold the
same is compared, since experts are not chosen equally often. (V-shaped schedules and DualPipe keep most of all later, and are left out of
the second table.) Element-wise functions are cut as Inductor cuts them. A state that is more than 2 % off, or activations more than 10 %,
end the script with an error.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from startup import circumstances, headline, write_json
from traffic import Trainee

import quintet.train.build as building
from quintet.errors import RankError
from quintet.launch.local import run_on_ranks
from quintet.ops.pointwise import REFERENCE, Kernels
from quintet.parallel.pipeline import Pipeline
from quintet.plan.estimate import estimate
from quintet.plan.memory import RankMemory, rank_memory
from quintet.plan.setup import Setup, of_run
from quintet.plan.software import generation
from quintet.plan.step_time import step_time
from quintet.spec import parse
from quintet.spec.cluster import named
from quintet.spec.layout import Layout
from quintet.spec.run import Run
from quintet.train.survey import survey

RECIPES = Path(__file__).parent.parent / "recipes"
STATES = ("weights", "gradients", "master_weights", "moments")
STATE_CASES: tuple[tuple[str, Layout, dict[str, Any]], ...] = (
    ("v3-16b", Layout(dp=8, ep=8, zero=1), {}),
    ("v3-16b", Layout(dp=8, zero=3), {}),
    ("v3-16b", Layout(dp=4, tp=2, ep=2, zero=2), {}),
    ("v3-16b", Layout(dp=2, tp=2, cp=2, ep=4, expert_tp=2, zero=1), {}),
    ("v3-16b", Layout(pp=4, dp=2, ep=2, zero=1, schedule="1f1b"), {}),
    ("v3-16b", Layout(pp=4, dp=2, ep=2, zero=1, schedule="1f1b"), {"tie_embeddings": True, "num_mtp_modules": 0}),
    ("v3-16b", Layout(pp=4, dp=2, ep=2, zero=1, schedule="interleaved", chunks=2), {}),
    ("v3-16b", Layout(pp=2, dp=4, tp=2, ep=4, zero=1, schedule="zbv"), {}),
    ("v3-16b", Layout(pp=4, dp=2, ep=2, zero=1, schedule="dualpipe"), {}),
    ("v3-16b", Layout(pp=4, dp=2, ep=2, schedule="dualpipev"), {"num_mtp_modules": 2}),
    ("v3-671b", Layout(pp=16, dp=128, ep=64, zero=1, schedule="dualpipe"), {}),
    ("v3-671b", Layout(pp=16, dp=16, tp=8, ep=16, zero=1, schedule="1f1b"), {}),
)
ACTIVATION_CASES: tuple[tuple[Layout, str], ...] = (
    (Layout(), "none"),
    (Layout(), "selective"),
    (Layout(), "full"),
    (Layout(tp=2), "none"),
    (Layout(cp=2), "none"),
    (Layout(dp=2, ep=2, zero=1), "none"),
    (Layout(dp=2, zero=3), "selective"),
    (Layout(pp=2, schedule="1f1b"), "none"),
    (Layout(pp=2, schedule="gpipe"), "selective"),
    (Layout(pp=2, schedule="zb1p"), "none"),
    (Layout(pp=2, schedule="interleaved"), "none"),
    (Layout(pp=4, schedule="1f1b"), "none"),
    (Layout(pp=2, dp=2, ep=2, zero=1, schedule="1f1b"), "none"),
)
SEQUENCES = 8
TRIES = 2


def states() -> list[dict[str, Any]]:
    rows = []
    for name, layout, changes in STATE_CASES:
        run = parse.read(RECIPES / f"{name}.toml")
        run = replace(run, model=replace(run.model, **changes), layout=layout)
        setup = of_run(run, software=generation("deepseek"), batch_sequences=4096, precision="bf16")
        planned = estimate(setup, named("h100", num_gpus=layout.num_ranks)).memory
        for place in sorted({0, layout.pp // 2, layout.pp - 1}):
            built = survey(run, place * layout.num_ranks // layout.pp).bytes
            held = dict(zip(STATES, (built.weights, built.gradients, built.master, built.moments), strict=True))
            errors = {part: getattr(planned[place], part) / held[part] - 1 for part in STATES}
            rows.append({"model": name, "changes": changes, "layout": str(layout), "place": place, "built": held, "errors": errors})
    return rows


def small(layout: Layout, recompute: Any) -> Run:
    """The laptop recipe with 8 layers and longer sequences, so that activations are more than a few allocations."""
    base = parse.read(RECIPES / "laptop.toml")
    model = replace(base.model, num_layers=8, num_routed_experts=16, num_mtp_modules=1)
    train = replace(base.train, micro_batch=1, precision="bf16", compile=False, device="cpu", recompute=recompute, loss_chunk=64)
    return replace(base, model=model, phases=(replace(base.phases[0], sequence_length=512),), train=train, layout=layout)


def setup_of(run: Run) -> Setup:
    return of_run(run, software=generation("eager"), batch_sequences=SEQUENCES, precision="bf16")


def kept(run: Run) -> int:
    """Bytes that this rank, which `run_on_ranks` started, has allocated in a step when its first backward begins."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch._dynamo.config.recompile_limit = 64
    whole: Any = {"backend": "aot_eager_decomp_partition", "dynamic": False, "fullgraph": True}
    fused = Kernels(*(torch.compile(getattr(REFERENCE, name), **whole) for name in Kernels.__dataclass_fields__))
    building.kernels = lambda run, device, on_message: fused  # type: ignore[assignment]
    trainee = Trainee(run, sequences=SEQUENCES)
    trainee.step()
    found = [_until_backward(trainee) for _ in range(2)]
    dist.barrier()
    return min(found)  # a message that a thread of gloo is the last to hold is freed unseen


def _until_backward(trainee: Trainee) -> int:
    """Bytes that a step allocates and keeps until the first backward, of a loss, or in a pipeline of a stage."""
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    whole, stage, pair = torch.Tensor.backward, Pipeline._backward, Pipeline._pair
    running = True

    def ending(of: Any) -> Any:
        def ended(*arguments: Any, **more: Any) -> Any:
            nonlocal running
            if running:
                profile.stop()
                running = False
            return of(*arguments, **more)

        return ended

    torch.Tensor.backward, Pipeline._backward, Pipeline._pair = ending(whole), ending(stage), ending(pair)  # type: ignore[method-assign]
    profile.start()
    trainee.step()
    torch.Tensor.backward, Pipeline._backward, Pipeline._pair = whole, stage, pair  # type: ignore[method-assign]
    assert profile.profiler and profile.profiler.kineto_results
    return sum(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")


def measured(run: Run) -> list[int] | None:
    """`kept` of every rank. torch's profiler often crashes beside gloo's threads; then the ranks begin anew, and after some tries there is
    nothing to tell of this layout."""
    for _ in range(TRIES):
        try:
            return run_on_ranks(run.layout.num_ranks, kept, (run,), preload=("torch", "traffic"))
        except RankError as error:
            print(f"{run.layout}: {error}", file=sys.stderr)
    return None


def activations(only: str) -> list[dict[str, Any]]:
    rows = []
    for layout, recompute in (case for case in ACTIVATION_CASES if only in f"{case[0]} {case[1]}"):
        run = small(layout, recompute)
        held = measured(run)
        if held is None:
            print(f"  {layout!s:34} {recompute:10}   not measured: torch's profiler crashed", flush=True)
            rows.append({"layout": str(layout), "recompute": recompute, "error": None})
            continue
        setup = setup_of(run)
        planned = rank_memory(setup, step_time(setup, named("h100", num_gpus=layout.num_ranks)).parts, device="cpu")
        stride = layout.num_ranks // layout.pp
        for place in range(layout.pp):
            mean = statistics.mean(held[place * stride : (place + 1) * stride])
            foretold = planned[place].activations + _head_gradients(setup, planned[place])
            error, name = foretold / mean - 1, f"  {layout!s:34} {recompute:10} {place:5}"
            row = {"layout": str(layout), "recompute": recompute, "place": place, "measured": mean, "planned": foretold}
            rows.append(row | {"error": error})
            print(f"{name} {mean / 2**20:10.1f} {foretold / 2**20:9.1f}   {error:+6.1%}", flush=True)
    return rows


def _head_gradients(setup: Setup, planned: RankMemory) -> float:
    """The head's gradient of each loss, which forward leaves for backward; the plan counts it with the logits."""
    if not planned.logits:
        return 0.0
    a = setup.architecture
    in_flight = 1 if setup.layout.pp == 1 or setup.schedule != "gpipe" else setup.num_microbatches
    return in_flight * (1 + setup.num_mtp) * 2 * a.vocab_size * a.hidden_size / setup.layout.tp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only activations of layouts whose name has this in it")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args()
    facts = circumstances("torch")
    print(headline(facts))
    print("\nactivations, MiB                   recompute  place    measured  planned    error")
    kept_rows = activations(given.only)
    errors = [abs(row["error"]) for row in kept_rows if row["error"] is not None]
    print(f"mean {statistics.mean(errors):.1%}, worst {max(errors):.1%} of {len(errors)} ranks")
    print("\nstates, planned against built                 place   " + "".join(f"{part.replace('_', ' '):>16}" for part in STATES))
    held = states()
    for row in held:
        deviations = "".join(f"{row['errors'][part]:+16.2%}" for part in STATES)
        print(f"  {row['model']:9} {row['layout']:36} {row['place']:3}   {deviations}")
    worst = max(abs(error) for row in held for error in row["errors"].values())
    print(f"worst {worst:.2%} of {len(held)} ranks")
    write_json(given.json, facts, {"states": held, "activations": kept_rows})
    if worst > 0.02 or max(errors) > 0.10:
        sys.exit("beyond 2 % of states or 10 % of activations")


if __name__ == "__main__":
    main()
