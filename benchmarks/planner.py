"""The planner against published runs: its errors by model, device, software and layout, beside a naive baseline.

    python benchmarks/planner.py [--runs FILE.csv] [--fit] [--leave-one-out] [--json FILE]

`published_runs.csv` holds 891 published runs with their sources; another file with the same columns is judged alike, with nothing fitted to
it. The planner's scalars are fitted (`--fit`) to a few dense runs: of each dense model, per generation of software and low or bf16
precision, the one run on fewest devices from 64 on. These runs are left out of every table. No mixture of experts is among
them. `--leave-one-out` fits again without each model in turn, and tells the error on that model.

The naive baseline gives every run the median share of peak of all other models on the same kind of device in the same precision. A plainer
one, the mean share of bf16's peak (whole attention) of all other runs on the device, dense ones and mixtures of experts apart, is told
for all runs together.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from startup import circumstances, headline, write_json

from quintet.plan.estimate import estimate, utilization
from quintet.plan.memory import rank_memory
from quintet.plan.published import Published, read
from quintet.plan.rehearse import rehearse
from quintet.plan.setup import of_run
from quintet.plan.software import GENERATIONS, generation
from quintet.plan.stages import blocks
from quintet.plan.step_time import step_time
from quintet.spec import parse
from quintet.spec.cluster import CATALOGUE, named

HERE = Path(__file__).parent
MANY = 64
"""Devices from which on the targets hold."""
WORST = 15
SHARED = ("moved", "tp_hidden", "p2p_hidden")
"""Scalars of `plan.software` that all generations share."""
DEVICES = {
    "hopper": ("H100", "H800", "H200", "H20"),
    "blackwell": ("GB200", "B200", "B300", "GB300"),
    "ampere": ("A100", "A100 40GB", "A800"),
    "cdna": ("MI300X", "MI325X", "MI355X"),
}
"""Devices whose sustained share goes with that of the first of them."""
STEPS = {"moved": 0.3, "tp_hidden": 0.2, "p2p_hidden": 0.2, "hopper": 0.05, "blackwell": 0.05}
MOVED = (1.0, 1.6, 2.4)
"""Starts of `moved`: the loss hardly depends on it while the others follow, so that one descent would stop anywhere between."""
START = {"moved": 1.5, "tp_hidden": 0.5, "p2p_hidden": 0.8, "hopper": 0.9, "blackwell": 0.75}
ROUNDS = 16

Scalars = Mapping[str, float]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=HERE / "published_runs.csv", help="a table of runs")
    parser.add_argument("--fit", action="store_true", help="fit the scalars and print them, beside those in use")
    parser.add_argument("--leave-one-out", action="store_true", help="fit again without each model in turn: some minutes")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    facts = circumstances()
    print(headline(facts))
    runs, left_out = read(given.runs)
    chosen = calibration(runs) if given.runs == HERE / "published_runs.csv" else []
    held_out = [run for run in runs if run not in chosen]
    print(f"{len(runs)} runs described, {len(chosen)} of them for calibration, {len(left_out)} left out:")
    for reason, number in Counter(reason for _, reason in left_out).most_common():
        print(f"  {number:4}  {reason}")
    told: dict[str, Any] = {
        "runs": len(runs),
        "calibration": [_name(run) for run in chosen],
        "left_out": dict(Counter(r for _, r in left_out)),
    }
    used = in_use()
    told["scalars"] = used
    if given.fit:
        fitted = fit(chosen, START)
        told["fitted"] = fitted
        print("\nscalar, in use, fitted")
        for name, value in fitted.items():
            print(f"  {name:30} {used[name]:8.3f} {value:8.3f}")
    told |= accuracy(held_out, runs)
    told["memory"] = memory_errors(runs)
    if given.leave_one_out:
        told["leave_one_out"] = leave_one_out(runs)
    told["deepseek"] = deepseek()
    write_json(given.json, facts, told)


# ----------------------------------------------------------------------------------------------- scalars


def in_use() -> dict[str, float]:
    """Every fitted scalar, as the package holds it."""
    plain = GENERATIONS["plain"]
    values = {name: float(getattr(plain, name)) for name in SHARED}
    values |= {device: sustained(names[0]) for device, names in DEVICES.items()}
    for name, software in GENERATIONS.items():
        if name not in ("plain", "eager", "deepseek"):
            values[f"pace {name}"] = software.pace
            values[f"low pace {name}"] = software.low_pace
    return values


def with_scalars(run: Published, scalars: Scalars) -> Published:
    own, plain = run.setup.software, GENERATIONS["plain"]
    shared: dict[str, Any] = {name: scalars[name] for name in SHARED if getattr(own, name) == getattr(plain, name)}
    software = replace(
        own,  # what a generation has of its own is not fitted
        **shared,
        pace=scalars.get(f"pace {run.family}", run.setup.software.pace),
        low_pace=scalars.get(f"low pace {run.family}", run.setup.software.low_pace),
    )
    device = device_of(run)
    gpu = run.cluster.gpu
    gpu = replace(gpu, sustained=gpu.sustained * scalars[device] / sustained(DEVICES[device][0]))
    return replace(run, setup=replace(run.setup, software=software), cluster=replace(run.cluster, gpu=gpu))


def sustained(name: str) -> float:
    """The share of a device of the catalogue."""
    return next(cluster.gpu.sustained for cluster in CATALOGUE.values() if cluster.gpu.name == name)


def device_of(run: Published) -> str:
    return next(name for name, gpus in DEVICES.items() if run.cluster.gpu.name in gpus)


def speed(run: Published) -> float:
    """Predicted tokens per second and device."""
    seconds = step_time(run.setup, run.cluster).step.total
    return run.setup.batch_sequences * run.setup.sequence_length / seconds / run.setup.layout.num_ranks


def error(run: Published) -> float:
    return speed(run) / run.tokens_per_second - 1


def calibration(runs: Sequence[Published]) -> list[Published]:
    """Few dense runs; see the file's head."""
    groups: dict[tuple[str, bool, str], list[Published]] = defaultdict(list)
    for run in runs:
        if not run.moe:
            groups[run.family, run.setup.precision != "bf16", _model(run)].append(run)
    chosen = []
    for found in groups.values():
        whole = [run for run in found if "proxy" not in run.row["model"]] or found
        large = [run for run in whole if run.setup.layout.num_ranks >= MANY] or whole
        chosen.append(min(large, key=lambda run: run.setup.layout.num_ranks))
    return chosen


def fit(chosen: Sequence[Published], start: Scalars, *, rounds: int = ROUNDS) -> dict[str, float]:
    """What all share, by coordinate descent on runs of recent systems on Hopper and in bf16 on Blackwell; then each pace by the median."""
    scalars = {**in_use(), **start}
    for name in scalars:
        if name.startswith(("pace", "low pace")):
            scalars[name] = 1.0
    recent = [r for r in chosen if re.match("nemo|bridge|maxtext", r.family)]
    hopper = [r for r in recent if device_of(r) == "hopper"]
    starts = [{**scalars, "moved": moved} for moved in MOVED]
    scalars = min((_descend(start, hopper, (*SHARED, "hopper"), rounds) for start in starts), key=lambda found: _loss(found, hopper))
    blackwell = [r for r in recent if device_of(r) == "blackwell"]
    scalars = _descend(scalars, [r for r in blackwell if r.setup.precision == "bf16"] or blackwell, ("blackwell",), rounds)
    for name in GENERATIONS:
        for prefix, low in (("pace", False), ("low pace", True)):
            own = [r for r in chosen if r.family == name and (r.setup.precision != "bf16") == low]
            for _ in range(4 if own else 0):
                off = statistics.median(speed(with_scalars(r, scalars)) / r.tokens_per_second for r in own)
                scalars[f"{prefix} {name}"] /= off
    return scalars


def _loss(tried: Scalars, runs: Sequence[Published]) -> float:
    return sum(abs(math.log(1 + error(with_scalars(run, tried)))) ** 1.5 for run in runs)


def _descend(scalars: dict[str, float], runs: Sequence[Published], names: Iterable[str], rounds: int) -> dict[str, float]:
    if not runs:
        return scalars
    steps, best = dict(STEPS), _loss(scalars, runs)
    for _ in range(rounds):
        for name in names:
            for sign in (1, -1):
                tried = {**scalars, name: scalars[name] + sign * steps[name]}
                if not 0.01 <= tried[name] <= (1 if "hidden" in name else 5):
                    continue
                if (found := _loss(tried, runs)) < best:
                    best, scalars = found, tried
                    break
            else:
                steps[name] *= 0.6
    return scalars


# ----------------------------------------------------------------------------------------------- tables


def accuracy(runs: Sequence[Published], every: Sequence[Published]) -> dict[str, Any]:
    errors = {id(run): error(run) for run in runs}
    naive = {id(run): _naive(run, every) for run in runs}
    told: dict[str, Any] = {"plain_naive": plain_naive(runs, errors, every)}
    many = [run for run in runs if run.setup.layout.num_ranks >= MANY]

    def table(title: str, key: Callable[[Published], str], chosen: Sequence[Published]) -> None:
        print(f"\n{title:44} runs   mean |error|   signed   naive")
        groups: dict[str, list[Published]] = defaultdict(list)
        for run in chosen:
            groups[key(run)].append(run)
        told[title] = {}
        for name, found in sorted(groups.items()):
            own, rough = [errors[id(r)] for r in found], [abs(naive[id(r)]) for r in found]
            row = {"runs": len(found), "mean": _mean(map(abs, own)), "signed": _mean(own), "naive": _mean(rough)}
            told[title][name] = row
            print(f"  {name:42} {row['runs']:4}   {row['mean']:12.1%}   {row['signed']:+6.1%}   {row['naive']:5.1%}")

    table("all held-out runs", lambda r: f"{_kind(r)}, {_size(r)}", runs)
    table("64 devices and more, by software", lambda r: f"{r.family}, {_kind(r)}", many)
    table("64 devices and more, by device", lambda r: f"{r.cluster.gpu.name}, {r.setup.precision}", many)
    table("64 devices and more, by model", lambda r: f"{_model(r)}, {_kind(r)}", many)
    table("64 devices and more, by layout", _layout_family, many)
    print("\nthe worst")
    worst = sorted(many, key=lambda r: -abs(errors[id(r)]))[:WORST]
    told["worst"] = [{"run": _name(r), "error": errors[id(r)]} for r in worst]
    for run in worst:
        print(f"  {errors[id(run)]:+7.1%}  {_name(run)}")
    return told


def _naive(run: Published, every: Sequence[Published]) -> float:
    """The error of the median share of peak on the same device and precision, of all other models."""
    like = [r for r in every if r.cluster.gpu.name == run.cluster.gpu.name and r.setup.precision == run.setup.precision]
    others = [r for r in like if _model(r) != _model(run)] or like
    share = statistics.median(_rate(r) for r in others)
    return share / _rate(run) - 1


def plain_naive(runs: Sequence[Published], errors: Mapping[int, float], every: Sequence[Published]) -> dict[str, float]:
    """Mean errors over all runs of any size: of the mean share of bf16's peak of all other runs of the same kind on the device; of ours."""

    def share(run: Published) -> float:
        setup = run.setup
        flops = setup.architecture.flops_per_token(sequence_length=setup.sequence_length, mtp=setup.mtp, causal=False)
        return run.tokens_per_second * flops / run.cluster.gpu.peak.bf16

    shares = {id(run): share(run) for run in every}
    groups: dict[tuple[str, bool], list[Published]] = defaultdict(list)
    for run in every:
        groups[run.cluster.gpu.name, run.moe].append(run)

    def off(run: Published) -> float:
        others = [other for other in groups[run.cluster.gpu.name, run.moe] if other is not run] or [run]
        return abs(_mean(shares[id(other)] for other in others) / shares[id(run)] - 1)

    found = {
        "naive": _mean(map(off, every)),
        "naive_moe": _mean(off(run) for run in every if run.moe),
        "ours": _mean(abs(errors[id(run)]) for run in runs),
        "ours_moe": _mean(abs(errors[id(run)]) for run in runs if run.moe),
    }
    print(f"\nplain baseline, all {len(every)} runs: {found['naive']:.1%}, mixtures of experts {found['naive_moe']:.1%}; ", end="")
    print(f"planned, held-out runs: {found['ours']:.1%}, {found['ours_moe']:.1%}")
    return found


def _rate(run: Published) -> float:
    flops = run.setup.architecture.flops_per_token(sequence_length=run.setup.sequence_length, mtp=run.setup.mtp)
    return run.tokens_per_second * flops


def leave_one_out(runs: Sequence[Published]) -> dict[str, Any]:
    """Every scalar fitted again without a model, and the error on all its runs of 64 devices and more."""
    print("\nwithout the model in the fit                 runs   mean |error|   signed")
    told: dict[str, Any] = {}
    every: list[float] = []
    kinds: list[bool] = []
    for model in sorted({_model(run) for run in runs}):
        own = [r for r in runs if _model(r) == model and r.setup.layout.num_ranks >= MANY]
        if not own:
            continue
        scalars = fit(calibration([r for r in runs if _model(r) != model]), START, rounds=8)
        errors = [error(with_scalars(r, scalars)) for r in own]
        every += errors
        kinds += [own[0].moe] * len(errors)
        told[model] = {"runs": len(own), "mean": _mean(map(abs, errors)), "signed": _mean(errors)}
        print(f"  {model:42} {len(own):4}   {told[model]['mean']:12.1%}   {told[model]['signed']:+6.1%}", flush=True)
    for kind, moe in (("all dense models", False), ("all mixtures of experts", True)):
        errors = [error for error, is_moe in zip(every, kinds, strict=True) if is_moe == moe]
        told[kind] = {"runs": len(errors), "mean": _mean(map(abs, errors)), "signed": _mean(errors)}
        print(f"  {kind:42} {len(errors):4}   {told[kind]['mean']:12.1%}   {told[kind]['signed']:+6.1%}")
    return told


def memory_errors(runs: Sequence[Published]) -> dict[str, Any]:
    """Published memory of the fullest rank against the prediction: what is counted, and with margins for framework and fragmentation."""
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for run in runs:
        if text := run.row.get("memory_gb"):
            unit = 2**30 if re.search("GiB", run.row["overlap_notes"]) else 1e9
            fullest = max(rank_memory(run.setup, step_time(run.setup, run.cluster).parts), key=lambda rank: rank.total)
            published = float(text) * unit
            counted = fullest.total - fullest.framework - fullest.fragmentation
            groups[run.family].append((counted / published - 1, fullest.total / published - 1))
    print("\nmemory of the fullest rank                   runs   counted: mean |error|   signed   with margins   signed")
    told = {}
    for name, errors in sorted(groups.items()):
        counted, margins = zip(*errors, strict=True)
        told[name] = {
            "runs": len(errors),
            "counted": {"mean": _mean(map(abs, counted)), "signed": _mean(counted)},
            "with_margins": {"mean": _mean(map(abs, margins)), "signed": _mean(margins)},
        }
        both = "   ".join(f"{_mean(map(abs, one)):12.1%}   {_mean(one):+6.1%}" for one in (counted, margins))
        print(f"  {name:42} {len(errors):4}            {both}")
    return told


def deepseek() -> dict[str, Any]:
    """V3's own anatomy (arXiv 2505.09343, table 4; arXiv 2412.19437; github.com/deepseek-ai/profile-data) beside the plan's."""
    run = parse.read(HERE.parent / "recipes" / "v3-671b.toml")
    run = replace(run, layout=replace(run.layout, schedule="dualpipe"))
    setup = replace(of_run(run, software=generation("deepseek"), batch_sequences=15360, precision="fp8"), moments_bytes=2)
    found = estimate(setup, named("h800", num_gpus=2048))
    simulated, used = rehearse(found), utilization(found)
    balanced = replace(setup, software=replace(setup.software, imbalance=0.0))  # as the trace was taken
    block = blocks(balanced, found.cluster, paired=True).moe
    compute = 4 * (block.compute_forward + block.compute_input + block.compute_weight)
    anatomy = simulated.anatomy
    rows = [
        ("step, s", 19.926, found.seconds),
        ("step with the pipeline simulated, s", 19.926, found.seconds - found.timed.pipeline.total + simulated.makespan),
        ("forwards alone (1F), s", 1.13, anatomy["F"]),
        ("backwards alone (1B), s", 1.99, anatomy["B"] + anatomy["I"]),
        ("weight gradients alone (1W), s", 0.48, anatomy["W"]),
        ("overlapped pairs (1F1B), s", 13.95, anatomy["FB"]),
        ("bubble, s", 2.06, anatomy["bubble"]),
        ("optimizer, s", 0.29, found.step.optimizer + found.step.gradients + found.step.weights),
        ("TFLOP/s causal", 385.0, used.tflops_causal),
        ("TFLOP/s whole attention", 432.0, used.tflops_full),
        ("MFU causal, %", 38.94, 100 * used.mfu_causal),
        ("device-hours per 1T tokens, thousand", 180.0, 1e12 / found.tokens_per_second / 3600 / 1e3),
        ("work of a pair of 4 + 4 layers, ms (calibrated)", 118.2, 1e3 * compute),
        ("its all-to-alls, ms (calibrated)", 80.4, 1e3 * 8 * block.all_to_all),
        ("the pair, ms (calibrated)", 129.0, 1e3 * estimate(balanced, found.cluster).timed.pipeline.pair),
        ("a pair of the step, routed unevenly, ms", 139.0, 1e3 * found.timed.pipeline.pair),
    ]
    print("\nDeepSeek-V3 on 2,048 H800                        published   planned")
    for name, published, planned in rows:
        print(f"  {name:46} {published:9.2f} {planned:9.2f}   {planned / published - 1:+.1%}")
    return {name: {"published": published, "planned": planned} for name, published, planned in rows}


def _mean(values: Iterable[float]) -> float:
    return statistics.mean(values)


def _kind(run: Published) -> str:
    return "mixture of experts" if run.moe else "dense"


def _size(run: Published) -> str:
    return f"{MANY} devices and more" if run.setup.layout.num_ranks >= MANY else "fewer devices"


def _model(run: Published) -> str:
    return re.sub(r" proxy.*", "", run.row["model"])


def _layout_family(run: Published) -> str:
    layout = run.setup.layout
    if layout.zero == 3 and layout.pp == 1 and layout.tp == 1:
        return "sharded data parallel"
    axes = [axis for axis, degree in (("tp", layout.tp), ("pp", layout.pp), ("cp", layout.cp), ("ep", layout.ep)) if degree > 1]
    return " + ".join(axes) or "data parallel"


def _name(run: Published) -> str:
    setup, row = run.setup, run.row
    source = re.sub(r"NVIDIA |Megatron-|dgxc-|performance summary |benchmarks?(ing)? ?", "", row["source"])[:32]
    policy = f"{setup.precision}, recompute {setup.recompute}"
    return f"{source}: {row['model']} on {row['num_gpus']} {row['gpu']}, {setup.layout}, {policy}"


if __name__ == "__main__":
    main()
