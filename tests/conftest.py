"""What every test shares: one thread, fixed seeds, and how hard hypothesis looks."""

from __future__ import annotations

import os

# Before torch is imported, for this process and for those that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

import random
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# A shared machine makes time limits per example meaningless.
settings.register_profile("quintet", deadline=None, max_examples=50, print_blob=True)
settings.load_profile("quintet")

ROOT = Path(__file__).parent.parent


@pytest.fixture
def root() -> Path:
    """The folder of the repository."""
    return ROOT


@pytest.fixture
def seed() -> int:
    """The seed of everything random in a test."""
    return 20241226


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    """A CPU generator of its own, seeded."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def _fixed_seeds(seed: int) -> None:
    """Every test starts from the same state of the global generators."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
