"""The loss of a trained model on the held-out documents of its recipe."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from quintet.checkpoint.huggingface import OnProgress
from quintet.data.prepare import open_prepared
from quintet.monitor.metrics import Evaluated
from quintet.train.directory import RECIPE, refuse_other_tokenizer
from quintet.train.held_out import held_out_loss
from quintet.train.trained import open_trained


def evaluate(path: Path, *, on_progress: OnProgress = lambda done, total: None) -> Evaluated:
    """Cross-entropy per source of a run's newest checkpoint, or of the checkpoint `path`, at the sequence length of its phase.

    The same sequences as in the run's own evaluations; `on_progress` hears of them. Raises CheckpointError, and DataError where the
    prepared data is gone or of another tokenizer.
    """
    trained = open_trained(path)
    recipe = path / RECIPE  # of a run or, among its files, of a checkpoint
    prepared = open_prepared(trained.run.data, trained.run.model.vocab_size, recipe=recipe)
    refuse_other_tokenizer(trained.tokenizer, prepared, recipe=recipe)
    length = trained.phase.sequence_length
    limit, done = trained.run.evaluation.num_sequences, 0
    total = sum(min(limit, -(-part.held_out.num_tokens // (length + 1))) for part in prepared.sources.values())

    def count(model: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        nonlocal done
        done += inputs[0].shape[0]
        on_progress(min(done, total), total)

    trained.model.register_forward_hook(count)
    return held_out_loss(trained.model, prepared, trained.run, sequence_length=length, step=trained.step)
