"""The engines that need an extra make the bytes of the local one: Daft's native runner, and a Ray cluster of two workers.

    pip install -c constraints.txt -e '.[dev,ray]' && python -m pytest -n0 tests/cluster

Without Ray or Daft these tests are skipped. They take about a minute.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from quintet.data.engine import Daft, Local
from quintet.data.prepare import open_prepared, prepare
from quintet.data.tokenizer import train_bpe
from quintet.errors import DataError
from quintet.spec import parse
from quintet.spec.quality import Dedup
from quintet.spec.run import Data
from tests.data.corpus import some_texts, source, write_texts

INSTALL = "needs Daft and Ray: pip install -c constraints.txt -e '.[dev,ray]'"
pytest.importorskip("daft", reason=INSTALL)
pytest.importorskip("ray", reason=INSTALL)

# Daft's and Ray's own.
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::ResourceWarning")]

CLUSTER = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
print("address", cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
PREPARE = """
import json, sys
from pathlib import Path
import ray
from quintet.cli.main import main
code = main(["prepare", *sys.argv[1:]])
print("workers", sum(node["Alive"] for node in ray.nodes()))
sys.exit(code)
"""


@pytest.fixture
def data(tmp_path: Path) -> Data:
    """Three sources, so three parts, with duplicates between them."""
    texts = {name: some_texts(40, seed=seed) for seed, name in enumerate(("one", "two", "three"))}
    texts["three"] += texts["one"][:5]
    sources = tuple(replace(source(write_texts(tmp_path / name, found)), name=name) for name, found in texts.items())
    train_bpe(texts["one"], 400).save(tmp_path / "tokenizer.json")
    return Data(sources=sources, directory=str(tmp_path / "prepared"), tokenizer=str(tmp_path / "tokenizer.json"), dedup=Dedup())


def test_daft_here_makes_the_same_bytes_and_tells_the_same_errors(data: Data, tmp_path: Path) -> None:
    local = prepare(data, vocab_size=400, seed=0, engine=Local(workers=1))
    daft = prepare(replace(data, directory=str(tmp_path / "daft")), vocab_size=400, seed=0, engine=Daft("native", workers=2))
    assert daft.fingerprint == local.fingerprint
    (tmp_path / "two" / "0003.py").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"0003\.py: nul_bytes"):
        prepare(replace(data, directory=str(tmp_path / "strict"), strict=True), vocab_size=400, seed=0, engine=Daft("native", workers=2))


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a Ray cluster of two nodes with one core each, on this machine."""
    command = [sys.executable, "-c", CLUSTER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdin and process.stdout
        try:
            yield next(line.split()[1] for line in process.stdout if line.startswith("address"))
        finally:
            process.stdin.close()
            process.wait(60)


def test_a_ray_cluster_of_two_workers_makes_the_same_bytes(data: Data, tmp_path: Path, cluster: str) -> None:
    local = prepare(data, vocab_size=400, seed=0, engine=Local(workers=1))
    run = parse.read(Path(__file__).parents[2] / "recipes" / "laptop.toml")
    elsewhere = replace(data, directory=str(tmp_path / "ray"))
    (tmp_path / "recipe.toml").write_text(parse.dumps(replace(run, data=elsewhere)))
    command = [sys.executable, "-c", PREPARE, str(tmp_path / "recipe.toml"), "--engine", "ray", "--workers", "2", "--address", cluster]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0 and "workers 2" in done.stdout, done.stdout + done.stderr
    made = open_prepared(elsewhere, 400)
    assert made.fingerprint == local.fingerprint
    assert made.sources["three"].statistics.exact_duplicates == local.sources["three"].statistics.exact_duplicates == 5


def test_a_cluster_that_does_not_answer_is_told_at_once() -> None:
    with pytest.raises(DataError, match=r"no Ray cluster answers at 127\.0\.0\.1:1 .*ray start --head"):
        Daft("ray", address="127.0.0.1:1")
