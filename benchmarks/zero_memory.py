"""Bytes that each rank really holds under a layout, against `quintet.cost.memory`: weights, gradients, master weights, moments, peak.

    python benchmarks/zero_memory.py [--hidden 256] [--layers 24] [--bucket 1000000] [--ranks 4] [--json FILE]

A small V3-shaped model trains steps of two micro-batches on gloo ranks of one thread, a process each, all layouts one after the other.
Counted are the storages that the buckets and the optimizer hold: weights, master and moments behind a step, gradients between two
micro-batches. Peak is what torch has allocated at most within a step, all of it (activations, working gradients, temporaries, messages), as
its profiler sees it; but what a thread of gloo is the last to hold is freed unseen, so of three steps the one with the least peak is taken.
Functions are not fused here, as the estimate of activations supposes. The table shows the rank that is furthest from the prediction; a part
that is more than 5 % off is an error. (In a model that is still smaller, what is not fused weighs more, and peaks are further off.)
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from startup import circumstances, headline, write_json
from torch import Tensor

import quintet.parallel.parallelize as recipe
from quintet.cost import memory, shard
from quintet.cost.flops import parameters
from quintet.data.loader import Batch
from quintet.parallel import collectives
from quintet.parallel.bucket import Bucket
from quintet.parallel.mesh import make_mesh
from quintet.parallel.zero import ShardedParameters
from quintet.spec.curriculum import Settings
from quintet.spec.layout import Layout
from quintet.spec.model import Model
from quintet.spec.run import Data, Optimizer, Phase, Run, Source, Train
from quintet.train.build import Built, build
from quintet.train.step import run_step

PARTS = ("weights", "gradients", "master_weights", "moments")
TOLERANCE = 0.05
LENGTH = 16
SECONDS_TO_LET_GO = 0.01
STEPS = 3
SETTINGS = Settings(batch_sequences=8, learning_rate=1e-3, mtp_weight=0.3, bias_speed=0.001)

CASES: tuple[tuple[Layout, dict[str, Any]], ...] = (
    (Layout(), {}),
    *((Layout(dp=2, zero=zero), {}) for zero in (0, 1, 2, 3)),
    *((Layout(dp=4, zero=zero), {}) for zero in (0, 1, 2, 3)),
    (Layout(dp=4, zero=1, zero_ranks=2), {}),
    (Layout(dp=4, zero=3, zero_ranks=2), {}),
    (Layout(dp=4, ep=2, zero=1), {}),
    (Layout(dp=4, ep=4, zero=3), {}),
    (Layout(dp=2, tp=2, zero=1), {}),
    (Layout(dp=2, cp=2, ep=2, zero=2), {}),
    (Layout(), {"precision": "bf16"}),
    (Layout(dp=2, zero=1), {"precision": "bf16"}),
    (Layout(dp=2, zero=1), {"precision": "bf16", "moments": "bf16"}),
    (Layout(dp=4, ep=2, zero=3), {"precision": "bf16", "moments": "bf16"}),
)


def a_run(layout: Layout, *, hidden: int, layers: int, precision: str = "fp32", moments: str = "fp32") -> Run:
    """A run of a model of one dense layer and `layers` - 1 mixtures of 16 experts, and an MTP module."""
    model = Model(
        vocab_size=8192,
        hidden_size=hidden,
        num_layers=layers,
        num_dense_layers=1,
        num_heads=8,
        q_lora_rank=hidden // 2,
        kv_lora_rank=hidden // 4,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        dense_ffn_size=4 * hidden,
        expert_ffn_size=hidden // 2,
        num_routed_experts=16,
        num_shared_experts=1,
        num_experts_per_token=2,
        num_mtp_modules=1,
        max_context=LENGTH,
    )
    sizes: dict[str, Any] = {"precision": precision}
    kept: dict[str, Any] = {"moments": moments}
    return Run(
        name="zero-memory",
        model=model,
        data=Data(sources=(Source(name="none", paths=("none",), domain="code", weight=1.0),), directory="none"),
        phases=(Phase(name="only", length="2 steps", sequence_length=LENGTH, batch=("8",), learning_rate=("1e-3",)),),
        train=Train(micro_batch=1, loss_chunk=LENGTH, compile=False, device="cpu", **sizes),
        optimizer=Optimizer(**kept),
        layout=layout,
    )


def close_buckets_at(numel: int) -> None:
    """Buckets in the proportion to this small model that training's own have to a large one."""
    recipe.ShardedParameters = functools.partial(ShardedParameters, closed_at=numel)  # type: ignore[misc, assignment]
    shard.BUCKET_NUMEL = numel


def work(run: Run) -> dict[str, Any]:
    """Two steps on this rank -> bytes by part, measured and predicted."""
    torch.set_num_threads(1)
    _let_threads_go()
    built = build(run, make_mesh(run.layout), torch.device("cpu"), on_message=lambda text: None)
    train = replace(run.train, micro_batch=SETTINGS.batch_sequences // run.layout.dp // 2)
    predicted = memory.step_memory(run.model, train, sequence_length=LENGTH, layout=run.layout, moments=run.optimizer.moments)
    between, batch = _between_micro_batches(built), _batch(run, built)

    def step(number: int) -> None:
        run_step(built, batch, settings=SETTINGS, train=train, document_mask=False, step=number)
        built.parameters.finish_gathering()

    step(1)
    measured = _held(built)
    peak = sum(measured.values()) + min(_peak_allocation(lambda number=number: step(number)) for number in range(2, 2 + STEPS))  # type: ignore[misc]
    measured["gradients"] = max(between)
    return {"measured": measured, "predicted": asdict(predicted), "peak": peak}


def _let_threads_go() -> None:
    """Behind every wait, give gloo's threads the time to drop a message: what they free as the last holder the profiler does not see."""
    waits = collectives.Pending.wait

    def wait(pending: collectives.Pending) -> Tensor:
        arrived = waits(pending)
        time.sleep(SECONDS_TO_LET_GO)
        return arrived

    collectives.Pending.wait = wait  # type: ignore[method-assign]


def _peak_allocation(work: Callable[[], None]) -> int:
    """Bytes that torch holds at most during `work` beside those that it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    assert profile.profiler and profile.profiler.kineto_results
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes))


def _batch(run: Run, built: Built) -> Batch:
    """This rank's rows of random tokens."""
    generator = torch.Generator().manual_seed(built.mesh.at.dp)
    tokens = torch.randint(run.model.vocab_size, (SETTINGS.batch_sequences // run.layout.dp, LENGTH + 1), generator=generator)
    return Batch(inputs=tokens[:, :-1], labels=tokens[:, 1:], sizes=[(tokens.shape[1], 0)] * len(tokens))


def _between_micro_batches(built: Built) -> list[int]:
    """A list that grows by the gradients' bytes behind every micro-batch."""
    ended, noted = built.parameters.end_micro_batch, []

    def end() -> None:
        ended()
        noted.append(sum(_gradient_bytes(bucket) for bucket in built.parameters.buckets))

    built.parameters.end_micro_batch = end  # type: ignore[method-assign]
    return noted


def _gradient_bytes(bucket: Bucket) -> int:
    kept = [bucket.gradient, bucket.gradient_shard, *(part.values for part in bucket.gradients() if bucket.gradient_shard is None)]
    return _bytes([tensor for tensor in kept if tensor is not None], set())


def _held(built: Built) -> dict[str, int]:
    """Bytes of every storage that buckets and optimizer hold, each counted once."""
    seen: set[int] = set()
    buckets, optimizer = built.parameters.buckets, built.optimizer
    return {
        "weights": sum(_bytes([bucket.weights, bucket.weight_shard], seen) for bucket in buckets),
        "master_weights": sum(_bytes([bucket.master], seen) for bucket in buckets),
        "moments": _bytes([*optimizer.exp_avg, *optimizer.exp_avg_sq], seen),
    }


def _bytes(tensors: Sequence[Tensor], seen: set[int]) -> int:
    total = 0
    for storage in (tensor.untyped_storage() for tensor in tensors):
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def on_ranks(run: Run) -> list[dict[str, Any]]:
    """What `work` returns on every rank, each a child of this process."""
    context = multiprocessing.get_context("fork")

    def child(rank: int, count: int, folder: str, answer: Connection) -> None:
        if count > 1:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
        answer.send(work(run))
        if count > 1:
            dist.barrier()
            os._exit(0)  # gloo's threads may not outlive the interpreter

    count = run.layout.num_ranks
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(count)]
        crew = [context.Process(target=child, args=(rank, count, folder, pipes[rank][1]), daemon=True) for rank in range(count)]
        for process in crew:
            process.start()
        for _, writer in pipes:
            writer.close()  # so that a rank that dies is seen as the end of its pipe
        try:
            answers = [reader.recv() for reader, _ in pipes]
        except EOFError:
            raise RuntimeError(f"a rank of {run.layout} failed; its own message stands above") from None
        for process in crew:
            process.join()
    return answers


def row_of(layout: Layout, changes: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One line of the table: of the rank that is furthest from the prediction."""

    def off(answer: Mapping[str, Any]) -> float:
        pairs = [(answer["measured"][part], answer["predicted"][part]) for part in PARTS]
        return max(abs(measured - foretold) / max(foretold, 1) if measured != foretold else 0.0 for measured, foretold in pairs)

    worst = max(answers, key=off)
    foretold = sum(worst["predicted"].values())
    peak = max((answer["peak"] for answer in answers), key=lambda peak: abs(peak / foretold - 1))
    return {
        "layout": str(layout),
        "degrees": asdict(layout),
        "precision": changes.get("precision", "fp32"),
        "moments": changes.get("moments", "fp32"),
        "measured": {part: worst["measured"][part] for part in PARTS},
        "predicted": {part: worst["predicted"][part] for part in PARTS},
        "largest_error": off(worst),
        "peak_bytes": peak,
        "predicted_peak_bytes": foretold,
        "peak_error": abs(peak / foretold - 1),
    }


def show(rows: Sequence[Mapping[str, Any]], num_parameters: int) -> None:
    """Print the table: MiB measured, and how far that is from the prediction."""
    print(f"{num_parameters:,} parameters; MiB per rank: measured, and its distance from the prediction where that is not 0.0 %")
    names = ("weights", "gradients", "master", "moments")
    heads = "".join(f"{name:>18}" for name in names)
    print(f"{'layout':26}{'type':6}{'moments':9}{heads}{'of one device':>15}{'peak':>9}{'foretold':>10}{'ratio':>7}")
    alone = {row["precision"]: row for row in rows if row["layout"] == "one device"}

    def state(row: Mapping[str, Any]) -> int:
        return row["measured"]["master_weights"] + row["measured"]["moments"]

    for row in rows:
        cells = []
        for part in PARTS:
            measured, foretold = row["measured"][part], row["predicted"][part]
            error = (measured - foretold) / max(foretold, 1)
            cells.append(f"{measured / 2**20:9.1f}" + (f" {error:+7.1%} " if abs(error) >= 5e-4 else " " * 9))
        reference = alone.get(row["precision"])
        share = f"{state(row) / state(reference):.3f}" if reference else ""
        print(f"{row['layout']:26}{row['precision']:6}{row['moments']:9}" + "".join(cells) + f"{share:>15}", end="")
        peak, foretold = row["peak_bytes"], row["predicted_peak_bytes"]
        print(f"{peak / 2**20:9.0f}{foretold / 2**20:10.0f}{peak / foretold:7.2f}")


def main() -> None:
    """Measure, print the table, write the result; exit with 1 if a part is further from the prediction than the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256, help="width of the model")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--bucket", type=int, default=1_000_000, help="elements at which buckets of gradients are closed")
    parser.add_argument("--ranks", type=int, default=4, help="leave layouts of more ranks out")
    parser.add_argument("--json", type=Path, help="write the result there too")
    given = parser.parse_args()
    facts, shape = circumstances("torch"), {"hidden": given.hidden, "layers": given.layers}
    close_buckets_at(given.bucket)
    rows = []
    for layout, changes in CASES:
        if layout.num_ranks <= given.ranks:
            rows.append(row_of(layout, changes, on_ranks(a_run(layout, **shape, **changes))))
            print(f"measured: {layout} {' '.join(changes.values())}", file=sys.stderr)
    count = parameters(a_run(Layout(), **shape).model).total_with_mtp
    print(headline(facts))
    show(rows, count)
    write_json(given.json, facts, {"num_parameters": count, **shape, "bucket": given.bucket, "rows": rows})
    if wrong := [row["layout"] for row in rows if row["largest_error"] > TOLERANCE]:
        sys.exit(f"more than {TOLERANCE:.0%} from the prediction: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
