"""`quintet export`: a checkpoint as a model in Hugging Face's format."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from rich.console import Console

from quintet.cli.bar import Bar
from quintet.cli.options import Directory, ModelPath, read
from quintet.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write a checkpoint as a DeepseekV3ForCausalLM that transformers, and servers that read V3, load: weights, config, tokenizer."""

    model: ModelPath
    """A run's directory (its newest checkpoint), or a checkpoint's; in a store, the URL of the folder of a run's checkpoints, or of one."""
    directory: Directory
    """The directory to make."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Type of the weights in the files; fp32 of a bf16 run is its fp32 master weights."""
    max_shard_gb: float = 5.0
    """Most GB (10^9 bytes) of a file of weights; a larger tensor has a file of its own."""


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    given = read(Arguments, arguments, command="export")
    if not 0 < given.max_shard_gb < math.inf:
        raise UsageError(f"--max-shard-gb ({given.max_shard_gb}) must be a positive number")
    import torch

    from quintet.checkpoint import huggingface
    from quintet.checkpoint.place import place
    from quintet.train.trained import open_kept, stored_weights

    huggingface.refuse_existing(given.directory)
    kept = open_kept(place(given.model))
    state = stored_weights(kept, master=given.dtype == "fp32")
    with Bar(f"exporting to {given.directory}") as bar:
        huggingface.export(
            state,
            kept.model,
            given.directory,
            tokenizer_file=kept.tokenizer_file,
            bos_token_id=kept.tokenizer.bos_id,
            eos_token_id=kept.tokenizer.eos_id,
            dtype=torch.bfloat16 if given.dtype == "bf16" else torch.float32,
            max_shard_bytes=round(given.max_shard_gb * 1e9),
            on_progress=bar,
        )
    Console(stderr=True).print(f"wrote {given.directory}", markup=False, highlight=False, soft_wrap=True)
    return 0
