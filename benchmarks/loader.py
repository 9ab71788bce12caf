"""The loader: tokens per second beside copying the same rows from a memory map, and how well it shuffles.

    python benchmarks/loader.py [--tokens 8000000] [--sequence-length 4096] [--batch 8] [--rounds 3] [--json FILE]

One source of documents of drawn lengths, in a temporary folder, page cache warm, one thread, seconds of CPU. The memory map reads the same
number of rows of L + 1 tokens at shuffled places and widens them to int64, without packing, labels or document ids: the least that any
loader of this format does. "inputs and labels" does so twice, one token apart, as the usual loaders over a memory map do; both without
packing: their rows begin anywhere. Shuffling is told by the distance in the source of documents that follow each other, as a share of the
source (a third, if perfect).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from startup import circumstances, headline, write_json

from quintet.data.pack import Permutation, Rows
from quintet.data.shards import Shard, ShardWriter


def write_shard(folder: Path, num_tokens: int) -> Shard:
    """Documents of about 1,000 tokens, log-normal, whose first token is 1 and whose last is 0."""
    draw = np.random.default_rng(0)
    lengths = np.maximum(draw.lognormal(6.5, 1.0, num_tokens // 1000).astype(int), 2)
    with ShardWriter(folder, dtype="uint16") as writer:
        for begin in range(0, len(lengths), 1000):
            documents = [np.append(draw.integers(2, 60_000, n - 1), 0).astype(np.uint32) for n in lengths[begin : begin + 1000]]
            writer.append(documents, num_bytes=0)
        writer.finish(tokenizer="0" * 64)
    return Shard(folder)


def through_loader(shard: Shard, *, length: int, batch: int, count: int) -> None:
    """What `Loader.next_batch` does with one source."""
    from quintet.data.loader import _batch

    rows = Rows(shard, row_length=length + 1, key=7, eos_id=0)
    for _ in range(count):
        _batch([rows] * batch, batch, length, part=0, num_parts=1)


def through_map(shard: Shard, *, length: int, batch: int, count: int, shifts: tuple[int, ...] = (0,)) -> None:
    """Rows of the map at shuffled places, once for each of `shifts`."""
    places = Permutation(max(shard.num_tokens // (length + 1), batch * count), key=7)(np.arange(batch * count))
    places %= shard.num_tokens // (length + 1)
    for step in range(count):
        chosen = places[step * batch : (step + 1) * batch] * (length + 1)
        for shift in shifts:
            begins = chosen + shift
            more = len(shifts) == 1  # the token that is a label only
            torch.from_numpy(np.stack([shard.tokens[begin : begin + length + more].astype(np.int64) for begin in begins]))


def distance(shard: Shard, *, length: int) -> float:
    """Mean distance of documents that follow each other in an epoch's rows, as a share of the source."""
    rows, order = Rows(shard, row_length=length + 1, key=7, eos_id=0), []
    while rows.epoch == 0:
        order.append(rows.packed().document)
        rows.skip_window()
    places = np.concatenate(order)
    return float(np.abs(np.diff(places))[np.diff(places) != 0].mean() / shard.num_documents)


def main() -> None:
    """Measure both in turns and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8_000_000)
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    facts = circumstances("numpy", "torch")
    with tempfile.TemporaryDirectory() as folder:
        shard = write_shard(Path(folder) / "shard", arguments.tokens)
        count = max(shard.num_tokens // (arguments.batch * arguments.sequence_length), 1)
        ways: dict[str, Callable[..., None]] = {"loader": through_loader, "memory map": through_map}
        ways["inputs and labels"] = partial(through_map, shifts=(0, 1))
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.rounds + 1):
            for name, way in ways.items():
                began = time.process_time()
                way(shard, length=arguments.sequence_length, batch=arguments.batch, count=count)
                seconds[name].append(time.process_time() - began)
        tokens = count * arguments.batch * arguments.sequence_length
        rates = {name: tokens / statistics.median(times[1:]) / 1e6 for name, times in seconds.items()}
        result = {"mega_tokens_per_second": rates, "ratio": rates["loader"] / rates["memory map"]}
        result |= {"ratio_to_inputs_and_labels": rates["loader"] / rates["inputs and labels"], "tokens": tokens}
        result |= {"distance": distance(shard, length=arguments.sequence_length), "documents": shard.num_documents}
    print(headline(facts))
    print(f"loader {rates['loader']:.0f} M tokens/s, memory map {rates['memory map']:.0f} M tokens/s, ratio {result['ratio']:.2f}; "
          f"inputs and labels from one {rates['inputs and labels']:.0f} M tokens/s, ratio {result['ratio_to_inputs_and_labels']:.2f}; "
          f"neighbours lie {result['distance']:.3f} of the source apart")  # fmt: skip
    write_json(arguments.json, facts, result)


if __name__ == "__main__":
    main()
