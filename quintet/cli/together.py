"""A training call on all ranks that a launcher (torchrun) started, or in this one process."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import quintet
from quintet.monitor.sinks import Fanout
from quintet.spec import parse
from quintet.spec.run import Run


def together(run: Run, run_directory: Path, *, first: Callable[[], None], resume: bool) -> int:
    """`first` on rank 0, then train or resume on every rank, rank 0 with everything that watches it. Returns the exit code.

    Raises what `joined` and the trainer raise.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        first()  # before torch is loaded: most mistakes show here
    from quintet.cli.watch import watched
    from quintet.parallel.rendezvous import Ranks, joined
    from quintet.train import device, trainer

    def train(sinks: Fanout, ranks: Ranks) -> int:
        return trainer.resume(run_directory, sinks=sinks, ranks=ranks) if resume else trainer.train(run, sinks=sinks, ranks=ranks)

    import torch

    about = {
        "recipe": hashlib.blake2b(parse.dumps(run).encode(), digest_size=6).hexdigest(),
        "version of Quintet": quintet.__version__,
        "version of torch": str(torch.__version__),
    }
    with joined(run.layout, about=about, device=device.prepare(run.train), seconds=run.train.rank_timeout) as ranks:
        if ranks.store is not None:
            ranks.lead_first("first", lambda: first() if ranks.is_lead else None)
        if not ranks.is_lead:
            return train(Fanout([]), ranks)
        return watched(run, run_directory, lambda sinks: train(sinks, ranks), resumed=resume)
