"""What would stop or hurt a run on this machine, told before anything is computed; torch is imported only for a recipe that names CUDA."""

from __future__ import annotations

from collections.abc import Callable

from quintet.cost.memory import step_memory
from quintet.cost.pipeline import fewest_sequences, read_schedule, require_suited
from quintet.data.prepare import foresee
from quintet.errors import QuintetError, SpecError
from quintet.monitor import machine
from quintet.monitor.units import num_bytes
from quintet.schedule import fewest_microbatches
from quintet.spec.curriculum import PhaseCurves
from quintet.spec.layout import without_effect
from quintet.spec.run import Run, Train
from quintet.train import directory


def refusals(run: Run) -> list[str]:
    """What `train` would refuse here, as far as it is cheap to know: the device, the run's directory, the data. Empty: nothing."""
    checks: tuple[Callable[[], object], ...] = (
        lambda: _device(run),
        lambda: require_schedule(run),
        lambda: directory.refuse_existing(run),
    )
    found = [message for check in checks if (message := _message(check))]
    return [*found, *foresee(run.data, vocab_size=run.model.vocab_size)]


def doubts(run: Run) -> list[str]:
    """What `train` would try here although it bodes ill: more memory than there is, more threads than cores, options without effect."""
    return [message for message in (_memory(run), _threads(run.train), *without_effect(run.layout)) if message]


def require_schedule(run: Run) -> None:
    """Raise SpecError where the smallest batch of a phase makes fewer micro-batches than the schedule that was asked for takes, or where
    no step has as many as the one in `layout.schedule_file`."""
    layout, micro_batch = run.layout, run.train.micro_batch
    if layout.pp == 1:
        return
    if layout.schedule_file is not None:
        _require_use(run, layout.schedule_file)
    if layout.schedule is None:
        return
    fewest = fewest_microbatches(layout.schedule, layout.pp)
    for phase in run.phases:
        smallest = max(1, round(PhaseCurves(phase).batch.lowest))
        count = layout.num_microbatches(smallest, micro_batch)
        if count < fewest:
            needed = fewest_sequences(layout, micro_batch)
            raise SpecError(
                f"phase {phase.name!r} has batches of {smallest} sequences, which make {count} micro-batches of train.micro_batch "
                f"({micro_batch}) on each of layout.dp ({layout.dp}) replicas, but {layout.pipeline} on layout.pp ({layout.pp}) takes at "
                f"least {fewest}; raise phases.batch to {needed} or more, lower train.micro_batch, layout.dp or layout.pp, or leave "
                "layout.schedule out, which takes zbv for such steps"
            )


def _require_use(run: Run, file: str) -> None:
    """Raise SpecError unless the file suits the layout, and some steps go by it."""
    layout, kept = run.layout, read_schedule(file)
    require_suited(kept, layout)
    batches = [sentence for phase in run.phases for sentence in PhaseCurves(phase).batch.segments]
    counts = [
        [layout.num_microbatches(max(1, round(size)), run.train.micro_batch) for size in sorted((each.start, each.end))] for each in batches
    ]
    if not any(low <= kept.num_microbatches <= high for low, high in counts):
        low, high = min(min(each) for each in counts), max(max(each) for each in counts)
        raise SpecError(
            f"layout.schedule_file {file!r} is for {kept.num_microbatches} micro-batches, but steps have {low}"
            + (f" to {high}" if high > low else "")
            + f" of train.micro_batch ({run.train.micro_batch}) on each of layout.dp ({layout.dp}) replicas; a batch of "
            f"{layout.dp * run.train.micro_batch * kept.num_microbatches} sequences has as many, or search one with --microbatches {high}"
        )


def _message(check: Callable[[], object]) -> str | None:
    try:
        check()
    except QuintetError as error:
        return str(error)
    return None


def _device(run: Run) -> None:
    if run.train.device == "cuda":
        from quintet.train import device

        device.prepare(Train(device="cuda"))


def _memory(run: Run) -> str | None:
    """Only for a single CPU: the memory of a CUDA device is not known without torch, and a layout divides a step's memory."""
    on_cuda = run.train.device == "cuda" or (run.train.device == "auto" and machine.has_nvidia())
    there = machine.total_memory()
    if on_cuda or there is None or run.layout.num_ranks > 1:
        return None
    lengths = [phase.sequence_length for phase in run.phases]
    memory = step_memory(run.model, run.train, sequence_length=max(lengths))
    copied = memory.weights + memory.master_weights + memory.moments if run.checkpoint.background and run.checkpoint.every else 0
    needed = memory.total + copied
    if needed <= there:
        return None
    return (
        f"a step needs about {num_bytes(needed)}, but this machine has {num_bytes(there)} of memory: it would be stopped there; choose a "
        "smaller model, train.micro_batch or sequence_length, or train.recompute = 'full'"
        + (f", or checkpoint.background = false, which saves a copy of {num_bytes(copied)}" if copied else "")
    )


def _threads(train: Train) -> str | None:
    cores = machine.num_cores()
    if train.num_threads is None or train.num_threads <= cores:
        return None
    return (
        f"train.num_threads ({train.num_threads}) is more than the {cores} cores that this process may use, so threads wait for each "
        "other; leave it out to use all cores"
    )
