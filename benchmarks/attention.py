"""Causal attention on the CPU: Quintet's blocked path against PyTorch's own, and what keeping freed memory does.

    python benchmarks/attention.py [--rounds 9] [--threads 1] [--json FILE]

Attention: one process; every contestant runs once per round, in rotating order, forward alone (no gradient) and forward with backward.
`math` is what scaled_dot_product_attention falls to where the value is narrower than query and key, and ratios are to it; `flash` is
PyTorch's fused CPU kernel, with the value padded to the query's width. 8 heads, query and key 96 wide, value 64. Each row also
tells how far the output lies from an fp32 softmax(q k^T) v, so that nothing wins by being wrong.

Allocator: an element-wise sum of two tensors of 33 MiB, in two processes that take turns: glibc as it is, and after
`quintet.train.device.keep_freed_memory`. Page faults per sum are counted along.
"""

from __future__ import annotations

import argparse
import math
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from startup import answer, circumstances, headline, rotated, take_turns, write_json
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from quintet.ops.attention import attention, attention_reference
from quintet.train.device import keep_freed_memory, prefer_fast_fp32

HEADS, WIDTH, VALUE_WIDTH = 8, 96, 64
SCALE = 1 / math.sqrt(WIDTH)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SUM_MIB = 33
SUMS_PER_TURN = 10

Core = Callable[[Tensor, Tensor, Tensor], Tensor]


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        padded = F.pad(v, (0, WIDTH - VALUE_WIDTH))
        return F.scaled_dot_product_attention(q, k, padded, is_causal=True, scale=SCALE)[..., :VALUE_WIDTH]


def _quintet(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, scale=SCALE)


CONTESTANTS: dict[str, Core] = {"math": _math, "flash, value padded": _flash, "quintet blocked": _quintet}


def compare(batch: int, length: int, dtype: str, *, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds, ratios to `math` and the largest error of each contestant at one shape."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch, HEADS, length, width, generator=generator).to(DTYPES[dtype]) for width in (WIDTH, WIDTH, VALUE_WIDTH)
    )
    grad = torch.randn(v.shape, generator=generator).to(v.dtype)
    exact = attention_reference(q.float(), k.float(), v.float(), scale=SCALE)
    errors = {name: float((core(q, k, v).float() - exact).abs().max()) for name, core in CONTESTANTS.items()}
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "both": []} for name in CONTESTANTS}
    for i in range(rounds + 1):  # the first round warms up
        for name in rotated(list(CONTESTANTS), i):
            times[name]["forward"].append(_seconds(CONTESTANTS[name], q, k, v, None))
            times[name]["both"].append(_seconds(CONTESTANTS[name], q, k, v, grad))
    medians = {name: {what: statistics.median(spent[1:]) for what, spent in by.items()} for name, by in times.items()}
    return {
        name: {
            "forward_seconds": found["forward"],
            "both_seconds": found["both"],
            "forward_ratio": medians["math"]["forward"] / found["forward"],
            "both_ratio": medians["math"]["both"] / found["both"],
            "largest_error": errors[name],
        }
        for name, found in medians.items()
    }


def _seconds(core: Core, q: Tensor, k: Tensor, v: Tensor, grad: Tensor | None) -> float:
    """Forward without gradients, or with `grad` forward and backward."""
    inputs = [t.detach().requires_grad_(grad is not None) for t in (q, k, v)]
    begin = time.perf_counter()
    out = core(*inputs)
    if grad is not None:
        out.backward(grad)
    return time.perf_counter() - begin


def sum_turn(*, keep: bool) -> Callable[[], dict[str, float]]:
    """A worker's turn: sums of fresh results, their seconds and page faults."""
    if keep:
        keep_freed_memory()
    a, b = (torch.ones(SUM_MIB * 2**18) for _ in range(2))
    a + b  # what is kept is there before the first turn

    def turn() -> dict[str, float]:
        faults, begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        for _ in range(SUMS_PER_TURN):
            a + b
        spent = time.perf_counter() - begin
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        return {"seconds": spent / SUMS_PER_TURN, "page_faults": faults / SUMS_PER_TURN}

    return turn


def allocator(*, rounds: int, threads: int) -> dict[str, dict[str, float]]:
    """Median seconds and page faults of a sum, with and without kept memory."""
    worker = [__file__, "--threads", str(threads), "--worker"]
    found = take_turns(
        {"glibc as it is": [*worker, "returned"], "freed memory kept": [*worker, "kept"]}, rounds=rounds, threads=threads
    )
    rows = {name: {key: statistics.median(turn[key] for turn in turns) for key in turns[0]} for name, turns in found.items()}
    base = rows["glibc as it is"]["seconds"]
    return {name: {**row, "ratio": base / row["seconds"]} for name, row in rows.items()}


def _shape(text: str) -> tuple[int, int]:
    batch, _, length = text.partition("x")
    return int(batch), int(length)


def main() -> None:
    """Measure, print the tables, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", type=_shape, nargs="+", default=[(4, 512), (1, 2048)], metavar="BATCHxLENGTH")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--worker", choices=("kept", "returned"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.worker:
        return answer(sum_turn(keep=given.worker == "kept"))
    facts = circumstances("torch")
    sums = allocator(rounds=given.rounds, threads=given.threads)
    # As training does before its first step.
    keep_freed_memory()
    prefer_fast_fp32()
    tables: list[dict[str, Any]] = [
        {"batch": batch, "length": length, "dtype": dtype, "contestants": compare(batch, length, dtype, rounds=given.rounds)}
        for batch, length in given.shapes
        for dtype in given.dtypes
    ]
    print(headline(facts))
    print(f"{given.threads} thread(s), medians of {given.rounds} rounds; ratio: how many times faster than math")
    print(f"\n{'attention':38}{'forward ms':>11}{'ratio':>7}{'+backward ms':>14}{'ratio':>7}{'largest error':>15}")
    for table in tables:
        for name, row in table["contestants"].items():
            label = f"{table['batch']} x {table['length']} {table['dtype']}  {name}"
            forward = f"{row['forward_seconds'] * 1e3:11.2f}{row['forward_ratio']:7.2f}"
            print(f"{label:38}{forward}{row['both_seconds'] * 1e3:14.2f}{row['both_ratio']:7.2f}{row['largest_error']:15.1e}")
    print(f"\n{f'sum of two tensors of {SUM_MIB} MiB':38}{'ms':>11}{'ratio':>7}{'page faults':>14}")
    for name, row in sums.items():
        print(f"{name:38}{row['seconds'] * 1e3:11.2f}{row['ratio']:7.2f}{row['page_faults']:14.0f}")
    write_json(given.json, facts, {"rounds": given.rounds, "threads": given.threads, "attention": tables, "sum": sums})


if __name__ == "__main__":
    main()
