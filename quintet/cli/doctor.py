"""`quintet doctor`: what this machine can do, and what is missing, with the line that installs it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from quintet.cli.options import Switch, read
from quintet.monitor.machine import Finding, findings, memory_bytes, num_cores
from quintet.monitor.units import num_bytes
from quintet.spec.cluster import Link, dumps


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Tell what this machine can do, and what is missing with the line that installs it."""

    measure: Switch = False
    """Also measure the peak of matrix multiplication, which MFU is told against; takes some seconds."""
    cluster: Path | None = None
    """Also measure copies, attention and messages, and write a cluster.toml that `quintet plan --gpu cluster.toml` plans with; takes
    longer, and wants a quiet machine."""
    json: Switch = False
    """Print JSON."""


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code: 0, or 1 where something that every installation has is missing."""
    given = read(Arguments, arguments, command="doctor")
    found = [*findings(), *torch_findings(), *(measured() if given.measure else [])]
    if given.cluster:
        found.append(write_cluster(given.cluster))
    if given.json:
        print(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        Console().print(table(found))
    return 1 if any(finding.missing for finding in found) else 0


def table(found: list[Finding]) -> Table:
    """The findings for a person."""
    rows = Table(box=None, show_header=False, padding=(0, 2), pad_edge=False)
    rows.add_column(no_wrap=True)
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column()
    for finding in found:
        mark = ("✗", "bold red") if finding.missing else ("!", "yellow") if finding.remedy else ("✓", "green")
        value = Text(finding.value)
        if finding.remedy:
            value.append(f"\n{finding.remedy}", style="italic")
        rows.add_row(Text(*mark), finding.name, value)
    return rows


def torch_findings() -> list[Finding]:
    """What torch can use here; nothing without torch, whose absence `findings` tells."""
    try:
        import torch
    except ImportError:
        return []
    found = [
        Finding(name="torch build", value=f"{torch.__version__}, CPU kernels for {torch.backends.cpu.get_cpu_capability()}"),
        Finding(
            name="torch threads",
            value=f"{torch.get_num_threads()} of {num_cores()} cores",
            remedy=None if torch.get_num_threads() >= num_cores() else "set by OMP_NUM_THREADS; --train.num-threads overrides it",
        ),
    ]
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return [*found, Finding(name="CUDA", value="no device" if built else "torch was built without it; the CPU is used")]
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        value = f"{device.name}, {num_bytes(device.total_memory)}, compute capability {device.major}.{device.minor}"
        found.append(Finding(name=f"CUDA device {i}", value=value))
    return found


def measured() -> list[Finding]:
    """The measured peak of matrix multiplication in both precisions, set up as for training."""
    from quintet.spec.run import Train
    from quintet.train import device

    here = device.prepare(Train())
    peaks = [("bf16", device.measured_peak(here, "bf16")), ("fp32", device.measured_peak(here, "fp32"))]
    return [Finding(name=f"peak in {precision}", value=f"{peak / 1e9:,.0f} GFLOP/s on {here.type}") for precision, peak in peaks]


def write_cluster(path: Path) -> Finding:
    """Measure this machine and write it for the planner: a device with its own memory, or on CPU one rank that has all of the machine."""
    from quintet.spec.run import Train
    from quintet.train import device
    from quintet.train.measure import measured_cluster

    here = device.prepare(Train())
    if here.type == "cuda":
        import torch

        about = torch.cuda.get_device_properties(here)
        name, memory, num, link = about.name, float(about.total_memory), torch.cuda.device_count(), None
    else:
        name, memory, num, link = "cpu", float(memory_bytes()), 1, message_link()
    cluster = measured_cluster(here, name=name, memory_bytes=memory, num_devices=num, link=link)
    path.write_text(dumps(cluster))
    gpu, link = cluster.gpu, cluster.link
    rates = (
        f"bf16 {gpu.peak.bf16 / 1e9:,.0f} GFLOP/s, memory {gpu.memory_bandwidth / 1e9:.1f} GB/s, messages {link.effective / 1e9:.2f} GB/s"
    )
    value = f"{path}: {rates}"
    return Finding(name="cluster", value=value)


def message_link() -> Link:
    """Latency and bandwidth of messages between two processes here."""
    from quintet.launch.local import run_on_ranks
    from quintet.train.measure import gather_seconds, link_of

    return link_of(*run_on_ranks(2, gather_seconds, (), preload=("quintet.train.measure",))[0])
