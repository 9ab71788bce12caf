"""Compare gigatoken with Hugging Face tokenizers on the default corpus: the same ids, and how many times faster.

    python benchmarks/tokenizer.py [--runs 5] [--vocab-size 4096] [--tokenizer tokenizer.json] [--megabytes 64]

Both encode the same documents in this one process, in alternating order, on one thread and on all cores. Speed is
document bytes per second of wall time; the first run of each is shown apart, because gigatoken remembers words.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version

import numpy as np
from rich.console import Console
from rich.table import Table

from quintet.data.sources import Reader, list_files
from quintet.data.tokenizer import Ids, Tokenizer, train_bpe
from quintet.spec.run import Source

Encode = Callable[[Sequence[str]], list[Ids]]


def corpus(limit: int) -> list[str]:
    """Documents of the standard library and its documentation, up to `limit` bytes."""
    texts: list[str] = []
    for path in ("python:stdlib", "python:docs"):
        files = list_files(Source(name="corpus", paths=(path,), domain="code", weight=1.0)).files
        for document in Reader(files, text_key="text", max_document_bytes=10_000_000, strict=False):
            texts.append(document.text)
            limit -= len(document.text)
            if limit < 0:
                return texts
    return texts


def encoders(tokenizer: Tokenizer) -> dict[str, Encode]:
    """The reference's two ways, and gigatoken as `Tokenizer` uses it."""
    reference, fast = tokenizer._reference, tokenizer._fast
    if fast is None:
        sys.exit("gigatoken cannot load this tokenizer: there is nothing to compare")
    return {
        "tokenizers encode_batch": lambda texts: [np.asarray(e.ids) for e in reference.encode_batch(list(texts), add_special_tokens=False)],
        "tokenizers encode_batch_fast": lambda texts: [
            np.asarray(e.ids) for e in reference.encode_batch_fast(list(texts), add_special_tokens=False)
        ],
        "gigatoken": tokenizer.encode_batch,
    }


def measure(tokenizer: Tokenizer, texts: list[str], *, runs: int) -> tuple[dict[str, list[float]], dict[str, list[Ids]]]:
    """Seconds of every run by encoder, and the ids of the last one."""
    ways = encoders(tokenizer)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    ids: dict[str, list[Ids]] = {}
    for run in range(runs):
        for name in list(ways) if run % 2 == 0 else list(ways)[::-1]:
            began = time.perf_counter()
            ids[name] = ways[name](texts)
            seconds[name].append(time.perf_counter() - began)
    return seconds, ids


def main() -> None:
    """Train or load the tokenizer, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--tokenizer", help="tokenizer.json; absent: trained on the corpus")
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0, help="0: one thread, then all cores")
    options = parser.parse_args()
    if not options.threads:  # Both libraries take their number of threads when they start.
        for threads in (1, os.cpu_count() or 1):
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--threads", str(threads)], check=True, env=threads_of(threads))
        return
    texts = corpus(options.megabytes * 1_000_000)
    tokenizer = Tokenizer.from_file(options.tokenizer) if options.tokenizer else train_bpe(texts, options.vocab_size)
    num_bytes = sum(len(text.encode()) for text in texts)
    seconds, ids = measure(tokenizer, texts, runs=options.runs)
    show(seconds, ids, num_bytes=num_bytes, title=f"{options.threads} threads, {len(texts)} documents, {num_bytes / 1e6:.1f} MB")


def threads_of(count: int) -> dict[str, str]:
    """The environment that gives both libraries `count` threads."""
    return dict(os.environ, RAYON_NUM_THREADS=str(count), TOKENIZERS_PARALLELISM="true" if count > 1 else "false")


def show(seconds: dict[str, list[float]], ids: dict[str, list[Ids]], *, num_bytes: int, title: str) -> None:
    """Print medians, ratios and differing documents."""
    names = list(seconds)
    base = statistics.median(seconds[names[1]])
    table = Table(title=f"{title}; tokenizers {version('tokenizers')}, gigatoken {version('gigatoken')}, {platform.machine()}")
    for column in ("encoder", "first run MB/s", "median MB/s", "M tokens/s", "ratio", "documents that differ"):
        table.add_column(column, justify="left" if column == "encoder" else "right")
    num_tokens = sum(map(len, ids[names[0]]))
    for name in names:
        median = statistics.median(seconds[name])
        different = sum(not np.array_equal(mine, reference) for mine, reference in zip(ids[name], ids[names[0]], strict=True))
        table.add_row(
            name,
            f"{num_bytes / seconds[name][0] / 1e6:.1f}",
            f"{num_bytes / median / 1e6:.1f}",
            f"{num_tokens / median / 1e6:.2f}",
            f"{base / median:.1f}x",
            f"{different} of {len(ids[name])}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
