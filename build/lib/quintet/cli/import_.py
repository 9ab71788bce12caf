"""`quintet import`: a run of a model in Hugging Face's format, to generate from, evaluate and train on."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from rich.console import Console

from quintet.cli.bar import Bar
from quintet.cli.options import Directory, RunPath, read


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Make a run, with its recipe and a checkpoint, of a DeepseekV3ForCausalLM in Hugging Face's format."""

    source: Directory
    """A directory with config.json, tokenizer.json and safetensors files."""
    run: RunPath
    """The run's directory to make."""


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    given = read(Arguments, arguments, command="import")
    from quintet.train.trained import import_run

    console = Console(stderr=True)

    def tell(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    with Bar(f"importing {given.source}", console) as bar:
        import_run(given.source, given.run, on_message=tell, on_progress=bar)
    tell(f"made {given.run}; see: quintet info {shlex.quote(str(given.run))}")
    return 0
