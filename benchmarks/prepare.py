"""From jsonl to token shards, beside datatrove, Megatron-LM and plain tokenizers: tokenisation alone, and the whole pipeline with filters
and dedup.

    python benchmarks/prepare.py [--megabytes 8] [--tokenizer tokenizer.json] [--datatrove PYTHON] [--megatron PYTHON]
        [--part tokenize|whole] [--rounds 3] [--json FILE]

The corpus is English prose: paragraphs of Python's documentation in random order, of which 8 % of the documents come again with every 50th
word replaced, and 4 % as they are. `--datatrove` names an interpreter with datatrove[processing,io], spacy, tokenizers and xxhash<4,
`--megatron` one with megatron-core, torch and transformers. Every contestant runs in a process of its own, pinned to one core, one thread,
and is measured in seconds of CPU; imports are left out, loading the tokenizer is not. Rounds take turns.

    tokenize   read jsonl, encode, write shards         quintet; datatrove's DocumentTokenizer; the loop of Megatron-LM's preprocess_data.py
               over megatron-core's builder; tokenizers in a loop, writing raw ids
    whole      the same with Gopher, C4 and FineWeb rules, exact and near duplicates        quintet; datatrove's filters, dedup, tokenizer
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

Work = Callable[[Path, Path, Path], int]


def write_corpus(folder: Path, megabytes: float, *, seed: int = 0) -> None:
    """jsonl files of about a megabyte."""
    from quintet.data.sources import Reader, list_files
    from quintet.spec.run import Source

    files = list_files(Source(name="docs", paths=("python:docs",), domain="prose", weight=1.0)).files
    texts = [d.text for d in Reader(files, text_key="text", max_document_bytes=10**7, strict=False)]
    paragraphs = [" ".join(p.split()) for text in texts for p in text.split("\n\n") if len(p.split()) > 8 and "{" not in p]
    rng = random.Random(seed)
    documents: list[str] = []
    size = 0
    while size < megabytes * 1e6:
        draw = rng.random()
        if documents and draw < 0.12:
            words = rng.choice(documents).split(" ")
            text = " ".join(words if draw < 0.04 else [w if rng.random() > 0.02 else "changed" for w in words])
        else:
            text = "\n\n".join(rng.sample(paragraphs, rng.randint(4, 16)))
        documents.append(text)
        size += len(text)
    folder.mkdir()
    for i in range(0, len(documents), 400):
        lines = [json.dumps({"text": text, "id": str(i + j)}) for j, text in enumerate(documents[i : i + 400])]
        (folder / f"{i:06}.jsonl").write_text("\n".join(lines) + "\n")


def quintet(corpus: Path, tokenizer: Path, out: Path, *, whole: bool) -> int:
    """`quintet prepare` in this process; the tokens of what was kept."""
    from quintet.data.engine import Local
    from quintet.data.prepare import prepare
    from quintet.spec.quality import Dedup, Quality
    from quintet.spec.run import Data, Source

    more = {"quality": Quality(prose=("gopher", "c4", "fineweb")), "dedup": Dedup()} if whole else {}
    source = Source(name="corpus", paths=(str(corpus),), domain="prose", weight=1.0)
    data = Data(sources=(source,), directory=str(out), tokenizer=str(tokenizer), **more)
    found = prepare(data, vocab_size=1 << 20, seed=0, engine=Local(workers=1)).sources["corpus"].statistics
    return found.tokens + found.held_out_tokens


def plain(corpus: Path, tokenizer: Path, out: Path) -> int:
    """Hugging Face tokenizers in a loop."""
    import numpy as np
    from tokenizers import Tokenizer

    encoder, count = Tokenizer.from_file(str(tokenizer)), 0
    with open(out, "wb") as stream:
        for path in sorted(corpus.glob("*.jsonl")):
            texts = [json.loads(line)["text"] for line in path.open()]
            for encoding in encoder.encode_batch_fast(texts, add_special_tokens=False):
                stream.write(np.array(encoding.ids, np.uint16).tobytes())
                count += len(encoding.ids) + 1
    return count


def datatrove(corpus: Path, tokenizer: Path, out: Path, *, whole: bool) -> int:
    """datatrove's own blocks, one task."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.hashing import HashConfig

    def run(*steps: object, tasks: int = 1) -> None:
        LocalPipelineExecutor(pipeline=list(steps), tasks=tasks, workers=1, logging_dir=str(out / f"logs{time.monotonic_ns()}")).run()

    read, config = (
        JsonlReader(str(corpus)),
        MinhashConfig(hash_config=HashConfig(precision=64), n_grams=5, num_buckets=14, hashes_per_bucket=8),
    )
    shards = DocumentTokenizer(str(out / "shards"), tokenizer_name_or_path=str(tokenizer), shuffle_documents=False, eos_token=None)
    if not whole:
        run(read, shards)
    else:
        kept, ends = str(out / "kept"), ["signatures", "buckets", "removed"]
        names = {name: str(out / name) for name in ends}
        filters = (GopherRepetitionFilter(), GopherQualityFilter(), C4QualityFilter(filter_no_terminal_punct=False), FineWebQualityFilter())
        run(read, *filters, JsonlWriter(kept))
        run(JsonlReader(kept), MinhashDedupSignature(output_folder=names["signatures"], config=config, language="en"))
        run(MinhashDedupBuckets(input_folder=names["signatures"], output_folder=names["buckets"], config=config), tasks=14)
        run(MinhashDedupCluster(input_folder=names["buckets"], output_folder=names["removed"], config=config))
        run(JsonlReader(kept), MinhashDedupFilter(input_folder=names["removed"]), shards)
    return sum(path.stat().st_size for path in (out / "shards").glob("*.ds")) // 2


def megatron(corpus: Path, tokenizer: Path, out: Path) -> int:
    """What Megatron-LM's tools/preprocess_data.py does with each line, in one process; the tool itself is not in the package."""
    import typing

    import typing_extensions

    vars(typing).setdefault("override", typing_extensions.override)  # which megatron-core takes from Python 3.12
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from transformers import PreTrainedTokenizerFast

    encoder, count = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer)), 0
    builder = IndexedDatasetBuilder(str(out / "ids.bin"), dtype=DType.optimal_dtype(len(encoder)))
    for path in sorted(corpus.glob("*.jsonl")):
        for line in path.open():
            ids = [*encoder(json.loads(line)["text"], add_special_tokens=False).input_ids, 0]
            builder.add_document(torch.IntTensor(ids), [len(ids)])
            count += len(ids)
    builder.finalize(str(out / "ids.idx"))
    return count


CONTESTANTS: dict[str, Work] = {
    "tokenize quintet": lambda c, t, o: quintet(c, t, o, whole=False),
    "tokenize tokenizers": lambda c, t, o: plain(c, t, o / "ids.bin"),
    "tokenize datatrove": lambda c, t, o: datatrove(c, t, o, whole=False),
    "tokenize megatron": lambda c, t, o: megatron(c, t, o),
    "whole quintet": lambda c, t, o: quintet(c, t, o, whole=True),
    "whole datatrove": lambda c, t, o: datatrove(c, t, o, whole=True),
}


def once(name: str, corpus: Path, tokenizer: Path) -> dict[str, float]:
    """CPU seconds of one run, its children's included, imports left out by a first run on a little of the corpus."""
    with tempfile.TemporaryDirectory() as folder:
        little = Path(folder) / "little"
        little.mkdir()
        first = sorted(corpus.glob("*.jsonl"))[0]
        (little / first.name).write_text("".join(first.read_text().splitlines(keepends=True)[:20]))
        for step in ("warm", "out"):
            (Path(folder) / step).mkdir()
        CONTESTANTS[name](little, tokenizer, Path(folder) / "warm")
        began = sum(os.times()[:4])
        tokens = CONTESTANTS[name](corpus, tokenizer, Path(folder) / "out")
        return {"cpu_seconds": sum(os.times()[:4]) - began, "tokens": tokens}


def main() -> None:
    """Run the contestants one after another and print their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=8)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--datatrove", metavar="PYTHON")
    parser.add_argument("--megatron", metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=("tokenize", "whole"), default="")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        name, corpus, tokenizer = arguments.only
        print(json.dumps(once(name, Path(corpus), Path(tokenizer))))
        return
    from startup import circumstances, headline, write_json  # a peer's interpreter may lack what it imports

    facts = circumstances("numpy", "tokenizers", "gigatoken")
    facts["command"] = re.sub(r"(?<=--datatrove )\S+|(?<=--megatron )\S+|(?<=--tokenizer )\S+", "PATH", facts["command"])
    print(headline(facts))
    with tempfile.TemporaryDirectory() as folder:
        corpus, tokenizer = Path(folder) / "corpus", arguments.tokenizer or Path(folder) / "tokenizer.json"
        write_corpus(corpus, arguments.megabytes)
        size = sum(path.stat().st_size for path in corpus.iterdir())
        if arguments.tokenizer is None:
            from quintet.data.tokenizer import train_bpe

            texts = (json.loads(line)["text"] for path in sorted(corpus.iterdir())[:20] for line in path.open())
            train_bpe(texts, arguments.vocab_size).save(tokenizer)
        pythons = {"datatrove": arguments.datatrove, "megatron": arguments.megatron}
        names = [name for name in CONTESTANTS if arguments.part in name and pythons.get(name.split()[1], sys.executable)]
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for turn in range(arguments.rounds):
            for name in names:
                if name != "whole datatrove" or not turn:  # which takes minutes
                    runs[name].append(timed(pythons.get(name.split()[1], sys.executable), name, corpus, tokenizer))
        results = {}
        for name in names:
            took, tokens = statistics.median(run["cpu_seconds"] for run in runs[name]), runs[name][0]["tokens"]
            speed, rate = size / took / 1e6, tokens / took / 1e6
            results[name] = {"cpu_seconds": took, "tokens": tokens, "mega_tokens_per_second": rate, "megabytes_per_second": speed}
            ratio = results[name]["quintet_is_times"] = took / results[f"{name.split()[0]} quintet"]["cpu_seconds"]
            print(f"{name:20} {took:8.2f} s of CPU  {speed:7.2f} MB/s  {tokens:,} tokens, {rate:6.2f} M/s  quintet is {ratio:6.1f}x")
    write_json(arguments.json, facts, {"bytes": size, "results": results})


def timed(python: str, name: str, corpus: Path, tokenizer: Path) -> dict[str, float]:
    """One run in a process of its own on one core."""
    one = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "LOGURU_LEVEL": "ERROR"}
    words = [python, __file__, "--only", name, str(corpus), str(tokenizer)]
    run = subprocess.run(words, capture_output=True, text=True, env=dict(os.environ, **one), preexec_fn=_pin)
    if run.returncode:
        sys.exit(f"{name} failed:\n{run.stderr[-3000:]}")
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def _pin() -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


if __name__ == "__main__":
    main()
