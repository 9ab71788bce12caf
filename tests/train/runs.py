"""Runs small enough to train in a second, and the proof that two of them are the same bit for bit."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quintet.checkpoint.load import latest, load, read_manifest
from quintet.monitor.metrics import Event, Record, read_events
from quintet.monitor.sinks import Fanout, JsonLines
from quintet.spec import parse
from quintet.spec.model import Model
from quintet.spec.run import Checkpoint, Data, Evaluation, Monitor, Phase, Run, Source, Train
from quintet.train import device, trainer

MODEL = Model(
    vocab_size=400,
    hidden_size=16,
    num_layers=2,
    num_dense_layers=1,
    num_heads=2,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=4,
    dense_ffn_size=32,
    expert_ffn_size=8,
    num_routed_experts=8,
    num_shared_experts=1,
    num_experts_per_token=2,
    num_groups=4,
    num_groups_per_token=2,
    max_context=64,
    init_std=0.02,
)

PHASE = Phase(
    name="only", length="10 steps", sequence_length=32, batch=("4",), learning_rate=("linear to 1e-2 until 30%", "cosine to 1e-3")
)


def write_texts(folder: Path, *, count: int, seed: int) -> Path:
    """`count` different little texts, one file each."""
    words = "alpha beta gamma delta epsilon zeta eta theta iota kappa def return import class self None".split()
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        (folder / f"{i:03}.py").write_text(f"# {i}\n" + " ".join(rng.choices(words, k=rng.randint(5, 90))) + "\n")
    return folder


def corpus(folder: Path) -> Data:
    """Data of two sources, code and prose, in `folder`."""
    return Data(
        sources=(
            Source(name="code", paths=(str(write_texts(folder / "code", count=60, seed=1)),), domain="code", weight=87),
            Source(name="prose", paths=(str(write_texts(folder / "prose", count=20, seed=2)),), domain="prose", weight=13),
        ),
        directory=str(folder / "prepared"),
        held_out=0.1,
        fim_rate=0.3,
    )


def tiny_run(data: Data, directory: Path) -> Run:
    """Ten steps of a tiny model, in `directory`/tiny."""
    return Run(
        name="tiny",
        directory=str(directory),
        model=MODEL,
        data=data,
        phases=(PHASE,),
        train=Train(micro_batch=2, precision="fp32", compile=False, device="cpu"),
        evaluation=Evaluation(num_sequences=2),
        checkpoint=Checkpoint(keep_last=20),
        monitor=Monitor(live=False, tensorboard=False, prompts=(), sample_tokens=4),
    )


def make_quick(patch: pytest.MonkeyPatch) -> None:
    """Training without measuring the machine's peak and without a report, which tests of other things do not need."""
    patch.setattr(device, "measured_peak", lambda *arguments: 1e9)
    patch.setattr(trainer, "write_report", lambda *arguments, **named: "none")


def write_recipe(run: Run, path: Path) -> Path:
    """The run as a recipe file."""
    path.write_text(parse.dumps(run))
    return path


@dataclass
class At:
    """A sink that acts once, as soon as a step's record comes by."""

    step: int
    act: Callable[[], object]

    def write(self, event: Event) -> None:
        if isinstance(event, Record) and event.step == self.step:
            self.act()

    def close(self) -> None:
        """Nothing to finish."""


def send(number: signal.Signals) -> None:
    """Send this process a signal; its handler has run when this returns."""
    os.kill(os.getpid(), number)


def train(run: Run, *others: At) -> int:
    """Train a new run with a metrics file and no terminal."""
    with Fanout([JsonLines(where(run) / "metrics.jsonl"), *others]) as sinks:
        return trainer.train(run, sinks=sinks)


def resume(run: Run, *others: At) -> int:
    """Resume a run with a metrics file and no terminal."""
    with Fanout([JsonLines(where(run) / "metrics.jsonl"), *others]) as sinks:
        return trainer.resume(where(run), sinks=sinks)


def where(run: Run) -> Path:
    """The run's directory."""
    return Path(run.directory) / run.name


def records(run: Run) -> list[Record]:
    """The records of a run, without what a clock or the machine decides."""
    events = read_events(where(run) / "metrics.jsonl")
    untimed = {"seconds": 0.0, "tokens_per_second": 0.0, "mfu": None, "peak_memory_bytes": 0}
    return [replace(event, **untimed) for event in events if isinstance(event, Record)]  # type: ignore[arg-type]


def checkpoint(run: Run) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Every tensor and every plain value of a run's newest checkpoint."""
    path = latest(where(run) / "checkpoints", verify_content=True)
    saved = read_manifest(path).tensors
    tensors = {name: torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype)) for name, tensor in saved.items()}
    return tensors, load(tensors, path)


def expert_bias(path: Path) -> torch.Tensor:
    """The router biases of a checkpoint: [MoE layers, MTP module's included, E]."""
    names = [name for name in read_manifest(path).tensors if name.endswith("expert_bias")]
    tensors = {name: torch.empty(MODEL.num_routed_experts) for name in names}
    load(tensors, path, strict=False)
    return torch.stack([*tensors.values()])


def assert_same(one: Run, two: Run) -> None:
    """Two runs have the same records and, in their newest checkpoints, the same bits: weights, moments, data order, random numbers."""
    assert records(one) == records(two)
    (tensors, values), (others, other_values) = checkpoint(one), checkpoint(two)
    assert values == other_values
    assert tensors.keys() == others.keys()
    different = [name for name, tensor in tensors.items() if not torch.equal(_bits(tensor), _bits(others[name]))]
    assert not different, different


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
