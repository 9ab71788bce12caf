"""Saving beside training: the state is copied into host buffers while the next step runs forward and backward, then written by a thread.

What is saved changes only when the optimizer updates it. So `save` returns at once; a thread copies what this rank writes into buffers that
are kept from one save to the next; and `settle`, which the trainer calls before it updates anything, waits until the copy is complete.
(CUDA tensors are copied before `save` returns.) From then on the thread encodes, hashes, writes, syncs, reads back, commits and prunes
without anybody waiting. One save is under way at a time: the next one waits for it, which counts as standing still.

The ranks' threads speak through a process group of their own, for two threads on one group of gloo corrupt each other's messages.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quintet.checkpoint.agreement import Company
from quintet.checkpoint.manifest import Piece, directory_name
from quintet.checkpoint.pieces import Box, Pieces, tensors_of, values_of
from quintet.checkpoint.place import Place, entries
from quintet.checkpoint.plan import Plan, make_plan
from quintet.checkpoint.retention import prune
from quintet.checkpoint.save import Job, check, held, write
from quintet.checkpoint.store import Known, Threads, known_from
from quintet.errors import CheckpointError, QuintetError
from quintet.spec.run import Checkpoint

_CHUNK = 1 << 24
"""Bytes that are copied without a look at Python's lock."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """A checkpoint that is complete, read back, and kept."""

    step: int
    """Its step."""
    path: Place
    """Its directory."""
    stall_seconds: float
    """Seconds that training stood still: for the copy, and for the save before."""
    seconds: float
    """Seconds from the call to the end of pruning."""
    num_bytes: int
    """Its size; 0 on other ranks than 0."""
    problem: str | None
    """Why older checkpoints could not be removed, where that is so."""


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A save that came to nothing; what was there before is untouched."""

    step: int
    """Its step."""
    error: QuintetError
    """Why."""


class Saver:
    """Saves a state again and again under `root`; all ranks make one, and call `save` and `finish` together."""

    def __init__(self, root: Place, settings: Checkpoint, *, group: Any | None = None) -> None:
        """group: of gloo, used by nobody else; needed where there are several ranks."""
        self.root, self.settings, self.group = root, settings, group
        self._plan: Plan | None = None
        self._buffers: dict[tuple[str, Box], Tensor] = {}
        self._flight: _Flight | None = None
        self._told: list[Written | Failed] = []
        self._failures: list[Failed] = []
        self._base: tuple[int, Known] | None = None
        self._num_referring = 0

    def save(
        self, state: Mapping[str, Any], *, step: int, extras: Mapping[str, str], rounded: Mapping[str, str], wait: bool = False
    ) -> None:
        """Begin to save a state, which must not change before `settle`; with `wait` return when that is done.

        Every state has the names, shapes and dtypes of the first. Raises CheckpointError, on all ranks, if the save before was one too many
        that failed (`checkpoint.tolerated_failures`); with `wait` also if this one fails.
        """
        begin = time.perf_counter()
        self._land()
        if len(self._failures) > self.settings.tolerated_failures:
            last = self._failures[-1]
            raise CheckpointError(f"{len(self._failures)} saves failed one after the other, last that of step {last.step}: {last.error}")
        company = Company(self.group, doing=f"saving {self.root / directory_name(step)}")
        company.share(lambda: check(state, step, extras)) if self._plan is None else check(state, step, extras)
        self._plan = self._plan or make_plan(state, rounded, company)
        flight = _Flight(step, begin)
        values = copy.deepcopy(values_of(state))
        job = Job(step=step, tensors=tensors_of(state), values=values, plan=self._plan, extras=extras, codec=self.settings.codec)
        job = self._referring(job)
        if wait or not self.settings.background:
            self._write(job, company, flight)
            flight.end = time.perf_counter()
            flight.stall = flight.end - begin
            self._note(flight)
            return
        copies = _Copies(job, self._buffers)
        flight.thread = threading.Thread(target=self._run, args=(flight, copies, company), name="checkpoint", daemon=True)
        flight.thread.start()
        flight.stall = time.perf_counter() - begin
        self._flight = flight

    def plan_anew(self) -> None:
        """Before a `save` of a state whose ranks hold other parts than before; all ranks call it, when no save is under way."""
        assert self._flight is None
        self._plan, self._base = None, None
        self._buffers.clear()

    def _referring(self, job: Job) -> Job:
        """The job with what it may refer to, where the settings say that one is not always whole by itself."""
        if self.settings.full_every == 1:
            return job

        def wrote(pieces: list[tuple[str, Piece]]) -> None:
            self._base, self._num_referring = (job.step, known_from(pieces, directory_name(job.step))), 0

        self._num_referring += 1
        if self._base is None or self._num_referring >= self.settings.full_every:
            return replace(job, known={}, wrote=wrote)
        return replace(job, base=self._base[0], known=self._base[1], wrote=wrote)

    def settle(self) -> None:
        """Wait until the state that is being saved may change."""
        flight = self._flight
        if flight is not None and not flight.copied.is_set():
            begin = time.perf_counter()
            flight.copied.wait()
            flight.stall += time.perf_counter() - begin

    def told(self) -> list[Written | Failed]:
        """What has ended since the last call, in order."""
        if self._flight is not None and not self._flight.is_alive:
            self._land()
        told, self._told = self._told, []
        return told

    def finish(self, seconds: float | None = None) -> None:
        """Wait for the save that is under way, for so long at most."""
        if self._flight is not None and self._flight.thread is not None:
            self._flight.thread.join(seconds)
            if not self._flight.is_alive:
                self._land()

    def _land(self) -> None:
        """Wait for the save that is under way, and note how it ended."""
        if self._flight is not None:
            flight, self._flight = self._flight, None
            assert flight.thread is not None
            flight.thread.join()
            self._note(flight)

    def _note(self, flight: _Flight) -> None:
        if flight.error is not None:
            self._failures.append(Failed(step=flight.step, error=flight.error))
            self._told.append(self._failures[-1])
            return
        self._failures.clear()
        written = Written(
            step=flight.step,
            path=self.root / directory_name(flight.step),
            stall_seconds=flight.stall,
            seconds=flight.end - flight.begin,
            num_bytes=flight.num_bytes,
            problem=flight.problem,
        )
        self._told.append(written)

    def _run(self, flight: _Flight, copies: _Copies, company: Company) -> None:
        """What the thread does."""
        try:
            job = copies.make()
            flight.copied.set()
            self._write(job, company, flight)
        except QuintetError as error:
            flight.error = error
        except BaseException as error:  # a thread has nobody to raise to
            flight.error = CheckpointError(f"saving step {flight.step} failed: {error!r}")
        finally:
            flight.end = time.perf_counter()
            flight.copied.set()

    def _write(self, job: Job, company: Company, flight: _Flight) -> None:
        with Threads(num_ranks=company.size, beside_training=flight.thread is not None) as threads:
            path = write(job, self.root, company=company, threads=threads, read_back=True)
        if company.rank == 0:
            try:
                flight.num_bytes = sum(size or 0 for size in entries(path).values())
                prune(self.root, self.settings)
            except (OSError, QuintetError) as error:
                flight.problem = str(error)


class _Flight:
    """One save under way."""

    def __init__(self, step: int, begin: float) -> None:
        self.step, self.begin, self.end = step, begin, begin
        self.stall = 0.0
        self.copied = threading.Event()
        self.thread: threading.Thread | None = None
        self.error: QuintetError | None = None
        self.num_bytes = 0
        self.problem: str | None = None

    @property
    def is_alive(self) -> bool:
        return self.thread is not None and self.thread.is_alive()


class _Copies:
    """A job whose state is to be copied into buffers; what lies on another device than the host is copied at once."""

    def __init__(self, job: Job, buffers: dict[tuple[str, Box], Tensor]) -> None:
        self._job, self._buffers = job, buffers
        self._later: list[tuple[Tensor, Tensor, int]] = []
        for item in job.plan.items:
            for name in (item.name, *([item.twin] if item.twin else [])):
                source = held(job.tensors[name], item).detach()
                target = self._buffer(name, item.box, source)
                if source.is_cpu:
                    self._later.append((source, target, source._version))
                else:
                    target.copy_(source)

    def _buffer(self, name: str, box: Box, source: Tensor) -> Tensor:
        if (name, box) not in self._buffers:
            self._buffers[name, box] = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
        return self._buffers[name, box]

    def make(self) -> Job:
        """Copy what is left -> the job with the copied state. Raises CheckpointError if somebody changed it meanwhile."""
        for source, target, _ in self._later:
            _copy(source, target)
        if any(source._version != version for source, _, version in self._later):
            raise CheckpointError(f"the state of step {self._job.step} changed while it was copied; call Saver.settle before every update")
        boxes: dict[str, list[tuple[tuple[int, ...], Tensor]]] = {}
        for (name, box), target in self._buffers.items():
            boxes.setdefault(name, []).append((box[0], target))
        copied = {name: Pieces(t.shape, boxes.get(name, []), dtype=t.dtype) for name, t in self._job.tensors.items()}
        return replace(self._job, tensors=copied)


def _copy(source: Tensor, target: Tensor) -> None:
    """Host to host in this thread alone, by the bytes where that is possible; torch's own copy would start a team of threads."""
    if not source.is_contiguous() or source.is_conj() or source.is_neg() or not source.numel():
        target.copy_(source)
        return
    here, there = (tensor.reshape(-1).view(torch.uint8).numpy() for tensor in (source, target))
    for begin in range(0, here.size, _CHUNK):
        np.copyto(there[begin : begin + _CHUNK], here[begin : begin + _CHUNK])
