"""`quintet doctor`: what this machine can do, and what is missing, with the line that installs it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from quintet.cli.options import Switch, read
from quintet.errors import UsageError
from quintet.monitor.machine import Finding, findings, memory_bytes, num_cores
from quintet.monitor.units import num_bytes
from quintet.spec.cluster import Cluster, dumps


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Tell what this machine can do, and what is missing with the line that installs it."""

    measure: Switch = False
    """Also measure the peak of matrix multiplication, which MFU is told against; takes some seconds."""
    cluster: Path | None = None
    """Also measure all kinds of calls and messages, and write a cluster.toml that `quintet plan --gpu cluster.toml` plans with; takes
    up to a minute, and wants a quiet machine."""
    ranks: int | None = None
    """With --cluster on a CPU: ranks that are measured at once and share the cores; absent: 2, or 1 where there is one core."""
    json: Switch = False
    """Print JSON."""


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code: 0, or 1 where something that every installation has is missing."""
    given = read(Arguments, arguments, command="doctor")
    found = [*findings(), *torch_findings(), *(measured() if given.measure else [])]
    if given.cluster:
        found.append(write_cluster(given.cluster, ranks=given.ranks))
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


def write_cluster(path: Path, *, ranks: int | None) -> Finding:
    """Measure this machine and write it for the planner: its devices, or on CPU ranks that share its cores. Raises UsageError."""
    from quintet.spec.run import Train
    from quintet.train import device

    here = device.prepare(Train())
    if here.type == "cuda" and ranks is not None:
        raise UsageError(f"--ranks ({ranks}) is for CPUs; here each CUDA device has a rank of its own")
    if here.type == "cpu" and ranks is not None and not 1 <= ranks <= num_cores():
        raise UsageError(f"--ranks ({ranks}) must lie between 1 and the {num_cores()} cores of this machine")
    cluster = measured_cpu(ranks or min(2, num_cores())) if here.type == "cpu" else measured_devices()
    path.write_text(dumps(cluster))
    gpu, link = cluster.gpu, cluster.link
    value = (
        f"{path}: {cluster.num_gpus} x {gpu.name}, bf16 {gpu.peak.bf16 / 1e9:,.0f} GFLOP/s, memory {gpu.memory_bandwidth / 1e9:.1f} GB/s, "
        f"messages {link.effective / 1e9:.2f} GB/s"
    )
    return Finding(name="cluster", value=value)


def measured_cpu(ranks: int) -> Cluster:
    """This machine's cores and memory, shared by so many ranks, all measured at once. Raises RankError."""
    from quintet.launch.local import run_on_ranks
    from quintet.train.measure import measured_cluster, rank_figures

    found = run_on_ranks(ranks, rank_figures, (), preload=("quintet.train.measure",))
    cores = max(1, num_cores() // ranks)
    return measured_cluster(found, name="cpu", memory_bytes=memory_bytes() / ranks, num_devices=ranks, num_cores=cores)


def measured_devices() -> Cluster:
    """This machine's CUDA devices, by the first of them."""
    import torch

    from quintet.train.measure import device_figures, measured_cluster

    about = torch.cuda.get_device_properties(0)
    return measured_cluster(
        [device_figures(torch.device("cuda"))],
        name=about.name,
        memory_bytes=float(about.total_memory),
        num_devices=torch.cuda.device_count(),
        num_cores=about.multi_processor_count,
    )
