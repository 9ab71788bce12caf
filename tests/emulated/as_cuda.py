"""A pytest plugin that runs tests/gpu on the stand-ins for CUDA and NCCL, to see that these tests themselves are right:

pytest -n0 -p tests.emulated.as_cuda tests/gpu
"""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from quintet.train import device as machine
from tests.accelerator import accelerated, nccl

_open = ExitStack()


def pytest_configure(config: pytest.Config) -> None:
    """Before a test asks whether there is a device."""
    here = _open.enter_context(accelerated())
    _open.enter_context(nccl(here))
    patch = _open.enter_context(pytest.MonkeyPatch.context())
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    patch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    patch.setattr(machine, "measured_peak", lambda *arguments: 1e12)  # a device's large product takes a CPU minutes


def pytest_unconfigure(config: pytest.Config) -> None:
    """The device goes."""
    _open.close()
