"""What the data room's tests share: a small tokenizer, and recipes over little sources."""

from __future__ import annotations

import pytest

from quintet.data.prepare import Prepared, prepare
from quintet.data.tokenizer import Tokenizer, train_bpe
from quintet.spec.run import Data
from tests.data.corpus import some_texts, source, write_texts


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A byte-level BPE of 400 tokens, trained on little texts."""
    return train_bpe([*some_texts(200), "def f(x):\n    if x:\n        return [x]\n" * 5], 400)


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, Data]:
    """Two prepared sources: 60 code and 8 prose documents."""
    folder = tmp_path_factory.mktemp("mixed")
    data = Data(
        sources=(
            source(write_texts(folder / "a", some_texts(60, seed=1)), name="code", weight=87.0),
            source(write_texts(folder / "b", some_texts(8, seed=2)), name="prose", domain="prose", weight=13.0),
        ),
        directory=str(folder / "prepared"),
        held_out=0.1,
        fim_rate=0.5,
    )
    return prepare(data, vocab_size=400, seed=0), data
