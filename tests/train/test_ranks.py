"""Training on several ranks through the command line: one speaks and writes, all stop together, and whatever ends one ends all, clearly."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quintet.checkpoint.load import list_checkpoints, verify
from quintet.cli.main import main
from quintet.data.prepare import prepare
from quintet.errors import DONE, INTERRUPTED
from quintet.model.transformer import Transformer
from quintet.monitor.metrics import Evaluated, Message, Record, read_events
from quintet.monitor.sinks import Fanout, JsonLines
from quintet.monitor.status import read_status
from quintet.parallel.rendezvous import joined
from quintet.parallel.stages import ModelStage
from quintet.spec import parse
from quintet.spec.layout import Layout
from quintet.spec.run import Checkpoint, Run
from quintet.train import step as step_module
from quintet.train import trainer
from tests.processes import Fate, launch
from tests.train.runs import MODEL, At, assert_same, checkpoint, corpus, records, resume, send, train, where, write_recipe

pytestmark = pytest.mark.usefixtures("quick")


def on(run: Run, layout: Layout, **changes: object) -> Run:
    """The run on a layout; changes go to the train section."""
    return replace(run, layout=layout, train=replace(run.train, rank_timeout=20, **changes))  # type: ignore[arg-type]


def quintet(run: Run, folder: Path, *words: str, before: Callable[[int], object] = lambda rank: None) -> list[Fate]:
    """The command line `words` on all ranks of the run's layout, each of which does `before(rank)` first."""

    def work(rank: int) -> int:
        before(rank)
        return main(list(words))

    return launch(run.layout.num_ranks, work, folder)


def codes(fates: list[Fate]) -> list[int]:
    return [fate.code for fate in fates]


def at_step(number: int, act: Callable[[], object]) -> None:
    """Do something in this process when it begins the forward of a step."""
    real, seen = step_module.accumulate, []

    def accumulate(*arguments: object, **named: object) -> object:
        seen.append(1)
        if len(seen) == number:
            act()
        return real(*arguments, **named)  # type: ignore[arg-type]

    pytest.MonkeyPatch().setattr(step_module, "accumulate", accumulate)


def steps_of(run: Run) -> list[int]:
    return [found.step for found in list_checkpoints(where(run) / "checkpoints") if found.problem is None]


def assert_like(one: Run, two: Run) -> None:
    """Two runs are the same up to rounding."""
    for record, other in zip(records(one), records(two), strict=True):
        assert (other.step, other.tokens, other.learning_rate) == (record.step, record.tokens, record.learning_rate)
        assert other.loss == pytest.approx(record.loss, rel=1e-4)
    (tensors, values), (others, other_values) = checkpoint(one), checkpoint(two)
    assert other_values == values | {"held_out_loss": pytest.approx(values["held_out_loss"], rel=1e-4)} and tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        if name.startswith("model.") and not name.endswith("expert_bias"):
            assert float((tensor - others[name]).norm() / tensor.norm()) < 1e-3, name


def test_one_rank_writes_and_the_run_is_that_of_one_device(run: Run, tmp_path: Path) -> None:
    alone, many = replace(run, directory=str(tmp_path / "alone")), on(run, Layout(dp=2, zero=1))
    assert train(alone) == DONE
    fates = quintet(many, tmp_path, "train", str(write_recipe(many, tmp_path / "r.toml")))
    assert codes(fates) == [0, 0] and fates[1].told == ""
    assert "step 10/10" in fates[0].told and "report: " in fates[0].told
    assert_like(alone, many)
    one, two = ([event for event in read_events(where(each) / "metrics.jsonl") if isinstance(event, Evaluated)] for each in (alone, many))
    assert [event.tokens for event in one] == [event.tokens for event in two] and len(two) == 1
    status = read_status(where(many))
    assert status is not None and (status.verdict, status.exit_code, status.step) == ("done", 0, 10)
    assert len(verify(where(many) / "checkpoints" / "step-00000010").files) == 4, "each rank writes its own part, and two texts"


LAYOUTS = [
    (Layout(dp=2, zero=3), "bf16"),
    (Layout(cp=2, ep=2), "fp32"),
    (Layout(dp=2, tp=2, zero=2), "bf16"),
    (Layout(pp=2, dp=2, ep=2, zero=1, schedule="zb1p"), "fp32"),
]


@pytest.mark.parametrize(("layout", "precision"), LAYOUTS, ids=str)
def test_a_signal_to_any_rank_stops_all_at_one_step_and_a_resume_is_the_same_bit_for_bit(
    run: Run, layout: Layout, precision: str, tmp_path: Path
) -> None:
    run = on(run, layout, precision=precision)
    whole, cut = replace(run, directory=str(tmp_path / "whole")), replace(run, directory=str(tmp_path / "cut"))

    def work(each: Run, *, resumed: bool, signalled: int | None) -> Callable[[int], int]:
        def on_rank(rank: int) -> int:
            with joined(layout, about={}, device=torch.device("cpu"), seconds=20) as ranks:
                sinks: list[JsonLines | At] = [JsonLines(where(each) / "metrics.jsonl")] if rank == 0 else []
                if rank == signalled:
                    sinks.append(At(5, lambda: send(signal.SIGTERM)))
                with Fanout(sinks) as to:
                    return trainer.resume(where(each), sinks=to, ranks=ranks) if resumed else trainer.train(each, sinks=to, ranks=ranks)

        return on_rank

    count = layout.num_ranks
    assert codes(launch(count, work(whole, resumed=False, signalled=None), tmp_path)) == [DONE] * count
    assert codes(launch(count, work(cut, resumed=False, signalled=count - 1), tmp_path)) == [INTERRUPTED] * count
    assert steps_of(cut) == [6], "the ranks agree in the step after the signal"
    assert codes(launch(count, work(cut, resumed=True, signalled=None), tmp_path)) == [DONE] * count
    assert_same(whole, cut)


def test_a_rank_that_is_killed_ends_the_others_and_a_resume_on_another_layout_goes_on(run: Run, tmp_path: Path) -> None:
    run = replace(on(run, Layout(dp=2, zero=2)), checkpoint=Checkpoint(every=4, background=False))
    alone = replace(run, layout=Layout(), directory=str(tmp_path / "alone"))
    assert train(alone) == DONE
    recipe = str(write_recipe(run, tmp_path / "r.toml"))
    fates = quintet(run, tmp_path, "train", recipe, before=lambda rank: rank and at_step(6, lambda: send(signal.SIGKILL)))
    assert codes(fates) == [76, -9] and fates[0].seconds < 15
    assert "rank 0: error: rank 0 waits in step 6, " in fates[0].told and "Traceback" not in fates[0].told
    assert "look first at rank 1, which was silent for longest" in fates[0].told
    status = read_status(where(run))
    assert status is not None and (status.verdict, status.exit_code) == ("failed", 76)
    assert steps_of(run) == [4]
    moved = replace(run, layout=Layout(tp=2, zero=2))
    fates = quintet(moved, tmp_path, "resume", str(where(run)), "--layout.dp", "1", "--layout.tp", "2")
    assert codes(fates) == [0, 0], fates
    assert parse.read(where(run) / "recipe.toml").layout == moved.layout
    texts = [event.text for event in read_events(where(run) / "metrics.jsonl") if isinstance(event, Message)]
    assert "another layout from step 5 on: tp=2 zero=2 instead of dp=2 zero=2" in texts
    assert_like(alone, run)
    # And on one device, which only says that it is done.
    assert main(["resume", str(where(run)), "--layout.tp", "1", "--layout.zero", "0"]) == DONE
    assert parse.read(where(run) / "recipe.toml").layout == Layout()


def test_a_layout_that_breaks_a_rule_is_refused_and_the_recipe_stays(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(run)
    before = (where(run) / "recipe.toml").read_bytes()
    assert main(["resume", str(where(run)), "--layout.tp", "3"]) == 2
    assert "model.num_heads (2) must be divisible by layout.tp (3)" in capsys.readouterr().err
    assert main(["resume", str(where(run)), "--layout.tp", "2"]) == 2
    assert "takes 2 ranks" in capsys.readouterr().err
    assert (where(run) / "recipe.toml").read_bytes() == before


def test_a_layout_without_its_ranks_is_refused_before_anything_is_prepared(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quintet.cli.prepare.prepare", lambda *rest, **named: pytest.fail("prepares"))
    assert main(["train", str(write_recipe(on(run, Layout(dp=2)), tmp_path / "r.toml"))]) == 2
    assert "takes 2 ranks (pp 1 x dp 2 x cp 1 x tp 1), but 1 process was started" in capsys.readouterr().err


def test_a_run_that_exists_is_refused_once(run: Run, tmp_path: Path) -> None:
    run = on(run, Layout(dp=2))
    where(run).mkdir(parents=True)
    fates = quintet(run, tmp_path, "train", str(write_recipe(run, tmp_path / "r.toml")))
    assert codes(fates) == [2, 2] and fates[1].told == ""
    assert fates[0].told.count("exists already and is not overwritten") == 1


def test_other_options_on_one_rank_are_named_by_their_section(run: Run, tmp_path: Path) -> None:
    run = on(run, Layout(dp=2))
    recipe = str(write_recipe(run, tmp_path / "r.toml"))

    def work(rank: int) -> int:
        return main(["train", recipe, "--train.micro-batch", str(rank + 1)])

    fates = launch(2, work, tmp_path)
    assert codes(fates) == [2, 2] and fates[1].told == ""
    assert "rank 1 of 2: another [train] in the recipe than rank 0's" in fates[0].told
    assert not where(run).exists()


def test_another_torch_on_one_rank_is_named(run: Run, tmp_path: Path) -> None:
    run = on(run, Layout(dp=2))
    fates = quintet(
        run,
        tmp_path,
        "train",
        str(write_recipe(run, tmp_path / "r.toml")),
        before=lambda rank: rank and pytest.MonkeyPatch().setattr(torch, "__version__", "1.0"),
    )
    assert codes(fates) == [2, 2]
    assert f"rank 1 of 2: another version of torch than rank 0's (1.0 against {torch.__version__})" in fates[0].told


def test_prepared_data_that_differ_between_nodes_are_named(run: Run, tmp_path: Path) -> None:
    run = on(run, Layout(dp=2))
    other = corpus(tmp_path / "other")
    (tmp_path / "other" / "code" / "more.py").write_text("one = 1\n")
    prepare(other, vocab_size=MODEL.vocab_size, seed=0)
    recipe = str(write_recipe(run, tmp_path / "r.toml"))
    real = trainer.open_prepared

    def elsewhere(rank: int) -> None:
        if rank:
            pytest.MonkeyPatch().setattr(trainer, "open_prepared", lambda data, *rest: real(other, *rest))

    fates = quintet(run, tmp_path, "train", recipe, before=elsewhere)
    assert codes(fates) == [2, 2]
    assert "rank 1 of 2: another prepared data than rank 0's" in fates[0].told


def test_numbers_that_are_not_finite_end_all_ranks_with_one_message(run: Run, tmp_path: Path) -> None:
    run = on(run, Layout(dp=2, zero=1))

    def poison(rank: int) -> None:
        def act() -> None:
            pytest.MonkeyPatch().setattr(
                "quintet.parallel.zero.ShardedParameters.norm_squared", lambda self: torch.tensor(float("nan"), dtype=torch.float64)
            )

        if rank == 1:
            at_step(3, act)

    fates = quintet(run, tmp_path, "train", str(write_recipe(run, tmp_path / "r.toml")), before=poison)
    assert codes(fates) == [12, 12]
    assert "".join(fate.told for fate in fates).count("gradient norm nan") == 1
    status = read_status(where(run))
    assert status is not None and (status.verdict, status.exit_code) == ("failed", 12)


def test_a_disk_that_is_full_on_one_rank_ends_all_with_one_message_and_the_checkpoint_before_stays(run: Run, tmp_path: Path) -> None:
    run = replace(on(run, Layout(dp=2, zero=1)), checkpoint=Checkpoint(every=4, background=False))

    def fill(rank: int) -> None:
        def refuse(descriptor: int, data: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        if rank == 1:
            at_step(6, lambda: pytest.MonkeyPatch().setattr(os, "write", refuse))

    fates = quintet(run, tmp_path, "train", str(write_recipe(run, tmp_path / "r.toml")), before=fill)
    assert codes(fates) == [11, 11]
    assert "".join(fate.told for fate in fates).count("on rank 1 failed: No space left on device") == 1
    assert steps_of(run) == [4]
    assert codes(quintet(run, tmp_path, "resume", str(where(run)))) == [0, 0]


def test_ranks_pass_over_a_checkpoint_in_which_one_of_them_finds_damage(run: Run, tmp_path: Path) -> None:
    run = replace(on(run, Layout(dp=2, zero=2)), checkpoint=Checkpoint(every=4), train=replace(run.train, steps=8))
    assert codes(quintet(run, tmp_path, "train", str(write_recipe(run, tmp_path / "r.toml")))) == [0, 0]
    assert steps_of(run) == [4, 8]
    damaged = where(run) / "checkpoints" / "step-00000008" / "data-00001.bin"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 16
    damaged.write_bytes(content)
    longer = write_recipe(replace(run, train=replace(run.train, steps=9)), where(run) / "recipe.toml")
    fates = quintet(run, tmp_path, "resume", str(longer.parent))
    assert codes(fates) == [0, 0]
    told = "".join(fate.told for fate in fates)
    assert told.count("passed over a damaged checkpoint") == 1 and "data-00001.bin is damaged" in told.replace("\n", " ")
    assert [record.step for record in records(run)] == [*range(1, 10)] and steps_of(run)[-1] == 9


def test_rank_0_that_is_killed_while_it_prepares_ends_the_others(run: Run, tmp_path: Path) -> None:
    run = on(run, Layout(dp=2))

    def die(rank: int) -> None:
        pytest.MonkeyPatch().setattr("quintet.cli.prepare.prepare", lambda *rest, **named: send(signal.SIGKILL))

    fates = quintet(run, tmp_path, "train", str(write_recipe(run, tmp_path / "r.toml")), before=die)
    assert codes(fates) == [-9, 76] and fates[1].seconds < 10
    assert "rank 1 waited in " in fates[1].told and "Traceback" not in fates[1].told


def test_a_rank_that_stops_amid_a_step_is_named_with_what_waits_for_it_and_what_all_did_last(run: Run, tmp_path: Path) -> None:
    layout = Layout(pp=2, schedule="1f1b")
    run = on(run, layout)
    run = replace(run, train=replace(run.train, rank_timeout=2.0, micro_batch=1))
    words = ["train", str(write_recipe(run, tmp_path / "r.toml"))]

    def work(rank: int) -> int:
        pytest.MonkeyPatch().setattr("quintet.parallel.recorder.TELL_SECONDS", 0.05)
        if rank == 1:
            (tmp_path / "pid").write_text(str(os.getpid()))
            real, seen = ModelStage.backward, []

            def backward(stage: ModelStage, microbatch: int, *rest: object, **named: object) -> object:
                seen.append(microbatch)
                if microbatch == 1 and len(seen) > 2:
                    time.sleep(0.3)  # for the recorder to tell
                    send(signal.SIGSTOP)
                return real(stage, microbatch, *rest, **named)  # type: ignore[arg-type]

            pytest.MonkeyPatch().setattr(ModelStage, "backward", backward)
        try:
            return main(words)
        finally:
            if rank == 0:
                os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)

    fates = launch(2, work, tmp_path)
    assert codes(fates) == [76, -9]
    told = fates[0].told
    assert "rank 0 waits at 0B1 from rank 1, which did not come" in told and "Traceback" not in told
    assert "rank 0: in step 2, at 0B1 (step " in told and "rank 1: in step 2, at 1B1 (step " in told and " s ago" in told
    assert "look first at rank 1, which was silent for longest" in told


def test_stages_are_cut_anew_by_their_times_and_the_run_is_the_same(run: Run, tmp_path: Path) -> None:
    """On a model whose first layer is slow: checkpoint by checkpoint, since a stage's time says nothing of its single layers."""
    model = replace(run.model, num_layers=6)
    run = replace(run, model=model, checkpoint=replace(run.checkpoint, every=3), train=replace(run.train, steps=5))
    alone = replace(run, directory=str(tmp_path / "alone"))
    run = on(run, Layout(pp=2, schedule="1f1b", cut=(4, 2)), adaptive=True, micro_batch=1)

    def slow(rank: int) -> None:
        real = Transformer._run

        def _run(model: Transformer, part: object, *arguments: object) -> object:
            if part is dict(model.layers.named_children()).get("0"):
                time.sleep(0.08)
            return real(model, part, *arguments)  # type: ignore[arg-type]

        pytest.MonkeyPatch().setattr(Transformer, "_run", _run)

    assert train(alone) == DONE
    fates = quintet(run, tmp_path, "train", str(write_recipe(run, tmp_path / "r.toml")), before=slow)
    assert codes(fates) == [0, 0], fates
    told = " ".join(fates[0].told.split())
    layout = parse.read(where(run) / "recipe.toml").layout
    assert layout.cut is not None and layout.cut[0] < 4 and f"layout.cut is {layout.cut} from step 4 on" in told
    assert_like(alone, run)


def test_a_fixed_cost_of_each_micro_batch_makes_them_larger_and_the_run_is_the_same(run: Run, tmp_path: Path) -> None:
    run = replace(run, checkpoint=replace(run.checkpoint, every=2), train=replace(run.train, steps=5))
    alone = replace(run, directory=str(tmp_path / "alone"))
    run = on(run, Layout(pp=2, schedule="1f1b"), adaptive=True, micro_batch=1)

    def slow(rank: int) -> None:
        real = Transformer.through

        def through(model: Transformer, *arguments: object) -> object:
            time.sleep(0.05)
            return real(model, *arguments)  # type: ignore[arg-type]

        pytest.MonkeyPatch().setattr(Transformer, "through", through)

    assert train(alone) == DONE
    fates = quintet(run, tmp_path, "train", str(write_recipe(run, tmp_path / "r.toml")), before=slow)
    assert codes(fates) == [0, 0], fates
    told = " ".join(fates[0].told.split())
    assert "train.micro_batch is 2 from step 3 on" in told, told
    # A busy machine may hide what the second doubling gains.
    assert parse.read(where(run) / "recipe.toml").train.micro_batch == (4 if "train.micro_batch is 4 from step 5 on" in told else 2)
    assert_like(alone, run)


def test_torchrun_trains_stops_resumes_and_one_device_uses_the_result(run: Run, tmp_path: Path) -> None:
    """The real thing: as many steps as there are until a SIGTERM to torchrun itself."""
    run = replace(on(run, Layout(dp=2, zero=1), steps=200), checkpoint=Checkpoint(every=None), evaluation=replace(run.evaluation, every=2))
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "quintet"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    with subprocess.Popen(
        [*words, "train", str(write_recipe(run, tmp_path / "r.toml"))], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        told = ""
        for line in process.stderr:
            told += line
            if line.startswith("step 3/"):
                process.send_signal(signal.SIGTERM)
                break
        told += process.stderr.read()
    assert f"stopped; continue with: quintet resume {where(run)}" in told
    assert told.count("step 3/200") == 1, "one rank speaks"
    status = read_status(where(run))
    assert status is not None and (status.verdict, status.exit_code) == ("interrupted", INTERRUPTED)
    (stopped,) = steps_of(run)
    assert [record.step for record in records(run)] == [*range(1, stopped + 1)]
    assert any(isinstance(event, Evaluated) for event in read_events(where(run) / "metrics.jsonl"))
    # One device goes on to where somebody has set the end.
    recipe = where(run) / "recipe.toml"
    shorter = replace(run, train=replace(run.train, steps=stopped + 2), layout=Layout())
    recipe.write_text(parse.dumps(shorter))
    assert resume(shorter) == DONE
    assert steps_of(run)[-1] == stopped + 2
    assert main(["generate", str(where(run)), "--prompt", "def ", "--tokens", "3"]) == DONE
    assert main(["evaluate", str(where(run))]) == DONE
    assert main(["export", str(where(run)), str(tmp_path / "exported")]) == DONE
    assert list((tmp_path / "exported").glob("*.safetensors"))


@pytest.mark.parametrize(("count", "said"), [("1", "said\ntorn down\n"), ("2", "said\n")])
def test_one_of_several_ranks_keeps_its_exit_code_by_leaving_out_the_teardown(count: str, said: str) -> None:
    """Where torch's threads let go of tensors after the interpreter, about one rank in five ended with SIGABRT instead of 75."""
    script = "import atexit; from quintet.__main__ import end; atexit.register(print, 'torn down'); print('said'); end(75)"
    environment = {**os.environ, "WORLD_SIZE": count}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (75, said)


def test_the_measures_above_see_a_difference(run: Run, tmp_path: Path) -> None:
    one, two = replace(run, directory=str(tmp_path / "one")), replace(run, directory=str(tmp_path / "two"), seed=1)
    assert train(one) == train(two) == DONE
    with pytest.raises(AssertionError):
        assert_like(one, two)
    assert len([event for event in read_events(where(one) / "metrics.jsonl") if isinstance(event, Record)]) == 10
