"""The loss of a trained model on the held-out documents of its recipe."""

from __future__ import annotations

from pathlib import Path

from quintet.data.prepare import open_prepared
from quintet.monitor.metrics import Evaluated
from quintet.train.directory import refuse_other_tokenizer
from quintet.train.held_out import held_out_loss
from quintet.train.trained import open_trained


def evaluate(path: Path) -> Evaluated:
    """Cross-entropy per source of a run's newest checkpoint, or of the checkpoint `path`, at the last phase's sequence length.

    The same sequences as in the run's own evaluations. Raises CheckpointError, and DataError where the prepared data is gone or of
    another tokenizer.
    """
    trained = open_trained(path)
    prepared = open_prepared(trained.run.data, trained.run.model.vocab_size)
    refuse_other_tokenizer(trained.tokenizer, prepared)
    length = trained.run.phases[-1].sequence_length
    return held_out_loss(trained.model, prepared, trained.run, sequence_length=length, step=trained.step)
