"""What the trainer's tests share: prepared little texts, a run over them, and no time spent on what they do not look at."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from quintet.data.prepare import Prepared, prepare
from quintet.spec.run import Data, Run
from tests.train.runs import MODEL, corpus, make_quick, tiny_run


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Two prepared sources that no test changes."""
    data = corpus(tmp_path_factory.mktemp("corpus"))
    prepare(data, vocab_size=MODEL.vocab_size, seed=0)
    return data


@pytest.fixture(scope="session")
def prepared(data: Data) -> Prepared:
    """The same, opened."""
    return prepare(data, vocab_size=MODEL.vocab_size, seed=0)


@pytest.fixture
def run(data: Data, tmp_path: Path) -> Run:
    """Ten steps in a directory of the test's own."""
    return tiny_run(data, tmp_path / "runs")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a tiny run's time."""
    make_quick(monkeypatch)


@pytest.fixture(autouse=True, scope="session")
def _few_words() -> None:
    """Without torch's notes on every part of every save, of which a failed test would show thousands of lines."""
    logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)


@pytest.fixture(autouse=True, scope="session")
def _own_arithmetic() -> Iterator[None]:
    """Give back the matmul setting that training chooses for its process."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    yield
    matmul.fp32_precision = before
