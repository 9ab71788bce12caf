"""What this machine is and has: processor, memory, disk, compiler and packages, each with the remedy where something is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from quintet.errors import install_line
from quintet.monitor.units import num_bytes

CORE = (
    "torch numpy msgspec tomli-w tyro rich tokenizers gigatoken orjson zstandard blake3 psutil safetensors pyarrow matplotlib tensorboard"
).split()
"""Packages that every installation has."""

OPTIONAL = {"transformers": "dev", "pytest": "dev", "hypothesis": "dev", "ruff": "dev", "mypy": "dev"}
OPTIONAL |= {"py3langid": "language", "warcio": "warc", "daft": "data", "ray": "ray", "moto": "dev"}
OPTIONAL |= {"s3fs": "s3", "gcsfs": "gs", "huggingface_hub": "hf"}
"""Optional packages and the extra that installs each."""

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")
"""Instruction sets that matrix products use, as /proc/cpuinfo names them (x86, then ARM)."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked for."""

    name: str
    """What was looked for."""
    value: str
    """What was found."""
    missing: bool = False
    """Whether something cannot be done for want of it."""
    remedy: str | None = None
    """How to get it, or what to know about it."""


def findings() -> list[Finding]:
    """Everything that can be told without torch."""
    return [*_system(), *_compiler(), *_packages()]


def _system() -> list[Finding]:
    flags = cpu_flags()
    memory = psutil.virtual_memory()
    limit = memory_limit()
    disk = shutil.disk_usage(Path.cwd())
    return [
        Finding(name="Python", value=f"{platform.python_version()} at {sys.executable}"),
        Finding(name="system", value=f"{platform.system()} {platform.release()} {platform.machine()}"),
        Finding(name="processor", value=cpu_name()),
        Finding(name="cores", value=f"{num_cores()} usable, {psutil.cpu_count(logical=False) or '?'} physical"),
        Finding(name="instructions", value=" ".join(flag for flag in _FLAGS if flag in flags) or "not told by this system"),
        _bf16(flags),
        Finding(
            name="memory",
            value=f"{num_bytes(memory.available)} free of {num_bytes(memory.total)}"
            + (f", limited to {num_bytes(limit)}" if limit is not None and limit < memory.total else ""),
        ),
        Finding(name="disk here", value=f"{num_bytes(disk.free)} free of {num_bytes(disk.total)}"),
    ]


def _bf16(flags: frozenset[str]) -> Finding:
    if "amx_bf16" in flags:
        return Finding(name="bf16 on the CPU", value="fast (AMX tiles)")
    if "avx512_bf16" in flags or "bf16" in flags:
        return Finding(name="bf16 on the CPU", value="in hardware")
    return Finding(name="bf16 on the CPU", value="emulated", remedy="fp32 may be faster here: --train.precision fp32")


def _compiler() -> list[Finding]:
    compiler = next((path for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name and (path := shutil.which(name))), None)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    remedy = "without it steps run eagerly, slower; on Debian: apt-get install g++"
    found = [Finding(name="C++ compiler", value=compiler or "none", missing=compiler is None, remedy=None if compiler else remedy)]
    if compiler and not header.exists():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        found.append(
            Finding(
                name="Python headers",
                value="none",
                missing=True,
                remedy=f"torch.compile needs {header}; on Debian: apt-get install python{version}-dev",
            )
        )
    return found


def _packages() -> list[Finding]:
    core = [_package(name, f"pip install -c constraints.txt {name}") for name in CORE]
    return core + [_package(name, install_line(extra)) for name, extra in OPTIONAL.items()]


def _package(name: str, install: str) -> Finding:
    try:
        return Finding(name=name, value=importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name=name, value="not installed", missing=name in CORE, remedy=install)


def memory_bytes() -> int:
    """Bytes of the machine's memory."""
    total: int = psutil.virtual_memory().total
    return total


def free_memory() -> int:
    """Bytes that can be had now without swapping, as far as the control group allows."""
    available: int = psutil.virtual_memory().available
    limit, used = memory_limit(), _read("/sys/fs/cgroup/memory.current").strip()
    return min(available, max(limit - int(used), 0)) if limit is not None and used.isdigit() else available


def num_cores() -> int:
    """Logical cores that this process may use: its affinity, and the control group's quota rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    return min(cores, max(1, -(-int(quota) // int(period)))) if quota.isdigit() and period.strip().isdigit() else cores


def total_memory() -> int | None:
    """Bytes of memory that this machine has or its control group allows, whichever is less; None where the system does not tell."""
    lines = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines() if ":" in line)
    kib = lines.get("MemTotal", "").removesuffix("kB").strip()
    known = [int(kib) << 10 if kib.isdigit() else None, memory_limit()]
    return min((size for size in known if size is not None), default=None)


def has_nvidia() -> bool:
    """Whether the NVIDIA driver shows a device; whether torch can use it, only torch knows."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def memory_limit() -> int | None:
    """Bytes that the control group allows, None without a limit."""
    text = _read("/sys/fs/cgroup/memory.max").strip()
    return int(text) if text.isdigit() else None


def cpu_flags() -> frozenset[str]:
    """Instruction sets of the first processor, as Linux names them; empty elsewhere."""
    return frozenset((_cpuinfo("flags") or _cpuinfo("Features")).split())


def cpu_name() -> str:
    """The processor's own name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    lines = (line.partition(":") for line in _read("/proc/cpuinfo").splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == key), "")


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
