"""Making the machine ready: device, threads, allocator and matmul arithmetic, set once at the start of a process."""

from __future__ import annotations

import ctypes
import math
import os
import resource
import sys
import time

import torch

from quintet.errors import UsageError
from quintet.monitor.machine import total_memory
from quintet.spec.run import Precision, Train

# Numbers of mallopt(3) in glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def prepare(train: Train) -> torch.device:
    """Apply the machine's settings and return the device. Raises UsageError where CUDA is asked for and absent."""
    if train.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("train.device is 'cuda' but torch sees no CUDA device; use --train.device cpu, or see: quintet doctor")
    device = torch.device("cuda" if train.device != "cpu" and torch.cuda.is_available() else "cpu")
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if train.num_threads or ranks_here > 1:
        torch.set_num_threads(train.num_threads or max(1, len(os.sched_getaffinity(0)) // ranks_here))
    if device.type == "cuda":
        place = int(os.environ.get("LOCAL_RANK", "0"))
        if place >= torch.cuda.device_count():
            raise UsageError(
                f"process {place} of this node has no device of its own: torch sees {torch.cuda.device_count()}; start at most as many "
                "processes on each node as it has devices (torchrun --nproc-per-node), or use --train.device cpu"
            )
        torch.cuda.set_device(place)
    if device.type == "cpu":
        keep_freed_memory()
        prefer_fast_fp32()
    return device


def keep_freed_memory() -> None:
    """Let malloc reuse large blocks instead of returning them to the kernel, which zeroes each page anew at the next use.

    Element-wise operations on tensors above 32 MiB run several times faster so (benchmarks/attention.py). glibc only.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another libc: nothing to tune
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_TOP_PAD, 64 << 20)


def prefer_fast_fp32() -> bool:
    """Let oneDNN do the fp32 products where that stays fp32: about twice MKL's speed on AMD.

    The setting that selects oneDNN permits bf16 rounding, which it uses only on CPUs with AMX; a trial product decides.
    Returns whether the setting is on.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if not torch.backends.mkldnn.is_available() or not hasattr(matmul, "fp32_precision"):
        return False
    assert matmul is not None
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(256, 256, generator=generator) for _ in range(2))
    matmul.fp32_precision = "bf16"
    if ((a @ b).double() / (a.double() @ b.double()) - 1).abs().max() > 1e-5:
        matmul.fp32_precision = "none"
        return False
    return True


def memory_of_rank(device: torch.device) -> float:
    """Bytes that this rank may use: of its CUDA device, else its share of the machine's memory; infinite where that is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    there = total_memory()
    return math.inf if there is None else there / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def peak_memory(device: torch.device) -> int:
    """Largest memory held so far, in bytes: of the CUDA device, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured_peak(device: torch.device, precision: Precision) -> float:
    """Best rate of a large square product on this device and its current threads, in FLOP/s: what the MFU is measured against."""
    size, dtype = (4096 if device.type == "cuda" else 1024), torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(12):
        begin = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def synchronize(device: torch.device) -> None:
    """Wait for queued device work, so that wall time means something."""
    if device.type == "cuda":
        torch.cuda.synchronize()
