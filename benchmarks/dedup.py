"""Near duplicates: documents per second of one core and what is found, beside Daft's MinHash, rensa and datatrove, and the LSH curve.

    python benchmarks/dedup.py [--documents 4000] [--words 600] [--rounds 3] [--json FILE]
        [--peer rensa=PYTHON] [--peer daft=PYTHON] [--peer datatrove=PYTHON]

Documents are made of words drawn by Zipf's law. For every level of similarity some pairs are planted: the second is the first with words
replaced until the 5-grams' Jaccard similarity is about that level. All contestants get the same documents and the same 14 bands of 8; a
pair counts as found if both share a band (datatrove: if its clustering joins them). Rates count the fingerprints alone (datatrove: its
signature stage and all after it), in seconds of CPU. A peer runs under an interpreter of its own, which must have its package.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LEVELS = (0.4, 0.6, 0.7, 0.8, 0.9, 0.95)
BANDS, ROWS, NGRAM = 14, 8, 5
Keys = list[list[int]]


def documents(count: int, words: int, *, seed: int = 0) -> tuple[list[str], list[tuple[int, int, float]]]:
    """Documents, and the planted pairs with their true similarity."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 10))) for _ in range(20_000)]
    weights = [1 / (i + 10) for i in range(len(vocabulary))]
    texts, pairs = [], []
    while len(texts) < count:
        base = rng.choices(vocabulary, weights, k=rng.randint(words // 2, 2 * words))
        texts.append(" ".join(base))
        if rng.random() < 0.5:
            level = rng.choice(LEVELS)
            # A replaced word spoils NGRAM shingles: of a share x replaced words (1 - x)^NGRAM are left in both, J = k / (2 - k).
            kept = (2 * level / (1 + level)) ** (1 / NGRAM)
            other = [word if rng.random() < kept else rng.choice(vocabulary) for word in base]
            pairs.append((len(texts) - 1, len(texts), similarity(base, other)))
            texts.append(" ".join(other))
    return texts, pairs


def similarity(a: Sequence[str], b: Sequence[str]) -> float:
    """Jaccard similarity of the n-grams."""
    grams = [{tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)} for words in (a, b)]
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def quintet(texts: list[str]) -> Keys:
    """Fingerprints as `quintet prepare` makes them."""
    from quintet.data.minhash import bands
    from quintet.data.part import GROUP_BYTES, grouped
    from quintet.data.texts import Texts, reuse_memory

    reuse_memory()
    raws = [text.encode() for text in texts]
    return [row for group in grouped(raws, GROUP_BYTES) for row in bands(Texts(group), ngram=NGRAM, bands=BANDS, rows=ROWS).tolist()]


def daft(texts: list[str]) -> Keys:
    """Daft's native minhash of word n-grams."""
    import daft as library
    from daft.functions import minhash

    frame = library.from_pydict({"text": texts})
    found = frame.select(minhash(frame["text"], num_hashes=BANDS * ROWS, ngram_size=NGRAM, hash_function="xxhash")).to_pydict()["text"]
    return [banded(row) for row in found]


def rensa(texts: list[str]) -> Keys:
    """rensa's RMinHash over n-grams that Python makes, as its own documentation does."""
    from rensa import RMinHash

    found = []
    for text in texts:
        words = text.split()
        minhash = RMinHash(num_perm=BANDS * ROWS, seed=1)
        minhash.update([" ".join(words[i : i + NGRAM]) for i in range(max(len(words) - NGRAM + 1, 1))])
        found.append(banded(minhash.digest()))
    return found


def datatrove(texts: list[str]) -> Keys:
    """All four stages of datatrove; two documents of a cluster get one key."""
    from datatrove.data import Document
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig

    config = MinhashConfig(hash_config=HashConfig(precision=64), n_grams=NGRAM, num_buckets=BANDS, hashes_per_bucket=ROWS)
    with tempfile.TemporaryDirectory() as folder:
        data = [Document(text=text, id=str(i)) for i, text in enumerate(texts)]
        MinhashDedupSignature(output_folder=f"{folder}/signatures", config=config, language="en").run(data, 0, 1)
        for bucket in range(BANDS):
            stage = MinhashDedupBuckets(input_folder=f"{folder}/signatures", output_folder=f"{folder}/buckets", config=config)
            stage.run(None, bucket, BANDS)
        cluster = MinhashDedupCluster(
            input_folder=f"{folder}/buckets", output_folder=f"{folder}/removed", config=config, save_cluster_id=True
        )
        cluster.run(None, 0, 1)
        return clusters(Path(folder) / "removed", len(texts))


def clusters(folder: Path, count: int) -> Keys:
    """One key per document: its cluster where it has one."""
    import struct

    keys = [[-1 - i] for i in range(count)]
    for path in sorted(folder.glob("*.clusters")):
        for document, cluster in struct.iter_unpack("<II", path.read_bytes()):
            keys[document] = [cluster]
    return keys


def banded(row: Sequence[int]) -> list[int]:
    """The hash of each band's values."""
    return [hash((band, *row[band * ROWS : (band + 1) * ROWS])) for band in range(BANDS)]


CONTESTANTS: dict[str, Callable[[list[str]], Keys]] = {"quintet": quintet, "daft": daft, "rensa": rensa, "datatrove": datatrove}


def one(name: str, arguments: argparse.Namespace) -> dict[str, object]:
    """One contestant's rate and recall, in this process."""
    texts, pairs = documents(arguments.documents, arguments.words)
    work = CONTESTANTS[name]
    work(texts[:50])
    began = time.process_time()
    keys = work(texts)
    took = time.process_time() - began
    recall = {}
    for level in LEVELS:
        mine = [(a, b, s) for a, b, s in pairs if min(LEVELS, key=lambda x: abs(x - s)) == level]
        found = sum(any(x == y for x, y in zip(keys[a], keys[b], strict=True)) for a, b, _ in mine)
        expected = sum(1 - (1 - s**ROWS) ** BANDS for *_, s in mine)
        recall[str(level)] = {"pairs": len(mine), "found": found / max(len(mine), 1), "curve": expected / max(len(mine), 1)}
    planted = {tuple(sorted(pair[:2])) for pair in pairs}
    rng = random.Random(1)
    strangers = [(a, b) for a, b in (sorted(rng.sample(range(len(texts)), 2)) for _ in range(20_000)) if (a, b) not in planted]
    wrong = sum(any(x == y for x, y in zip(keys[a], keys[b], strict=True)) for a, b in strangers)
    size = sum(len(text.encode()) for text in texts)
    return {"documents": len(texts), "megabytes": size / 1e6, "cpu_seconds": took, "documents_per_second": len(texts) / took,
            "megabytes_per_second": size / took / 1e6, "recall": recall, "strangers_joined": wrong}  # fmt: skip


def main() -> None:
    """Run every contestant in a process of its own and print them side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=4000)
    parser.add_argument("--words", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(one(arguments.only, arguments)))
        return
    from startup import circumstances, headline, rotated, write_json  # a peer's interpreter may lack what it imports

    peers = {"quintet": sys.executable} | dict(peer.split("=", 1) for peer in arguments.peer)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "DAFT_NUM_THREADS"), "1")
    facts = circumstances("numpy")
    facts["command"] = re.sub(r"=\S+", "=PYTHON", facts["command"])
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in peers}
    words = ["--documents", str(arguments.documents), "--words", str(arguments.words)]
    for turn in range(arguments.rounds):  # In turns, so that what else the machine does hits all alike; datatrove, which is slow, once.
        for name in rotated(list(peers), turn):
            if turn == 0 or name != "datatrove":
                command = [peers[name], __file__, "--only", name, *words]
                run = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, **threads))
                if run.returncode:
                    sys.exit(f"{name} failed:\n{run.stderr[-3000:]}")
                runs[name].append(json.loads(run.stdout.splitlines()[-1]))
    results = {name: sorted(found, key=lambda run: run["cpu_seconds"])[len(found) // 2] for name, found in runs.items()}
    base = results["quintet"]["documents_per_second"]
    print(headline(facts))
    for name, result in results.items():
        result["quintet_is_times"] = base / result["documents_per_second"]
        recall = "  ".join(f"{level}: {r['found']:.3f} ({r['curve']:.3f})" for level, r in result["recall"].items())
        print(f"{name:10} {result['documents_per_second']:10,.0f} documents/s  {result['megabytes_per_second']:7.1f} MB/s  quintet is "
              f"{result['quintet_is_times']:6.1f}x   recall (curve) {recall}   strangers joined {result['strangers_joined']}")  # fmt: skip
    if arguments.json:
        write_json(arguments.json, facts, {"results": results})


if __name__ == "__main__":
    main()
