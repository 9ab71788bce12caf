"""Little texts, sources and shards for the data room's tests."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from quintet.data.shards import ShardWriter
from quintet.spec.run import Domain, Source

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa def return import class self None".split()


def some_texts(count: int, *, seed: int = 0, longest: int = 120) -> list[str]:
    """Different little texts of 1 to `longest` words."""
    rng = random.Random(seed)
    return [f"# {i}\n" + " ".join(rng.choices(WORDS, k=rng.randint(1, longest))) + "\n" for i in range(count)]


def source(*paths: Path | str, name: str = "code", domain: Domain = "code", weight: float = 1.0, text_key: str = "text") -> Source:
    """A source over `paths`."""
    return Source(name=name, paths=tuple(map(str, paths)), domain=domain, weight=weight, text_key=text_key)


def write_texts(folder: Path, texts: list[str]) -> Path:
    """One .py file per text."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i:04}.py").write_text(text)
    return folder


def write_shard(folder: Path, documents: list[list[int]], *, dtype: str = "uint16") -> Path:
    """A shard of `documents`."""
    with ShardWriter(folder, dtype=dtype) as writer:
        for document in documents:
            writer.append([np.array(document, np.uint32)], num_bytes=3)
        writer.finish(tokenizer="t" * 64)
    return folder
