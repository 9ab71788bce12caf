"""Grouped matmul when every step routes differently: what padding each expert's rows to a multiple buys.

    python benchmarks/permute.py [--rounds 15] [--threads 1] [--dtype bf16] [--alignments 1 8 16 32 64] [--json FILE]

A dropless router gives every expert another number of rows at every step, and oneDNN generates code for each size of matrix that it
has not met. Here a stream of random routings, the same one for every alignment, passes through an expert's two products, forward
and backward. Each alignment has a process of its own, because that code is kept per process, and they take turns in rotating order.

GFLOP/s count the real token-expert pairs only, so padding is paid for and not credited. `sizes` says how many different
numbers of rows an expert had so far. 2,048 tokens, hidden 512, expert width 256, 32 experts, 4 per token.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from startup import answer, circumstances, headline, take_turns, write_json

TOKENS, HIDDEN, WIDTH, EXPERTS, PER_TOKEN = 2048, 512, 256, 32, 4
# Forward and backward are three products of the same size; the gate and up projections together are twice the down projection.
FLOPS = 3 * 2 * TOKENS * PER_TOKEN * HIDDEN * 3 * WIDTH


def product_turn(alignment: int, dtype: str, threads: int) -> Callable[[], dict[str, float]]:
    """A worker's turn: one new routing, both products forward and backward."""
    import torch

    from quintet.ops import permute
    from quintet.ops.grouped_matmul import grouped_matmul
    from quintet.parallel.precision import DTYPES
    from quintet.train.device import keep_freed_memory, prefer_fast_fp32

    torch.set_num_threads(threads)
    permute.ROW_ALIGNMENT = alignment
    keep_freed_memory()
    prefer_fast_fp32()
    generator, kind = torch.Generator().manual_seed(0), DTYPES["bf16" if dtype == "bf16" else "fp32"]
    w13 = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=generator).to(kind).requires_grad_()
    w2 = torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator).to(kind).requires_grad_()
    x = torch.randn(TOKENS, HIDDEN, generator=generator).to(kind)
    sizes: set[int] = set()

    def turn() -> dict[str, float]:
        # Experts are not equally liked, and which ones are changes from step to step.
        liking = torch.randn(EXPERTS, generator=generator) / 2
        experts = (torch.randn(TOKENS, EXPERTS, generator=generator) + liking).topk(PER_TOKEN).indices
        to = permute.sort_by_expert(experts, EXPERTS)
        rows = x[to.token_of_row].requires_grad_()
        sizes.update(to.ends.diff(prepend=to.ends.new_zeros(1)).tolist())
        cpu, wall = time.process_time(), time.perf_counter()
        gate_up = grouped_matmul(rows, w13, to.ends)
        out = grouped_matmul(gate_up[:, :WIDTH], w2, to.ends)
        out.backward(out.detach())
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        w13.grad = w2.grad = None
        return {"cpu": cpu, "wall": wall, "sizes": len(sizes), "padding": int(to.ends[-1]) / (TOKENS * PER_TOKEN) - 1}

    return turn


def main() -> None:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--alignments", type=int, nargs="+", default=[1, 8, 16, 32, 64], metavar="ROWS")
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return answer(product_turn(given.worker, given.dtype, given.threads))
    # `sort_by_expert` pads only where there are enough rows for it.
    largest = TOKENS * PER_TOKEN // (4 * EXPERTS)
    if bad := [a for a in given.alignments if not 1 <= a <= largest]:
        parser.error(f"--alignments {bad}: must lie between 1 and {largest}, above which so few rows per expert are not padded")
    facts = circumstances("torch")
    flags = ["--threads", str(given.threads), "--dtype", given.dtype]
    workers = {str(a): [__file__, "--worker", str(a), *flags] for a in given.alignments}
    turns = take_turns(workers, rounds=given.rounds + 1, threads=given.threads)
    rows: dict[str, dict[str, float]] = {}
    for name, (_, *counted) in turns.items():  # the first turn warms up
        cpu, wall, padding = (statistics.median(turn[key] for turn in counted) for key in ("cpu", "wall", "padding"))
        rows[name] = {"gflops_cpu": FLOPS / cpu / 1e9, "gflops_wall": FLOPS / wall / 1e9, "padding": padding, "sizes": counted[-1]["sizes"]}
    base = rows[str(given.alignments[0])]
    for row in rows.values():
        row["ratio_cpu"], row["ratio_wall"] = (row[f"gflops_{key}"] / base[f"gflops_{key}"] for key in ("cpu", "wall"))
    print(headline(facts))
    print(f"{given.dtype}, {given.threads} thread(s), medians of {given.rounds} rounds; ratio: to the first row")
    print(f"{'rows aligned to':>15}{'GFLOP/s cpu':>13}{'ratio':>7}{'GFLOP/s wall':>14}{'ratio':>7}{'padding':>9}{'sizes':>7}")
    for name, row in rows.items():
        cpu_wall = f"{row['gflops_cpu']:13.0f}{row['ratio_cpu']:7.2f}{row['gflops_wall']:14.0f}{row['ratio_wall']:7.2f}"
        print(f"{name:>15}{cpu_wall}{row['padding']:9.1%}{row['sizes']:7.0f}")
    write_json(given.json, facts, {"rounds": given.rounds, "threads": given.threads, "dtype": given.dtype, "alignments": rows})


if __name__ == "__main__":
    main()
