"""Who makes the parts: this process, several processes on this machine, or Daft, on this machine or on a Ray cluster.

A part is made by one call (`part.make`) that needs nothing but its job and writes nothing but its folder, so engines differ in where the
calls run and in nothing else. All of them see the same files: on a cluster the prepared directory and local sources lie on a shared disk.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import msgspec

from quintet.data.part import Job, Progress, make
from quintet.data.shards import DiskFull, free_again
from quintet.errors import DataError, install_line

OnMessage = Callable[[str], None]
EngineName = Literal["local", "daft", "ray"]
ENGINES = ("local", "daft", "ray")
_LITTLE_BYTES = 256 << 20
_ANSWER_SECONDS = 10.0
_MORE_SPACE = 16 << 20
"""Bytes that must become free before a part that found too little room is tried again."""


class Engine(Protocol):
    """Makes parts."""

    @property
    def patient(self) -> bool:
        """Whether a full disk is waited for."""

    def run(self, jobs: Sequence[Job], progress: Progress, on_message: OnMessage) -> Iterator[Job]:
        """Make every job's part, in any order, and yield each when it is there. Raises DataError as `part.make`."""


class Local:
    """This machine: one part at a time here, or `workers` at a time in processes of their own."""

    def __init__(self, workers: int | None = None, *, patient: bool = False) -> None:
        """`workers`: if absent, as many as there are cores where there is much text, else one, whose encoder uses all cores.

        `patient`: on a full disk wait for space, with a notice, and make the part again.
        """
        self.workers = workers
        self.patient = patient

    def run(self, jobs: Sequence[Job], progress: Progress, on_message: OnMessage) -> Iterator[Job]:
        is_little = sum(job.num_bytes for job in jobs) < _LITTLE_BYTES
        workers = min(self.workers or (1 if is_little else len(os.sched_getaffinity(0))), len(jobs))
        if workers <= 1:
            for job in jobs:
                while not self._has_space(partial(make, job, progress, on_message), job, on_message):
                    pass
                yield job
            return
        threads = max(1, len(os.sched_getaffinity(0)) // workers)
        context = multiprocessing.get_context("forkserver")
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_with_threads, initargs=(threads,)) as pool:
            # Few are handed out ahead, so that Ctrl-C and errors end the rest soon.
            waiting: dict[Future[None], Job] = {}
            left = list(reversed(jobs))
            try:
                while left or waiting:
                    while left and len(waiting) < 2 * workers:
                        job = left.pop()
                        waiting[pool.submit(make, job)] = job
                    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                        job = waiting.pop(future)
                        if self._has_space(future.result, job, on_message):
                            progress.advance(job.source.name, 0, job.num_bytes)
                            yield job
                        else:
                            left.append(job)
            except BrokenProcessPool:
                raise DataError(
                    "a process that prepared data was killed, perhaps for want of memory; run prepare again, with fewer --workers: what "
                    "is done stays"
                ) from None
            finally:
                pool.shutdown(cancel_futures=True)

    def _has_space(self, work: Callable[[], None], job: Job, on_message: OnMessage) -> bool:
        """Whether `work` found room on the disk; if not, there is some when this returns. Raises DiskFull if not patient."""
        try:
            work()
        except DiskFull:
            if not self.patient:
                raise
            wait_for_space(job.target.parent, on_message)
            return False
        return True


def wait_for_space(folder: Path, on_message: OnMessage) -> None:
    """Return when the disk of `folder` has more room than when there was too little, so that it is worth another try."""
    on_message(
        f"the disk of {folder} is full: going on when {_MORE_SPACE / 1e6:,.0f} MB more are free; Ctrl-C stops, and what is done stays"
    )
    free_again(folder, shutil.disk_usage(folder).free + _MORE_SPACE)


def _with_threads(count: int) -> None:
    """Read by the encoders' thread pools when they start."""
    os.environ["RAYON_NUM_THREADS"] = str(count)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if count > 1 else "false"


class Daft:
    """A Daft dataframe with a row per part; its native runner, or its Ray runner."""

    patient = True

    def __init__(self, runner: Literal["native", "ray"], workers: int | None = None, address: str | None = None) -> None:
        """`workers`: parts at a time, as many as there are cores if absent; `address`: of the Ray cluster, a local one if absent.

        Raises DataError where Daft or Ray is not installed.
        """
        try:
            import daft
        except ImportError as error:
            raise DataError(f"this engine needs Daft ({error}); install it: {install_line('data')}") from None
        self.daft, self.runner, self.workers = daft, runner, workers
        if runner == "ray":
            try:
                import ray  # noqa: F401 -- an optional extra
            except ImportError as error:
                raise DataError(f"engine ray needs Ray ({error}); install it: {install_line('ray')}") from None
            _check_address(address)
        try:
            daft.set_runner_ray(address=address) if runner == "ray" else daft.set_runner_native()
        except Exception as error:  # Daft has one runner in a process's life: the same one may be asked for again.
            if daft.runners.get_or_infer_runner_type() != runner:
                where = f" at {address}" if address else ""
                raise DataError(f"Daft's {runner} runner{where} cannot be started: {error}; check --engine and --address") from None

    def run(self, jobs: Sequence[Job], progress: Progress, on_message: OnMessage) -> Iterator[Job]:
        left = list(jobs)
        while left:
            without_space = []
            for job, (full, error) in self._outcomes(left):
                if full:
                    without_space.append(job)
                elif error:
                    raise DataError(error)
                else:
                    progress.advance(job.source.name, 0, job.num_bytes)
                    yield job
            if without_space:
                wait_for_space(without_space[0].target.parent, on_message)
            left = without_space

    def _outcomes(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Outcome]]:
        """Every job with what became of it, as they end."""
        daft = self.daft
        workers = self.workers or len(os.sched_getaffinity(0))

        @daft.cls(max_concurrency=workers, use_process=True)  # type: ignore[untyped-decorator]
        class Maker:
            @daft.method(return_dtype=daft.DataType.string())  # type: ignore[untyped-decorator]
            def made(self, job: bytes) -> str:
                return made_from(job)

        rows = {"number": list(range(len(jobs))), "job": [pickle.dumps(job) for job in jobs]}
        frame = daft.from_pydict(rows)
        frame = (frame.into_partitions(len(jobs)) if self.runner == "ray" else frame).into_batches(1)
        for row in frame.select(frame["number"], Maker().made(frame["job"]).alias("outcome")).iter_rows():
            yield jobs[row["number"]], msgspec.json.decode(row["outcome"], type=Outcome)


def _check_address(address: str | None) -> None:
    """Raise DataError where nobody answers at HOST:PORT; Ray itself would go on trying for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host:
        return  # one that is started here, or "auto"
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()
    except (OSError, ValueError) as error:
        raise DataError(
            f"no Ray cluster answers at {address} ({error}); start one with: ray start --head --port 6379, or correct --address"
        ) from None


class Outcome(NamedTuple):
    """What became of a part that was to be made elsewhere."""

    full: bool
    """There was no room on the disk."""
    error: str
    """What a user must be told, or nothing."""


def made_from(job: bytes) -> str:
    """Make the part of a job that this engine pickled, and return its `Outcome` as JSON."""
    try:
        make(pickle.loads(job))
    except DataError as error:
        return msgspec.json.encode(Outcome(isinstance(error, DiskFull), str(error))).decode()
    return msgspec.json.encode(Outcome(False, "")).decode()


def engine_of(name: EngineName, *, workers: int | None = None, address: str | None = None) -> Engine:
    """The engine of that name."""
    by_name: dict[str, Callable[[], Engine]] = {
        "local": lambda: Local(workers, patient=True),
        "daft": lambda: Daft("native", workers),
        "ray": lambda: Daft("ray", workers, address),
    }
    return by_name[name]()
