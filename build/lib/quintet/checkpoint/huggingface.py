"""Our weights as Hugging Face's `DeepseekV3ForCausalLM` and back, in the format that V3 was published in.

The rotary part needs no permutation: both sides turn interleaved pairs. Read are also transformers' fused experts
(`mlp.experts.gate_up_proj`) and V3's FP8 blocks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from quintet.checkpoint import hub_config, hub_files, hub_names, hub_stored, shards
from quintet.checkpoint.durable import TemporaryDirectory, failure, write_file
from quintet.checkpoint.hub_names import Part, Shape
from quintet.checkpoint.load import Stored
from quintet.checkpoint.pieces import Box, Later, box_at, dtype_name, within
from quintet.checkpoint.place import Place
from quintet.errors import CheckpointError, UsageError, did_you_mean
from quintet.spec.model import Model

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LISTED = 8

OnProgress = Callable[[float, float], None]
"""Hears how much of what total is done."""


def export(
    state: Mapping[str, Tensor],
    model: Model,
    directory: Path,
    *,
    tokenizer_file: Place | None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = 5 * 10**9,
    on_progress: OnProgress = lambda done, total: None,
) -> None:
    """Write a new directory that transformers' AutoModelForCausalLM and AutoTokenizer, and servers that read V3, load.

    state: the tensors of `hub_names.shapes(model)`; of a checkpoint's (Stored) each part is read when it is written, an expert at a time.
    tokenizer_file: a tokenizer.json, of which the two ids say what begins and ends a text (generation stops at the latter).
    dtype: of the weights in the files, float32, bfloat16 or float16; router biases stay float32. `on_progress` hears of the bytes. The
    directory appears whole or not at all.

    Raises UsageError for a directory that holds something already, CheckpointError for another model's state, a tokenizer that does not
    fit, and a file system that refuses.
    """
    if dtype not in _DTYPES:
        raise CheckpointError(f"cannot export as {dtype}; choose one of {', '.join(map(dtype_name, _DTYPES))}")
    _check_state(state, model)
    sources = _sources(model)
    entries = [
        shards.Entry(name=part.name, shape=part.shape, dtype=torch.float32 if part.name.endswith("e_score_correction_bias") else dtype)
        for part, _ in sources.values()
    ]

    sizes, written = {entry.name: entry.num_bytes for entry in entries}, 0
    total = sum(sizes.values())

    def tensor(name: str) -> Tensor:
        nonlocal written
        part, ours = sources[name]
        on_progress(written, total)
        written += sizes[name]
        if ours is None:
            return torch.empty(part.shape)
        if isinstance(state, Stored):  # no more of it than this
            return state.box(ours, box_at(part.index, state.shape(ours))).reshape(part.shape)
        return state[ours][part.index].detach()

    tokenizer = hub_files.tokenizer(tokenizer_file, model, bos_id=bos_token_id, eos_id=eos_token_id)
    config = hub_config.from_model(model, dtype=dtype_name(dtype), bos_token_id=bos_token_id, eos_token_id=eos_token_id)
    refuse_existing(directory)
    temporary = None
    try:
        temporary = TemporaryDirectory(directory.absolute().parent, directory.name)
        shards.write(temporary.path, entries, tensor, max_shard_bytes=max_shard_bytes)
        texts = {hub_config.NAME: hub_config.dumps(config), **hub_files.texts(tokenizer, model, config)}
        for name, text in texts.items():
            write_file(temporary.path / name, text.encode())
        temporary.move_to(directory.absolute())
    except OSError as error:
        raise failure(error, doing=f"exporting to {directory}") from None
    finally:
        if temporary is not None:
            temporary.close()


def refuse_existing(directory: Path) -> None:
    """Raise UsageError if there is something at `directory`, an empty folder excepted: an export never overwrites."""
    if os.path.lexists(directory) and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(f"{directory} exists already and is not empty; name a new directory, or remove it first")


def read_config(directory: Path, *, on_message: Callable[[str], None] = lambda message: None) -> Model:
    """The model in a directory of Hugging Face's format.

    MTP modules that config.json names but no file holds, as when transformers has saved the model, are not part of it, which is told to
    `on_message`. Raises CheckpointError for a config.json that is absent, broken, or not of a DeepSeek-V3 model.
    """
    said = hub_config.to_model(hub_config.read(directory), origin=str(directory / hub_config.NAME))
    stored = hub_stored.names(directory)
    held = said if stored is None else hub_stored.stored_model(said, stored)
    if told := hub_stored.missing_modules(said, held):
        on_message(told)
    return held


class Imported(Mapping[str, Tensor]):
    """The tensors of a directory of Hugging Face's format, those of `hub_names.shapes(read_config(directory))`, read when asked for."""

    def __init__(self, directory: Path, *, dtype: torch.dtype | None = None) -> None:
        """dtype: of the weights given; None keeps the files' own (FP8 blocks become the config's torch_dtype). Router biases are float32.

        All names and shapes are checked here. Raises CheckpointError for missing, unknown and wrongly shaped tensors, and when a tensor is
        read, for a copy of the embedding or the head that differs from it.
        """
        config = hub_config.read(directory)
        self._catalog = catalog = shards.Catalog(directory)
        said = hub_config.to_model(config, origin=str(directory / hub_config.NAME))
        self.model = hub_stored.stored_model(said, frozenset(catalog.shapes()))
        self._shapes = hub_names.shapes(self.model)
        self._parts = {name: _stored_parts(name, shape, self.model, catalog.shapes()) for name, shape in self._shapes.items()}
        _check_names(directory, self.model, self._parts, catalog.shapes())
        self._block = tuple((config.quantization_config or {}).get("weight_block_size") or (128, 128))
        self._unquantized = dtype or getattr(torch, str(config.torch_dtype), None) or torch.bfloat16
        self._dtype = dtype

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype, without reading it."""
        if name.endswith("expert_bias"):
            return torch.float32
        first = self._parts[name][0].name
        own = self._unquantized if f"{first}_scale_inv" in self._catalog.shapes() else self._catalog.dtype(first)
        return self._dtype or own

    def boxes(self, name: str) -> list[Box]:
        """The boxes of a tensor that one hub tensor each makes up."""
        return [box_at(part.index, self._shapes[name]) for part in self._parts[name]]

    def later(self, name: str) -> Later:
        """A tensor of which any of `boxes` is read when it is asked for."""
        parts = dict(zip(self.boxes(name), self._parts[name], strict=True))
        return Later(self._shapes[name], dtype=self.dtype(name), read=lambda box: self._read(name, parts[box], box))

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.empty(self._shapes[name], dtype=self.dtype(name))
        for box, part in zip(self.boxes(name), self._parts[name], strict=True):
            within(box, (0,) * tensor.ndim, tensor).copy_(self._read(name, part, box))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def _read(self, name: str, part: Part, box: Box) -> Tensor:
        tensor = self._stored(part.name)
        for copy in (copy for copy, source in hub_names.copies(self.model).items() if source == name and copy in self._catalog.shapes()):
            if not torch.equal(self._stored(copy), tensor):
                raise CheckpointError(f"{copy} differs from {part.name}, but they are one tensor in this model")
        return tensor.to(self.dtype(name)).reshape(box[1])

    def _stored(self, name: str) -> Tensor:
        tensor, scale = self._catalog.read(name), f"{name}_scale_inv"
        if scale not in self._catalog.shapes():
            return tensor
        return dequantized(tensor, self._catalog.read(scale), self._block).to(self._unquantized)


def import_(
    directory: Path, *, dtype: torch.dtype | None = None, on_progress: OnProgress = lambda done, total: None
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `Imported`, one by one; `on_progress` hears of the elements. Raises CheckpointError, as that does."""
    imported = Imported(directory, dtype=dtype)  # before the first is asked for
    return _watched(imported.items(), hub_names.shapes(imported.model), on_progress)


def _sources(model: Model) -> dict[str, tuple[Part, str | None]]:
    """Every hub tensor of an export, by name, with the tensor of ours that holds it (None: it has no elements)."""
    ours = hub_names.shapes(model)
    sources: dict[str, tuple[Part, str | None]] = {
        part.name: (part, name) for name, shape in ours.items() for part in hub_names.parts(name, shape, model)
    }
    for name, source in hub_names.copies(model).items():
        if name != "lm_head.weight":
            sources[name] = Part(name=name, shape=ours[source]), source
    return sources | {name: (Part(name=name, shape=shape), None) for name, shape in hub_names.empty(model).items()}


def _check_state(state: Mapping[str, Tensor], model: Model) -> None:
    expected = hub_names.shapes(model)
    problems = [f"{name} is missing" for name in expected if name not in state]
    for name in state:
        if name not in expected:
            problems.append(f"{name} is unknown{did_you_mean(name, expected)}")
        elif (shape := state.shape(name) if isinstance(state, Stored) else tuple(state[name].shape)) != expected[name]:
            problems.append(f"{name} is {list(shape)} instead of {list(expected[name])}")
    _refuse("the state is not this model's", problems)


def _refuse(what: str, problems: Sequence[str]) -> None:
    if problems:
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise CheckpointError(f"{what}: {'; '.join(problems[:_LISTED])}{more}")


def _stored_parts(name: str, shape: Shape, model: Model, stored: Mapping[str, Shape]) -> list[Part]:
    """The hub tensors that make up ours: one fused of all experts where the files have that, else the published ones."""
    fused = hub_names.fused_part(name, shape, model)
    return [fused] if fused and fused.name in stored else hub_names.parts(name, shape, model)


def _check_names(directory: Path, model: Model, plan: Mapping[str, list[Part]], stored: Mapping[str, Shape]) -> None:
    ours = hub_names.shapes(model)
    expected = {part.name: part.shape for stored_parts in plan.values() for part in stored_parts}
    known = expected | {name: ours[source] for name, source in hub_names.copies(model).items()} | hub_names.empty(model)
    problems = [f"{name} is missing" for name in expected if name not in stored]
    for name, shape in stored.items():
        if name.removesuffix("_scale_inv") not in known and not name.endswith("rotary_emb.inv_freq"):
            problems.append(f"{name} is unknown{did_you_mean(name, known)}")
        elif name in known and shape != known[name]:
            problems.append(f"{name} is {list(shape)} instead of {list(known[name])}")
    _refuse(f"{directory} does not hold the model of its {hub_config.NAME}", problems)


def _watched(tensors: Iterable[tuple[str, Tensor]], shapes: Mapping[str, Shape], on_progress: OnProgress) -> Iterator[tuple[str, Tensor]]:
    total, done = sum(math.prod(shape) for shape in shapes.values()), 0
    for name, tensor in tensors:
        done += tensor.numel()
        on_progress(done, total)
        yield name, tensor


def dequantized(weight: Tensor, scale: Tensor, block: tuple[int, ...]) -> Tensor:
    """V3's FP8 weights in fp32: weight [O, I] times scale [ceil(O/128), ceil(I/128)], each scale for one block of 128 x 128."""
    rows, columns = weight.shape
    wide = scale.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return weight.float() * wide
