"""The training loop: data, step, record, evaluation, checkpoint, until the curriculum ends or a signal comes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from quintet.checkpoint.background import Failed
from quintet.checkpoint.load import candidates
from quintet.checkpoint.manifest import directory_name
from quintet.checkpoint.store import Spent
from quintet.cost.balance import WORTH_IT, pipeline_stages, recut
from quintet.cost.flops import flops_per_token
from quintet.cost.memory import largest_rank
from quintet.cost.micro_batch import better_micro_batch
from quintet.data.loader import Loader
from quintet.data.prepare import Prepared, open_prepared
from quintet.data.tokenizer import Tokenizer
from quintet.errors import DONE, INTERRUPTED
from quintet.model.generate import generate
from quintet.monitor.meter import mfu, throughput
from quintet.monitor.metrics import Message, Record, Resumed, Saved, truncate_after
from quintet.monitor.report import write_report
from quintet.monitor.sinks import Sink
from quintet.parallel.collectives import all_reduce
from quintet.parallel.mesh import Mesh, make_mesh
from quintet.parallel.recorder import Recorder
from quintet.parallel.rendezvous import Ranks
from quintet.spec import parse
from quintet.spec.curriculum import PhaseCurves, Settings, Stretch, curriculum
from quintet.spec.layout import Layout
from quintet.spec.model import Model
from quintet.spec.run import Run
from quintet.train import device as machine
from quintet.train import directory, state
from quintet.train.build import Built, build, compiling_named
from quintet.train.foresee import require_schedule
from quintet.train.held_out import held_out_loss
from quintet.train.resuming import Phases
from quintet.train.signals import Stop, stop_signals
from quintet.train.state import Position
from quintet.train.step import StepResult, run_step

_TOLD_RANKS = 64
"""As many ranks tell all others where they are in a pipeline."""
_LAST_SAVE_SECONDS = 60.0
"""How long a rank waits for the save that is under way when training fails; the reason may be that another rank is gone."""


def train(run: Run, *, sinks: Sink, ranks: Ranks | None = None) -> int:
    """Train a new run on prepared data, on all `ranks` together; returns the exit code, 0 (done) or 75 (stopped by a signal, resumable).

    Only rank 0 writes metrics and messages to its `sinks`. Raises UsageError if the run's directory exists, DataError, CheckpointError,
    NumericsError.
    """
    ranks = ranks or Ranks(make_mesh(run.layout), None)
    require_schedule(run)
    prepared = open_prepared(run.data, run.model.vocab_size)
    ranks.agree("prepared data", prepared.fingerprint)
    device = machine.prepare(run.train)
    where = ranks.lead_first(
        "run's directory", lambda: directory.create(run, prepared.tokenizer) if ranks.is_lead else directory.shared(run)
    )
    with directory.held(where) if ranks.is_lead else nullcontext():
        return _Session(run, where, prepared, sinks, device=device, ranks=ranks).loop(Position())


def resume(
    where: Path, *, sinks: Sink, ranks: Ranks | None = None, layout: Layout | None = None, phases: Phases | None = None
) -> int:
    """Continue the run in directory `where` from its newest complete checkpoint as if it had not stopped; returns and raises as `train`.

    With another `layout` than the run's recipe has it goes on there, up to rounding as if it had not moved, and the recipe follows. A run
    that stopped before its first checkpoint begins anew, which its seed makes the same. `phases` tell when the process began.
    """
    phases = phases or Phases()
    phases.end("imports")
    saved = parse.read(where / directory.RECIPE)
    run = replace(saved, layout=layout or saved.layout)
    ranks = ranks or Ranks(make_mesh(run.layout), None)
    require_schedule(run)
    prepared = open_prepared(run.data, run.model.vocab_size, recipe=where / directory.RECIPE)
    ranks.agree("prepared data", prepared.fingerprint)
    device = machine.prepare(run.train)
    with directory.held(where) if ranks.is_lead else nullcontext():
        directory.refuse_other_tokenizer(Tokenizer.from_file(where / directory.TOKENIZER), prepared)
        phases.end("data")
        told: list[str] = []
        paths = ranks.lead_first("checkpoints", lambda: candidates(directory.checkpoints(where, run), told.append))
        ranks.agree("checkpoint", ", ".join(path.name for path in paths) or "none")
        phases.end("find")
        session = _Session(run, where, prepared, sinks, device=device, ranks=ranks, drawn=not paths)
        phases.end("build")
        spent = Spent()
        found, position, data = state.restore_newest(paths, session.built, report=told.append, spent=spent)
        phases.end("load")
        session.enter(position.phase)
        if data:
            session.loader.restore(data)
        # Only now that nothing can refuse any more; and what is told earlier would be cut too.
        if ranks.is_lead:
            truncate_after(where / directory.METRICS, position.step)
            if run.layout != saved.layout:
                directory.rewrite_recipe(where, run)
                told.append(f"another layout from step {position.step + 1} on: {run.layout} instead of {saved.layout}")
        for text in (*told, f"resumed from {found}" if found else "no checkpoint was written yet: beginning anew"):
            sinks.write(Message(text=text))

        def first_step_done() -> None:
            phases.end("step")
            sinks.write(Resumed(step=position.step, path=str(found), seconds=phases.seconds, load_seconds=spent.seconds))

        return session.loop(position, first_step_done=first_step_done if found else None)


@dataclass(frozen=True)
class _Due:
    """What follows a step."""

    evaluation: bool
    checkpoint: bool


def _heard(mesh: Mesh) -> tuple[int, ...]:
    """The ranks whose last steps a rank tells when one of them hangs: all if they are few, else those that it exchanges with."""
    everybody = mesh["world"].ranks
    near = {*mesh["pp"].ranks, *mesh["ep"].ranks, *mesh["tp"].ranks, *mesh["cp"].ranks}
    return everybody if len(everybody) <= _TOLD_RANKS else tuple(sorted(near))


class _Session:
    """One process's share of a run: everything that is open while it trains."""

    def __init__(
        self, run: Run, where: Path, prepared: Prepared, sinks: Sink, *, device: torch.device, ranks: Ranks, drawn: bool = True
    ) -> None:
        """drawn: whether there is no checkpoint that the weights come from."""
        self.run, self.where, self.prepared, self.sinks, self.device, self.ranks = run, where, prepared, sinks, device, ranks
        self.recorder = Recorder(ranks.mesh.rank, _heard(ranks.mesh), ranks.store)
        self.built = self._build(drawn=drawn)
        self.saver = state.saver(where, run, seconds=ranks.seconds)
        self.held_out, self.held_out_step = math.nan, -1
        self.sizes: dict[int, list[float]] = {}
        self.slowest: dict[tuple[int, ...], float] = {}
        self.stretches = curriculum(run)
        self.num_steps = sum(stretch.num_steps for stretch in self.stretches)
        self.peak_flops = machine.measured_peak(device, run.train.precision) * run.layout.num_ranks
        self.flops = 0.0  # of the steps since the last record
        self.adapts = run.train.adaptive and self.built.pipeline is not None and device.type == "cpu"
        if run.train.adaptive and device.type == "cuda":
            sinks.write(Message(text="train.adaptive has no effect on CUDA, where a stage's times are those of its launches"))
        for name, part in prepared.sources.items():
            if not part.held_out.num_documents:
                sinks.write(Message(text=f"source {name!r} has no held-out document and is not evaluated; raise data.held_out or add text"))
        torch.manual_seed(run.seed)  # whatever draws from the global generators, now or later, draws the same in every run of this seed
        self.enter(0)

    def _build(self, *, drawn: bool) -> Built:
        return build(
            self.run,
            self.ranks.mesh,
            self.device,
            on_message=lambda text: self.sinks.write(Message(text=text)),
            recorder=self.recorder,
            drawn=drawn,
        )

    def enter(self, phase: int) -> None:
        """Make the loader and the curves of a phase; the loader stands at the beginning of the data."""
        self.stretch: Stretch = self.stretches[phase]
        self.curves = PhaseCurves(self.stretch.phase)
        here = self.stretch.phase
        length = here.sequence_length
        self.built.model.rotate_like(self.run.model_in(here))
        self.loader = Loader(self.prepared, self.run.data, sequence_length=length, seed=self.run.seed, mixture=here.weights)

    def loop(self, position: Position, *, first_step_done: Callable[[], None] | None = None) -> int:
        """Train from `position` to the end or to a signal."""
        lead, alone = self.ranks.is_lead, self.ranks.store is None
        telling = self.recorder.telling(self.ranks.notice if lead else None)
        with stop_signals(tell=lead, alone=alone) as stop, telling, self._saves_finished():
            clock = _Clock(self.device, position.tokens)
            while position.step < self.num_steps:
                if self.curves.is_over(position.phase_steps, position.phase_tokens):
                    position, data = position.next_phase(), self.loader.state()
                    self.enter(position.phase)
                    self.loader.restore(data)
                position, result, settings = self._step(position, stop)
                stop.at_once = False
                if first_step_done is not None:
                    first_step_done()
                    first_step_done = None
                if position.step % self.run.monitor.every == 0 or position.step == self.num_steps:
                    self._record(position, result, settings, *clock.lap(position.tokens))
                with clock.paused():
                    due = self._due(position.step)
                    # Ranks hear of a signal at different times; what they agreed on in the step counts.
                    stopping = result.stop if self.ranks.store else bool(stop)
                    if due.evaluation and (not stopping or position.step == self.num_steps):
                        self._evaluate(position)
                    if due.checkpoint or stopping:
                        last = stopping or position.step == self.num_steps
                        adapting = self.adapts and not last
                        self._save(position, wait=last or adapting)
                        if adapting:
                            self._adapt(position, settings.batch_sequences)
                    self._tell_of_saves()
                if stopping and position.step < self.num_steps:
                    return INTERRUPTED
            self._finish(position)
        return DONE

    @contextmanager
    def _saves_finished(self) -> Iterator[None]:
        """Leave no save half done, whatever ends the loop; where another rank may be gone, not for long."""
        try:
            yield
        finally:
            self.saver.finish(_LAST_SAVE_SECONDS if self.ranks.store else None)
            self._tell_of_saves()

    def _step(self, position: Position, stop: Stop) -> tuple[Position, StepResult, Settings]:
        settings, mesh = self.curves.settings(position.phase_steps, position.phase_tokens), self.ranks.mesh
        batch = self.loader.next_batch(settings.batch_sequences, part=mesh.at.dp, num_parts=mesh.layout.dp)
        with self.recorder.during(f"step {position.step + 1}"), compiling_named(lambda: bool(stop)):
            result = run_step(
                self.built,
                batch,
                settings=replace(settings, batch_sequences=settings.batch_sequences * batch.rows_per_sequence),
                train=replace(self.run.train, micro_batch=self.run.train.micro_batch * batch.rows_per_sequence),
                document_mask=self.run.data.document_mask,
                step=position.step + 1,
                stop=lambda: bool(stop),
                before_update=self.saver.settle,
            )
        num_rows, length = settings.batch_sequences * batch.rows_per_sequence, batch.inputs.shape[1]
        self.flops += num_rows * length * _flops_per_token(self.run.model, length, settings.mtp_weight > 0)
        return position.after_step(settings.batch_sequences * self.stretch.phase.sequence_length), result, settings

    def _due(self, step: int) -> _Due:
        last = step == self.num_steps
        every, save_every = self.run.evaluation.every, self.run.checkpoint.every
        return _Due(
            evaluation=last or (every is not None and step % every == 0),
            checkpoint=last or (save_every is not None and step % save_every == 0),
        )

    def _record(self, position: Position, result: StepResult, settings: Settings, tokens: int, seconds: float) -> None:
        flops, self.flops = self.flops, 0.0
        self.sinks.write(
            Record(
                step=position.step,
                num_steps=self.num_steps,
                phase=self.stretch.phase.name,
                tokens=position.tokens,
                loss=result.loss,
                main_loss=result.main_loss,
                mtp_loss=result.mtp_loss if self.run.model.num_mtp_modules and settings.mtp_weight else None,
                balance_loss=result.balance_loss,
                learning_rate=settings.learning_rate,
                grad_norm=result.gradient_norm,
                batch_sequences=settings.batch_sequences,
                seconds=seconds,
                tokens_per_second=throughput(tokens, seconds),
                mfu=mfu(flops, seconds, peak_flops=self.peak_flops),
                expert_load=_shares(result.load),
                peak_memory_bytes=machine.peak_memory(self.device),
                dropped=None if self.run.model.capacity_factor is None else result.num_dropped / max(int(result.load.sum()), 1),
            )
        )

    def _evaluate(self, position: Position) -> None:
        if not any(part.held_out.num_documents for part in self.prepared.sources.values()):
            return  # told at the start
        length = self.stretch.phase.sequence_length
        with self.recorder.during(f"the evaluation of step {position.step}"):
            found = held_out_loss(
                self.built.model,
                self.prepared,
                self.run,
                sequence_length=length,
                step=position.step,
                mesh=self.ranks.mesh,
                pipeline=self.built.pipeline,
            )
        self.held_out, self.held_out_step = fmean(found.losses.values()), position.step
        self.sinks.write(found)

    def _save(self, position: Position, *, wait: bool) -> None:
        loss = self.held_out if self.held_out_step == position.step else None
        gathered = state.gather(self.built, self.loader.state(), position, loss=loss)
        extras, rounded = state.extras(self.where, self.run), state.rounded(gathered)
        with self.recorder.during(f"saving step {position.step}"):
            self.saver.save(gathered, step=position.step, extras=extras, rounded=rounded, wait=wait)

    def _adapt(self, position: Position, batch_sequences: int) -> None:
        """Where it pays by how long the stages took, cut them anew, or take micro-batches of half or double the size."""
        assert self.built.pipeline is not None
        seconds, size = self.built.pipeline.stage_seconds(), self.run.train.micro_batch
        if seconds is None:
            return
        if (counts := self._better_cut(seconds)) is not None:
            slowest = f"the slowest of {len(seconds)} stages takes {max(seconds):.3f} s for a micro-batch, all {sum(seconds):.3f} s"
            told = f"{slowest}; layout.cut is {counts}"
            self._cut_anew(position, counts)
        else:
            self.sizes[size] = seconds
            better = self._better_size(batch_sequences)
            if better is None:
                return
            told = f"micro-batches of {size} take the slowest stage {max(seconds):.3f} s; train.micro_batch is {better}"
            self.run = replace(self.run, train=replace(self.run.train, micro_batch=better))
            self.built.pipeline.forget_times()
            self.slowest.clear()
        self.sinks.write(Message(text=f"{told} from step {position.step + 1} on"))
        if self.ranks.is_lead:
            directory.rewrite_recipe(self.where, self.run)

    def _better_cut(self, seconds: list[float]) -> tuple[int, ...] | None:
        """Of stages: back to one that was faster, or on to one that was not tried yet."""
        layout, model = self.run.layout, self.run.model
        now = tuple(len(stage.layers) for stage in pipeline_stages(model, layout))
        self.slowest[now] = max(seconds)
        best = min(self.slowest, key=self.slowest.__getitem__)
        if self.slowest[best] < WORTH_IT * max(seconds):
            return best
        counts = recut(model, layout, seconds)
        return None if counts in self.slowest else counts

    def _better_size(self, batch_sequences: int) -> int | None:
        """Of micro-batches, by the sizes that were tried since the stages were last cut; where memory allows."""
        run, layout = self.run, self.run.layout
        # What experts drop, and what a file's schedule is for, depend on the size.
        if run.model.capacity_factor is not None or layout.schedule_file is not None:
            return None
        size = better_micro_batch(layout, run.train.micro_batch, self.sizes, batch_sequences=batch_sequences)
        if size is None or size < run.train.micro_batch:
            return size
        train, length = replace(run.train, micro_batch=size), self.stretch.phase.sequence_length
        needed = largest_rank(run.model, train, sequence_length=length, layout=layout, moments=run.optimizer.moments).total
        short = torch.tensor(float(needed > machine.memory_of_rank(self.device)), device=self.device)
        return None if all_reduce(short, self.ranks.mesh["world"]).item() else size

    def _cut_anew(self, position: Position, counts: tuple[int, ...]) -> None:
        """Go on from the checkpoint that was just written with so many layers in each stage."""
        self.run = replace(self.run, layout=replace(self.run.layout, cut=counts))
        self.ranks = replace(self.ranks, mesh=replace(self.ranks.mesh, layout=self.run.layout))
        del self.built  # first, so that two never live
        self.built = self._build(drawn=False)
        self.built.model.rotate_like(self.run.model_in(self.stretch.phase))
        state.restore(directory.checkpoints(self.where, self.run) / directory_name(position.step), self.built)
        self.saver.plan_anew()
        self.sizes.clear()

    def _tell_of_saves(self) -> None:
        for told in self.saver.told():
            if isinstance(told, Failed):
                self.sinks.write(Message(text=f"THE CHECKPOINT OF STEP {told.step} WAS NOT SAVED: {told.error}"))
                continue
            stall, whole = told.stall_seconds, told.seconds
            self.sinks.write(Saved(step=told.step, path=str(told.path), seconds=stall, num_bytes=told.num_bytes, whole_seconds=whole))
            if told.problem is not None:
                self.sinks.write(Message(text=f"older checkpoints were not removed: {told.problem}"))

    def _finish(self, position: Position) -> None:
        if not self.ranks.is_lead:
            return
        layout, samples = self.run.layout, list[tuple[str, str]]()
        if layout.tp == layout.cp == layout.ep == layout.pp == 1 and layout.zero < 3:  # else no rank has the whole model
            samples = [(prompt, self._sample(prompt)) for prompt in self.run.monitor.prompts]
        try:
            told = f"report: {write_report(self.where, recipe_toml=parse.dumps(self.run), samples=samples)}"
        except OSError as error:  # the run itself is done and saved
            told = f"no report could be written to {self.where}: {error.strerror}"
        self.sinks.write(Message(text=told))

    def _sample(self, prompt: str) -> str:
        tokenizer = self.prepared.tokenizer
        ids = torch.from_numpy(tokenizer.encode_batch([prompt])[0].astype("int64")).to(self.device)
        room = self.built.model.model.max_context - ids.numel()
        if not ids.numel() or room <= 0:
            return ""
        generator = torch.Generator(self.device).manual_seed(self.run.seed)
        num_tokens = min(self.run.monitor.sample_tokens, room)
        drawn = [*generate(self.built.model, ids, num_tokens=num_tokens, eos_id=tokenizer.eos_id, generator=generator)]
        return tokenizer.decode(drawn)


class _Clock:
    """Tokens and seconds from one record to the next, pauses left out."""

    def __init__(self, device: torch.device, tokens: int) -> None:
        self.device, self.tokens, self.begin = device, tokens, time.perf_counter()

    def lap(self, tokens: int) -> tuple[int, float]:
        """Tokens and seconds since the lap before."""
        machine.synchronize(self.device)
        now = time.perf_counter()
        done = tokens - self.tokens, now - self.begin
        self.tokens, self.begin = tokens, now
        return done

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count."""
        machine.synchronize(self.device)
        stopped = time.perf_counter()
        yield
        self.begin += time.perf_counter() - stopped


@cache
def _flops_per_token(model: Model, length: int, mtp: bool) -> float:
    """Of rows of `length` tokens; MTP modules do not run while their weight is 0."""
    return flops_per_token(model, sequence_length=length, mtp=mtp).total


def _shares(load: Tensor) -> tuple[tuple[float, ...], ...]:
    """load [layers, E] -> each expert's share of its layer's assignments."""
    shares = load.double() / load.sum(1, keepdim=True).clamp(min=1)
    return tuple(tuple(round(share, 5) for share in layer) for layer in shares.tolist())
