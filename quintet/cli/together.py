"""A training call on all ranks that a launcher (torchrun) started, or in this one process."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import quintet
from quintet.monitor.sinks import Fanout
from quintet.spec import parse
from quintet.spec.run import Run

if TYPE_CHECKING:
    from quintet.parallel.rendezvous import Ranks


def together(run: Run, run_directory: Path, *, first: Callable[[], Run], resume: bool) -> int:
    """`first` on rank 0, then train or resume on every rank, rank 0 with everything that watches it. Returns the exit code.

    `first` returns the run as it is to be trained, which may differ from `run` in where its data lies. Raises what `joined` and the
    trainer raise.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        run = first()  # before torch is loaded: most mistakes show here
    from quintet.cli.watch import watched
    from quintet.parallel.rendezvous import joined
    from quintet.train import device, trainer

    def train(run: Run, sinks: Fanout, ranks: Ranks) -> int:
        return trainer.resume(run_directory, sinks=sinks, ranks=ranks) if resume else trainer.train(run, sinks=sinks, ranks=ranks)

    import torch

    about = {
        "recipe": hashlib.blake2b(parse.dumps(run).encode(), digest_size=6).hexdigest(),
        "version of Quintet": quintet.__version__,
        "version of torch": str(torch.__version__),
    }
    with joined(run.layout, about=about, device=device.prepare(run.train), seconds=run.train.rank_timeout) as ranks:
        run = _of_rank_0(first, ranks) if ranks.store is not None else run
        if not ranks.is_lead:
            return train(run, Fanout([]), ranks)
        return watched(run, run_directory, lambda sinks: train(run, sinks, ranks), resumed=resume)


def _of_rank_0(first: Callable[[], Run], ranks: Ranks) -> Run:
    """What `first` returns on rank 0, on every rank."""
    store = ranks.store
    assert store is not None
    if not ranks.is_lead:
        return ranks.lead_first("first", lambda: parse.loads(store.get("run").decode(), origin="the run of rank 0"))

    def tell() -> Run:
        run = first()
        store.set("run", parse.dumps(run))
        return run

    return ranks.lead_first("first", tell)
