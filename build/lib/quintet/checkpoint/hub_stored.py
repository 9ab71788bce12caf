"""Which tensors a directory of safetensors files says that it holds, read from the index or the one file's header, without torch."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from quintet.errors import CheckpointError
from quintet.spec.model import Model

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_LONGEST_HEADER = 1 << 27


def index(directory: Path) -> dict[str, str]:
    """Tensor name to file name as the index says, or nothing without an index.

    Raises CheckpointError for an index that is none, or that names a file elsewhere.
    """
    path = directory / INDEX
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not an index of safetensors files: {error!r}") from None
    for name, file in files.items():
        if not _FILE_NAME.fullmatch(file):
            raise CheckpointError(f"{path} says that {name!r} is in {file!r}, which is not the name of a safetensors file beside the index")
    return files


def names(directory: Path) -> frozenset[str] | None:
    """The tensors that the directory holds, by their names there; None without safetensors. Raises CheckpointError for damage."""
    if (directory / INDEX).exists():
        return frozenset(index(directory))
    path = directory / SINGLE
    if not path.exists():
        return None
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(min(length, _LONGEST_HEADER)))
            return frozenset(name for name in header if name != "__metadata__")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}; fetch it again") from None


def stored_model(model: Model, stored: frozenset[str]) -> Model:
    """The model of a config.json with the MTP modules that the files hold: transformers leaves them out when it saves a model."""
    layers = (int(match[1]) for name in stored if (match := _LAYER.match(name)))
    held = max((layer + 1 - model.num_layers for layer in layers), default=0)
    return replace(model, num_mtp_modules=min(max(held, 0), model.num_mtp_modules))


def missing_modules(said: Model, held: Model) -> str | None:
    """One sentence where the files hold fewer MTP modules than config.json says, else None."""
    if said.num_mtp_modules == held.num_mtp_modules:
        return None
    return (
        f"MTP modules: config.json names {said.num_mtp_modules} (num_nextn_predict_layers), but the files hold {held.num_mtp_modules}; "
        "counted is what they hold"
    )
