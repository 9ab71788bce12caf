"""A training call on all ranks that a launcher (torchrun) started, or in this one process."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import quintet
from quintet.cli.describe import warn
from quintet.cli.tell import tell
from quintet.errors import QuintetError
from quintet.monitor.interrupt import raise_if_heard
from quintet.monitor.sinks import Fanout
from quintet.spec import parse
from quintet.spec.layout import Layout
from quintet.spec.run import Run

if TYPE_CHECKING:
    from quintet.parallel.rendezvous import Ranks
    from quintet.train.resuming import Phases

_BRIEF = 24
"""Letters of a value that ranks tell each other as it is."""


def together(run: Run, run_directory: Path, *, first: Callable[[], Run], resume: bool) -> int:
    """`first` on rank 0, then train or resume on every rank, rank 0 with everything that watches it. Returns the exit code.

    `first` returns the run as it is to be trained, which may differ from `run` in where its data lies. Raises what `joined` and the
    trainer raise; what several ranks raise alike, one of them tells, and the others exit with its code.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        if run.layout.num_ranks > 1:  # not only when everything is prepared
            from quintet.parallel.mesh import require_ranks

            require_ranks(run.layout, 1)
        run = first()  # before torch is loaded: most mistakes show here
    from quintet.train.resuming import since_process_start

    phases = since_process_start()
    import torch

    from quintet.parallel.rendezvous import PROCESSES_ON_NODE, joined
    from quintet.train import device

    raise_if_heard()
    about = {
        **_values(run),
        "version of Quintet": quintet.__version__,
        "version of torch": str(torch.__version__),
        PROCESSES_ON_NODE: os.environ.get("LOCAL_WORLD_SIZE", "unknown"),
        "number of restarts": os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
    }
    machine = device.prepare(run.train)
    about["kind of device"] = machine.type
    late = lambda text: warn([text])  # noqa: E731
    seconds, arrival = run.train.rank_timeout, run.train.arrival_timeout
    with joined(run.layout, about=about, device=machine, seconds=seconds, arrival=arrival, notice=late) as ranks:
        if ranks.store is None:
            return _on_this_rank(run, run_directory, ranks, resume=resume, phases=phases)
        try:
            warn(_other_nodes(run.layout) if ranks.is_lead else [])
            return _on_this_rank(_of_rank_0(first, ranks), run_directory, ranks, resume=resume, phases=phases)
        except QuintetError as error:
            if ranks.first_to_tell(str(error)):
                tell(str(error))
            raise SystemExit(error.exit_code) from None
        finally:
            # Where one rank has ended, torchrun stops the others, which now are about to end as well, each with its own exit code.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _on_this_rank(run: Run, run_directory: Path, ranks: Ranks, *, resume: bool, phases: Phases) -> int:
    from quintet.cli.watched import watched
    from quintet.train import trainer

    def train(sinks: Fanout) -> int:
        with ranks.losses_named():
            if resume:
                return trainer.resume(run_directory, sinks=sinks, ranks=ranks, layout=run.layout, phases=phases)
            return trainer.train(run, sinks=sinks, ranks=ranks)

    return watched(run, run_directory, train, resumed=resume) if ranks.is_lead else train(Fanout([]))


def _of_rank_0(first: Callable[[], Run], ranks: Ranks) -> Run:
    """What `first` returns on rank 0, on every rank."""
    store = ranks.store
    assert store is not None
    if not ranks.is_lead:
        return ranks.lead_first("preparation", lambda: parse.loads(store.get("run").decode(), origin="the run of rank 0"))

    def tell_run() -> Run:
        run = first()
        store.set("run", parse.dumps(run))
        return run

    return ranks.lead_first("preparation", tell_run)


def _other_nodes(layout: Layout) -> list[str]:
    """A doubt where nodes have another size than the layout says."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or 0)
    if here in (0, layout.node_size) or here == layout.num_ranks < layout.node_size:
        return []
    return [
        f"layout.node_size is {layout.node_size}, but {here} processes were started on this node; set it to {here}, so that what talks "
        "most is planned to lie on one node"
    ]


def _values(run: Run) -> dict[str, str]:
    """Every field of the recipe's sections by its name there: its value, or the digest of a long one."""
    told = {}
    for field in fields(run):
        section = getattr(run, field.name)
        inner = {f"{field.name}.{each.name}": getattr(section, each.name) for each in fields(section)} if is_dataclass(section) else None
        told.update(inner or {field.name: section})
    return {f"{name} in the recipe": _brief(repr(value)) for name, value in told.items()}


def _brief(text: str) -> str:
    return text if len(text) <= _BRIEF else hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
