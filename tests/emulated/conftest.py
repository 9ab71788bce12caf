"""What runs on emulated devices are made of: the trainer's little texts."""

from __future__ import annotations

from tests.train.conftest import data as data
