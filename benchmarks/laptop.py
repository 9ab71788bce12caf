"""The yardstick of `make train`: what the same minutes on the same cores yield with Quintet and with a plain transformers loop.

    python benchmarks/laptop.py [--minutes 5 | --steps 600] [--cores 2] [--peer-learning-rate 2e-3] [--json FILE]

First `quintet train RECIPE` runs as a user would start it, cold (no compiled kernels); then the peer gets exactly the same wall time.
The peer is DeepseekV3ForCausalLM with about 11 M parameters from random weights: bf16 autocast, grouped_mm experts (the best eager
setting), equal head widths (so that its attention is fused), fused AdamW and clipping. Both read the same rows of the same prepared data
in the same order. Over its own time the peer follows the recipe's curves of batch size and learning rate, the latter scaled to a peak
of its own; `--peer-batch` gives it a constant batch.

Time is the wall time since the process was launched, imports and compilation included, evaluations left out: both clocks stand
still meanwhile. Held-out loss is measured by one function (`quintet.train.held_out`) on the same held-out sequences, at the same wall
times. `--minutes` finds the recipe's number of steps from a short trial run; `--steps` sets it, and the peer gets the time that it took.

Writes the result as JSON, beside it the plot as PNG and SVG, and samples of both into the JSON. `--only peer` runs the peer alone, once
for each learning rate, and writes nothing unless `--json` is given; with `--steps` all make the same number, whatever else the machine
does: for choosing the learning rate.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from startup import QUINTET, ROOT, circumstances, headline, write_json

from quintet.cost.flops import parameters
from quintet.spec import parse
from quintet.spec.curriculum import PhaseCurves, curriculum
from quintet.spec.run import Run

if TYPE_CHECKING:
    import torch

    from quintet.model.transformer import Output, Transformer

RESULT = ROOT / "benchmarks/results/laptop.json"
PEER_SHAPE: dict[str, Any] = dict(
    hidden_size=256,
    num_hidden_layers=6,
    first_k_dense_replace=1,
    intermediate_size=768,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=128,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=32,
    v_head_dim=64,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    moe_intermediate_size=208,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=1.0,
    initializer_range=0.02,
)
"""With a vocabulary of 4,096: 11.0 M parameters."""
TRIAL_STEPS, TRIAL_PARTS = 60, 10


@dataclass(frozen=True, kw_only=True)
class Point:
    """Held-out loss at one time."""

    minutes: float
    """Wall time since the process was launched, evaluations left out."""
    step: int
    tokens: int
    """Tokens trained on."""
    nats: dict[str, float]
    """Nats per token by source."""
    bits: dict[str, float]
    """Bits per byte of text by source."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """One contestant's way through its time."""

    name: str
    num_parameters: int
    startup_seconds: float
    """From launch to the first step: imports, opening the data, building the model."""
    first_step_seconds: float
    """The first step, which compiles."""
    step_seconds: float
    """Median of the later steps."""
    tokens_per_second: float
    """Of the later steps together."""
    steps: int
    training: list[tuple[float, float]]
    """(minutes, loss of the training batch in nats per token) of each step."""
    held_out: list[Point]
    samples: dict[str, str]
    """Prompt -> its continuation."""


def main() -> None:
    """Measure, print the table, write result and plot."""
    given = arguments()
    if given.worker:
        return peer(given)
    if hasattr(os, "sched_setaffinity"):  # for this process and all that it starts
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.cores])
    facts = circumstances("torch", "transformers", "matplotlib")
    run = parse.read(Path(given.recipe))
    if len(run.phases) != 1 or run.data.document_mask:
        sys.exit("the peer knows one phase and no document mask; give a recipe of one phase with data.document_mask = false")
    name = Path(given.recipe).name
    with tempfile.TemporaryDirectory() as folder:
        given.recipe = shutil.copy(given.recipe, folder)  # what changes in the meantime does not count
        tell("preparing data")
        execute([QUINTET, "prepare", given.recipe], log=Path(folder, "prepare.log"), cores=given.cores)
        courses = measure(given, Path(folder), run)
    domains: dict[str, str] = {source.name: source.domain for source in run.data.sources}
    result = {
        "recipe": {"file": name, "text": parse.dumps(run)},
        "peer": {**PEER_SHAPE, "learning_rate": given.peer_learning_rate, "batch": given.peer_batch},
        "cores_used": given.cores,
        "domains": domains,
        "courses": {name: asdict(course) for name, course in courses.items()},
        "verdict": verdict(courses),
    }
    show(courses, facts=facts, domains=domains, cores=given.cores, verdict=result["verdict"])
    if given.json:
        write_json(given.json, facts, result)
        plot(courses, given.json, title=f"{facts['processor']}, {given.cores} core(s), {facts['date'][:10]}, commit {facts['commit']}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=5.0, help="wall time of each, start-up included (default 5)")
    length.add_argument("--steps", type=int, help="optimizer steps of Quintet instead; the peer gets the time that they took")
    parser.add_argument("--cores", type=int, default=2, help="cores, and threads, of each (default 2)")
    parser.add_argument("--recipe", default=str(ROOT / "recipes/laptop.toml"))
    parser.add_argument("--points", type=int, default=10, help="evaluations along the way, about (default 10)")
    parser.add_argument("--peer-learning-rate", type=float, nargs="+", default=[2e-3], help="its peak; several with --only peer")
    parser.add_argument("--peer-batch", type=int, help="sequences of each of its batches; absent: the recipe's curve")
    parser.add_argument("--only", choices=("peer",), help="run no Quintet: for choosing the peer's learning rate")
    parser.add_argument("--json", type=Path, help=f"where the result goes (default {RESULT.relative_to(ROOT)}), the plot beside it")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--since", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--at", type=float, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--by-steps", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.only and len(given.peer_learning_rate) > 1:
        parser.error("several --peer-learning-rate need --only peer")
    if not given.only and not given.worker:
        given.json = given.json or RESULT
    return given


def measure(given: argparse.Namespace, folder: Path, run: Run) -> dict[str, Course]:
    """Quintet, then the peer for the same time; or peers alone, one per learning rate."""
    if given.only:
        times = [(given.steps or given.minutes * 60) * (i + 1) / given.points for i in range(given.points)]
        names = [f"transformers at {rate:g}" for rate in given.peer_learning_rate]
        return {name: peer_course(given, folder, name, rate, times) for name, rate in zip(names, given.peer_learning_rate, strict=True)}
    steps = given.steps or steps_within(given.minutes * 60, given, folder, run)
    ours = quintet_course(given, folder, run, steps=steps)
    theirs = peer_course(given, folder, "transformers", given.peer_learning_rate[0], [point.minutes * 60 for point in ours.held_out])
    return {"quintet": ours, "transformers": theirs}


def steps_within(seconds: float, given: argparse.Namespace, folder: Path, run: Run) -> int:
    """Optimizer steps that Quintet makes in so many seconds from launch, by a short trial run."""
    tell(f"trial run of {TRIAL_STEPS} steps")
    course = quintet_training(given, folder, run, name="trial", steps=TRIAL_STEPS, points=1)
    times = [60 * minutes for minutes, _ in course.training]
    step = steady([later - earlier for earlier, later in pairwise(times)], TRIAL_PARTS)
    once = times[-1] - step * (len(times) - 1)  # start-up and compilation
    return max(2, 1 + math.floor((seconds - once) / step))


def steady(seconds: Sequence[float], parts: int) -> float:
    """Mean seconds of a step, compilation left out: the mean of the medians of `parts` parts, as batch and losses change on the way."""
    bounds = [len(seconds) * i // parts for i in range(parts + 1)]
    return statistics.mean(statistics.median(seconds[begin:end]) for begin, end in pairwise(bounds))


def quintet_course(given: argparse.Namespace, folder: Path, run: Run, *, steps: int) -> Course:
    """Train with `quintet train`, then let it write."""
    tell(f"quintet train: {steps} steps")
    course = quintet_training(given, folder, run, name="quintet", steps=steps, points=given.points)
    for prompt in run.monitor.prompts:
        command = [QUINTET, "generate", str(folder / "quintet"), "--prompt", prompt, "--tokens", str(run.monitor.sample_tokens)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        course.samples[prompt] = text.removeprefix(prompt)
    return course


def quintet_training(given: argparse.Namespace, folder: Path, run: Run, *, name: str, steps: int, points: int) -> Course:
    """One `quintet train` of the recipe, with nothing compiled before."""
    every = max(1, round(steps / points))
    options = {"name": name, "directory": folder, "train.steps": steps, "evaluation.every": every, "monitor.every": 1}
    command = [QUINTET, "train", given.recipe, *(word for key, value in options.items() for word in (f"--{key}", str(value)))]
    metrics = folder / name / "metrics.jsonl"
    first = follow(command, metrics, log=folder / f"{name}.log", cores=given.cores, cache=folder / f"{name}-compiled")
    return course_of(metrics, first, name=name, num_parameters=parameters(run.model).total_with_mtp)


def peer_course(given: argparse.Namespace, folder: Path, name: str, rate: float, times: Sequence[float]) -> Course:
    """Run this file as the peer, which evaluates at `times` (seconds since launch; alone, with --steps: steps) and ends at the last."""
    by_steps = bool(given.only and given.steps)
    tell(f"{name}: {given.steps} steps" if by_steps else f"{name}: {times[-1] / 60:.2f} minutes")
    where = folder / name
    where.mkdir()
    words = [__file__, "--worker", str(where), "--recipe", given.recipe, "--cores", str(given.cores), "--peer-learning-rate", str(rate)]
    words += [*(["--by-steps"] if by_steps else []), *(["--peer-batch", str(given.peer_batch)] if given.peer_batch else [])]
    command = [sys.executable, *words, "--at", *map(str, times), "--since", str(time.time())]
    first = follow(command, where / "metrics.jsonl", log=folder / f"{name}.log", cores=given.cores, cache=folder / f"{name}-compiled")
    extra = json.loads((where / "extra.json").read_text())
    return course_of(where / "metrics.jsonl", first, name=name, **extra)


def follow(command: Sequence[str], metrics: Path, *, log: Path, cores: int, cache: Path) -> float:
    """Run `command` to its end; returns the seconds from launch until the record of its first step stood in `metrics`."""
    begin = time.perf_counter()
    with started(command, log=log, cores=cores, cache=cache) as process:
        while process.poll() is None and not (metrics.exists() and '"record"' in metrics.read_text()):
            time.sleep(0.02)
        first = time.perf_counter() - begin
    return first


def execute(command: Sequence[str], *, log: Path, cores: int) -> None:
    """Run `command` to its end."""
    with started(command, log=log, cores=cores):
        pass


@contextmanager
def started(command: Sequence[str], *, log: Path, cores: int, cache: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process, awaited at the end of the block; its output goes to `log`. Exits with the output's tail if it fails."""
    # `quintet` lets waiting threads sleep, without which a busy machine slows a step many times: the peer gets the same.
    environment = {"GOMP_SPINCOUNT": "2000", **os.environ, "OMP_NUM_THREADS": str(cores), "MKL_NUM_THREADS": str(cores)}
    if cache is not None:
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment) as process:
        yield process
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        sys.exit(f"{tail}\n{' '.join(command)}\nended with {process.returncode}")


def course_of(metrics: Path, first: float, *, name: str, num_parameters: int, samples: dict[str, str] | None = None) -> Course:
    """Read metrics.jsonl; its `seconds` leave pauses out, and `first` ties them to the launch."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    records = [line for line in lines if line["kind"] == "record"]
    minutes: dict[int, float] = {}
    now = first - records[0]["seconds"]
    for record in records:
        now += record["seconds"]
        minutes[record["step"]] = now / 60
    tokens = {record["step"]: record["tokens"] for record in records}
    held_out = {line["step"]: line for line in lines if line["kind"] == "evaluated"}
    return Course(
        name=name,
        num_parameters=num_parameters,
        startup_seconds=first - records[0]["seconds"],
        first_step_seconds=records[0]["seconds"],
        step_seconds=statistics.median(record["seconds"] for record in records[1:] or records),
        tokens_per_second=(records[-1]["tokens"] - records[0]["tokens"]) / max(sum(r["seconds"] for r in records[1:]), 1e-9),
        steps=len(records),
        training=[(round(minutes[r["step"]], 5), round(r["main_loss"], 4)) for r in records],
        held_out=[
            Point(minutes=minutes[step], step=step, tokens=tokens[step], nats=found["losses"], bits=found["bits_per_byte"])
            for step, found in held_out.items()
        ],
        samples=samples or {},
    )


def peer(given: argparse.Namespace) -> None:
    """The plain transformers loop, in a process of its own; leaves metrics.jsonl and extra.json in the folder `--worker`."""
    import torch
    from torch.nn import functional as F

    from quintet.data.loader import Loader
    from quintet.data.prepare import open_prepared
    from quintet.monitor.metrics import to_json
    from quintet.train.held_out import held_out_loss

    run = parse.read(Path(given.recipe))
    phase = run.phases[0]
    prepared = open_prepared(run.data, run.model.vocab_size)
    model = peer_model(run.model.vocab_size, phase.sequence_length, seed=run.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    loader = Loader(prepared, run.data, sequence_length=phase.sequence_length, seed=run.seed)
    (stretch,), curves = curriculum(run), PhaseCurves(phase)
    clock = time.time() - given.since  # seconds since launch, pauses left out
    paused, step, tokens, due = 0.0, 0, 0, list(given.at)
    begin = now = 0.0 if given.by_steps else clock
    with (given.worker / "metrics.jsonl").open("w", buffering=1) as metrics:
        while due:
            share = (now - begin) / (given.at[-1] - begin)
            settings = curves.settings(round(share * stretch.num_steps), round(share * stretch.num_tokens))
            optimizer.param_groups[0]["lr"] = settings.learning_rate / curves.learning_rate.peak * given.peer_learning_rate[0]
            batch = loader.next_batch(given.peer_batch or settings.batch_sequences)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(input_ids=batch.inputs).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step, tokens, before = step + 1, tokens + batch.inputs.numel(), clock
            value = loss.item()
            clock = time.time() - given.since - paused
            record = {"kind": "record", "step": step, "tokens": tokens, "main_loss": value, "seconds": clock - before}
            print(json.dumps(record), file=metrics)
            now = step if given.by_steps else clock
            if now >= due[0]:
                due = [at for at in due if at > now]
                with_quintets_names = cast("Transformer", AsTransformer(model))
                found = held_out_loss(with_quintets_names, prepared, run, sequence_length=phase.sequence_length, step=step)
                print(json.dumps(to_json(found)), file=metrics)
            paused = time.time() - given.since - clock
    extra = {"num_parameters": sum(p.numel() for p in model.parameters()), "samples": peer_samples(model, prepared.tokenizer, run)}
    (given.worker / "extra.json").write_text(json.dumps(extra))


def peer_model(vocab_size: int, sequence_length: int, *, seed: int) -> Any:
    """transformers' DeepseekV3ForCausalLM with random weights."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=vocab_size, max_position_embeddings=max(1024, sequence_length), norm_topk_prob=True, use_cache=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, **PEER_SHAPE,
    )  # fmt: skip
    torch.manual_seed(seed)
    peer_type: Any = DeepseekV3ForCausalLM  # transformers' types do not cover what it offers
    return peer_type._from_config(config, experts_implementation="grouped_mm").train()


class AsTransformer:
    """transformers' model with the names that Quintet's held-out loss asks for."""

    def __init__(self, model: Any) -> None:
        from quintet.ops.pointwise import REFERENCE

        self.model, self.embed, self.kernels = model, model.model.embed_tokens, REFERENCE

    def loss(self, hidden: torch.Tensor, labels: torch.Tensor, *, chunk: int) -> torch.Tensor:
        """As Transformer.loss."""
        from quintet.model.transformer import local_head_loss

        return local_head_loss(hidden, self.model.lm_head.weight, labels, chunk=chunk, kernel=self.kernels.cross_entropy)

    def __call__(self, inputs: torch.Tensor, *, positions: torch.Tensor, document_ids: None) -> Output:
        import torch

        from quintet.model.transformer import Output

        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.model.model(input_ids=inputs).last_hidden_state
        return Output(hidden=hidden.float(), mtp=(), moe=())


def peer_samples(model: Any, tokenizer: Any, run: Run) -> dict[str, str]:
    """What the peer writes, drawn as `quintet generate` draws."""
    import torch

    model.eval()
    samples: dict[str, str] = {}
    for prompt in run.monitor.prompts:
        ids = torch.from_numpy(tokenizer.encode_batch([prompt])[0].astype("int64"))[None]
        torch.manual_seed(run.seed)
        with torch.autocast("cpu", torch.bfloat16):
            drawn = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=0.8, top_p=0.95, top_k=0, use_cache=True,
                max_new_tokens=run.monitor.sample_tokens, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.eos_id,
            )  # fmt: skip
        ids_drawn = [token for token in drawn[0, ids.shape[1] :].tolist() if token != tokenizer.eos_id]
        samples[prompt] = tokenizer.decode(ids_drawn)
    return samples


def verdict(courses: dict[str, Course]) -> dict[str, dict[str, float | None]]:
    """Per source: final losses, and the share of the peer's time in which Quintet reaches the peer's final loss (None: never)."""
    if "quintet" not in courses:
        return {}
    ours, theirs = courses["quintet"].held_out, courses["transformers"].held_out
    found: dict[str, dict[str, float | None]] = {}
    for source, goal in theirs[-1].nats.items():
        reached = minutes_to([(point.minutes, point.nats[source]) for point in ours], goal)
        share = None if reached is None else reached / theirs[-1].minutes
        found[source] = {"quintet": ours[-1].nats[source], "transformers": goal, "share_of_time_to_peers_loss": share}
    return found


def minutes_to(curve: Sequence[tuple[float, float]], goal: float) -> float | None:
    """When a falling curve of (minutes, loss) first reaches `goal`, by straight lines between its points; None if it does not."""
    for i, (minutes, loss) in enumerate(curve):
        if loss <= goal:
            if i == 0:
                return minutes
            earlier, higher = curve[i - 1]
            return earlier + (minutes - earlier) * (higher - goal) / (higher - loss)
    return None


def show(courses: dict[str, Course], *, facts: dict[str, Any], domains: dict[str, str], cores: int, verdict: dict[str, Any]) -> None:
    """Print what was measured."""
    print(headline(facts))
    print(f"{cores} core(s); minutes since launch, start-up included, evaluations left out; one contestant after the other\n")
    print(f"{'':26}{'parameters':>12}{'start-up s':>12}{'first step s':>14}{'step s':>8}{'steps':>7}{'tokens/s':>10}")
    for course in courses.values():
        speed = course.tokens_per_second
        start = f"{course.num_parameters:12,}{course.startup_seconds:12.1f}{course.first_step_seconds:14.1f}"
        print(f"{course.name:26}{start}{course.step_seconds:8.3f}{course.steps:7}{speed:10.0f}")
    heads = [f"{domain} ({source})" for source, domain in domains.items()]
    print(f"\n{'':26}{'':9}{'':12}" + "".join(f"{head:>20}" for head in heads))
    print(f"{'':26}{'minutes':>9}{'tokens':>12}" + f"{'nats':>9}{'bits/byte':>11}" * len(heads))
    for i in range(max(len(course.held_out) for course in courses.values())):
        for course in courses.values():
            if i < len(course.held_out):
                point = course.held_out[i]
                losses = "".join(f"{point.nats[s]:9.3f}{point.bits[s]:11.3f}" if s in point.nats else f"{'-':>9}{'-':>11}" for s in domains)
                print(f"{course.name:26}{point.minutes:9.2f}{point.tokens:12,}{losses}")
    for source, found in verdict.items():
        share = found["share_of_time_to_peers_loss"]
        reached = "does not reach it" if share is None else f"reaches it in {share:.0%} of the peer's time"
        final = f"{found['quintet']:.3f} against the peer's {found['transformers']:.3f} nats/token"
        print(f"\n{domains[source]} ({source}): Quintet ends at {final}, and {reached}", end="")
    print()


def plot(courses: dict[str, Course], result: Path, *, title: str) -> None:
    """Held-out loss against wall time, both contestants in one picture: beside `result`, as PNG and SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for color, course in zip(("tab:blue", "tab:orange", "tab:green", "tab:red"), courses.values(), strict=False):
        minutes = [point.minutes for point in course.held_out]
        for style, source in zip(("-o", "--s", ":^", "-.v"), course.held_out[-1].nats, strict=False):
            label = f"{course.name}, {source} ({course.num_parameters / 1e6:.0f} M parameters)"
            losses = [point.nats[source] for point in course.held_out]
            axes.plot(minutes, losses, style, color=color, label=label, markersize=4)
        ready = (course.startup_seconds + course.first_step_seconds) / 60
        axes.axvline(ready, color=color, linestyle=":", linewidth=1, label=f"{course.name}: first step done")
    axes.set(xlabel="minutes since launch (evaluations left out)", ylabel="held-out loss, nats per token", xlim=(0, None), title=title)
    axes.title.set_fontsize(9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    for suffix in (".png", ".svg"):
        figure.savefig(result.with_suffix(suffix), dpi=150)
    pyplot.close(figure)


def tell(text: str) -> None:
    """Progress, for whoever waits."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
