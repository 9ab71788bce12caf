"""Opening what was trained: the model of a run or checkpoint, and a run made of somebody else's model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quintet.checkpoint import hub_names, huggingface
from quintet.checkpoint.contents import watched, write_alone
from quintet.checkpoint.load import Stored, latest, load, read_extra, read_manifest
from quintet.checkpoint.manifest import step_of
from quintet.checkpoint.pieces import Later, Pieces, box_at, dtype_name, tensors_of, values_of, within
from quintet.checkpoint.place import Place, Remote
from quintet.checkpoint.plan import Item, Plan, Whole
from quintet.checkpoint.save import Job
from quintet.cost.memory import step_memory
from quintet.data.tokenizer import Tokenizer
from quintet.errors import CheckpointError
from quintet.model.transformer import Transformer
from quintet.parallel.mesh import single
from quintet.parallel.precision import DTYPES, cast
from quintet.spec import parse
from quintet.spec.curriculum import curriculum
from quintet.spec.model import Model
from quintet.spec.run import Data, Phase, Precision, Run, Source, Train
from quintet.train import device as machine
from quintet.train import state
from quintet.train.build import build
from quintet.train.directory import CHECKPOINTS, RECIPE, TOKENIZER, checkpoints, create, refuse_existing
from quintet.train.state import Position


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model ready to be used."""

    run: Run
    """The recipe that it was trained with."""
    checkpoint: Place
    """Where it was read from."""
    model: Transformer
    """On `device`, in the run's precision."""
    tokenizer: Tokenizer
    """The one that its data was made with."""
    tokenizer_file: Place
    """Its tokenizer.json."""
    device: torch.device
    """Where the model lies."""
    step: int
    """Optimizer steps done."""
    phase: Phase
    """The phase of the curriculum that they ended in."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A checkpoint that is opened, and not read yet."""

    run: Run
    """The recipe that it was trained with."""
    phase: Phase
    """The phase of the curriculum that training has come to."""
    model: Model
    """The recipe's model as it is in that phase."""
    checkpoint: Place
    """Where it lies."""
    tokenizer: Tokenizer
    """The one that its data was made with."""
    tokenizer_file: Place
    """Its tokenizer.json."""


def find_checkpoint(path: Place) -> Place:
    """The checkpoint that `path` is, or the newest complete one of the run that it is, or of the store's folder. Raises CheckpointError."""
    if step_of(path.name) is not None:
        return path
    if isinstance(path, Remote):
        return latest(path)
    if not (path / RECIPE).is_file():
        raise CheckpointError(f"{path} is neither a run nor a checkpoint; name runs/NAME or runs/NAME/{CHECKPOINTS}/step-...")
    return latest(checkpoints(path, parse.read(path / RECIPE)))


def open_trained(path: Place) -> Trained:
    """The weights of a run's newest checkpoint, or of the checkpoint that `path` names. Raises CheckpointError, DataError."""
    kept = open_kept(path)
    device = machine.prepare(Train(num_threads=kept.run.train.num_threads))
    with torch.device("meta"):
        model = Transformer(kept.model)
    cast(model, kept.run.train.precision)
    model.to_empty(device=device)
    load({f"model.{name}": tensor for name, tensor in model.state_dict().items()}, kept.checkpoint, strict=False)
    return Trained(
        run=kept.run,
        checkpoint=kept.checkpoint,
        model=model,
        tokenizer=kept.tokenizer,
        tokenizer_file=kept.tokenizer_file,
        device=device,
        step=read_manifest(kept.checkpoint).step,
        phase=kept.phase,
    )


def open_kept(path: Place) -> Kept:
    """What `open_trained` opens, its weights left where they are. Raises CheckpointError, DataError."""
    checkpoint = find_checkpoint(path)
    # A run's own recipe may have been edited since, to name other data for example, and `resume` follows it too.
    own = path / RECIPE if isinstance(path, Path) and checkpoint != path else None
    run = parse.read(own) if own else parse.loads(read_extra(checkpoint, RECIPE), origin=f"{checkpoint}/{RECIPE}")
    file = checkpoint / TOKENIZER
    tokenizer = Tokenizer(read_extra(checkpoint, TOKENIZER), origin=str(file))  # verified before it is parsed
    position: Any = read_manifest(checkpoint).values.get("position")
    number = position.get("phase") if isinstance(position, dict) else None
    stretches = curriculum(run)
    phase = stretches[number if isinstance(number, int) and 0 <= number < len(stretches) else -1].phase
    return Kept(run=run, phase=phase, model=run.model_in(phase), checkpoint=checkpoint, tokenizer=tokenizer, tokenizer_file=file)


def stored_weights(kept: Kept, *, master: bool) -> Stored:
    """The model's tensors as the checkpoint has them, each read when it is asked for; with `master`, in place of weights that were rounded
    to bf16 the fp32 master weights. Raises CheckpointError for a checkpoint that lacks them."""
    names = {name: f"model.{name}" for name in hub_names.shapes(kept.model)}
    saved = read_manifest(kept.checkpoint).tensors
    if master:
        rounded = [name for name, full in names.items() if full in saved and saved[full].dtype != "float32"]
        names |= {name: f"optimizer.master.{name}" for name in rounded}
    if missing := set(names.values()) - saved.keys():
        remedy = "export it as bf16, or name another checkpoint" if master else "name another checkpoint"
        raise CheckpointError(f"{kept.checkpoint} lacks {len(missing)} of the {len(names)} tensors, such as {min(missing)}; {remedy}")
    return Stored(kept.checkpoint, names)


def import_run(
    source: Path,
    directory: Path,
    *,
    on_message: Callable[[str], None] = lambda message: None,
    on_progress: huggingface.OnProgress = lambda done, total: None,
) -> None:
    """Make a run, with recipe and a checkpoint of step 0, of a model in Hugging Face's format with a tokenizer.json.

    The recipe trains on the default corpus; edit it before `quintet resume`. `on_message` is told what the files lack of what their
    config.json says, `on_progress` how many of the weights are read. Raises CheckpointError for a directory that is not such a model,
    DataError for its tokenizer, UsageError if the run's directory exists.
    """
    spec = huggingface.read_config(source, on_message=on_message)
    remedy = "an import needs it beside the weights: fetch it from where the model was published, or export the model with its tokenizer"
    tokenizer = Tokenizer.from_file(source / TOKENIZER, remedy=remedy)
    refuse_existing(_imported_recipe(spec, directory, precision="fp32"))  # before all weights are read
    weights = huggingface.Imported(source)
    run = _imported_recipe(spec, directory, precision=_precision(weights))
    create(run, tokenizer)
    write_alone(_imported_state(run, directory, weights, on_progress), directory / CHECKPOINTS, doing=f"importing {source}")


def _imported_state(run: Run, directory: Path, weights: huggingface.Imported, on_progress: huggingface.OnProgress) -> Job:
    """A state of step 0, which is read from the files, a part of a tensor at a time, while it is written."""
    built = build(run, single(), torch.device("meta"), on_message=lambda text: None, drawn=False)
    # No data state: the first resume begins the data anew.
    gathered = state.gather(built, {}, Position())
    rounded, plain = state.rounded(gathered), values_of(gathered)
    tensors = {name: _imported(name, tensor, weights) for name, tensor in tensors_of(gathered).items()}
    items = tuple(
        Item(name, box, next((weight for weight, master in rounded.items() if master == name), None))
        for name, tensor in tensors.items()
        if name not in rounded
        for box in (weights.boxes(_weight(name)) if _weight(name) in weights else [box_at((), tensor.shape)])
    )
    wholes = {name: Whole(dtype_name(each.dtype), tuple(each.shape), rounded.get(name)) for name, each in tensors.items()}
    extras = state.extras(directory, run)
    tensors = watched(tensors, items, on_progress)
    return Job(step=0, tensors=tensors, values=plain, plan=Plan(items, wholes), extras=extras, codec=run.checkpoint.codec)


def _weight(name: str) -> str:
    """The model's tensor that a tensor of a checkpoint belongs to."""
    return re.sub(r"model\.|optimizer\.[a-z_]+\.", "", name, count=1)


def _imported(name: str, like: Tensor | Pieces, weights: huggingface.Imported) -> Later:
    """A tensor of the state of step 0: weights and masters are the files', moments are zeros, the rest is here already."""
    if name.startswith("optimizer.exp_avg"):
        return Later(like.shape, dtype=like.dtype, read=lambda box: torch.zeros(box[1], dtype=like.dtype))
    if _weight(name) in weights:
        stored = weights.later(_weight(name))
        return Later(like.shape, dtype=like.dtype, read=lambda box: stored.read(box).to(like.dtype))
    assert isinstance(like, Tensor) and not like.is_meta, name
    return Later(like.shape, dtype=like.dtype, read=lambda box: within(box, (0,) * like.ndim, like))


def _imported_recipe(model: Model, directory: Path, *, precision: Precision) -> Run:
    tokenizer = str((directory / TOKENIZER).resolve())
    sequence_length, batch = min(model.max_context, 512), 8
    return Run(
        name=directory.name,
        directory=str(directory.parent),
        model=model,
        train=Train(
            precision=precision, micro_batch=_micro_batch(model, sequence_length=sequence_length, largest=batch, precision=precision)
        ),
        data=Data(
            directory=f"prepared/{directory.name}",
            tokenizer=tokenizer,
            sources=(
                Source(name="stdlib", paths=("python:stdlib",), domain="code", weight=87),
                Source(name="docs", paths=("python:docs",), domain="prose", weight=13),
            ),
        ),
        phases=(
            Phase(
                name="continue",
                length="100 steps",
                sequence_length=sequence_length,
                batch=(str(batch),),
                learning_rate=("linear to 1e-5 until 10%", "cosine to 1e-6"),
            ),
        ),
    )


def _micro_batch(model: Model, *, sequence_length: int, largest: int, precision: Precision) -> int:
    """The largest power of two, up to `largest`, at which what a micro-batch adds to memory is less than the model's own state or 1 GiB."""
    for count in (1 << n for n in reversed(range(largest.bit_length()))):
        memory = step_memory(model, Train(precision=precision, micro_batch=count), sequence_length=sequence_length)
        state_bytes = memory.weights + memory.gradients + memory.master_weights + memory.moments
        if memory.total - state_bytes <= max(state_bytes, 1 << 30):
            return count
    return 1


def _precision(weights: huggingface.Imported) -> Precision:
    kinds: set[Any] = {weights.dtype(name) for name in weights if not name.endswith("expert_bias")}
    return next((name for name, dtype in DTYPES.items() if kinds == {dtype}), "fp32")
