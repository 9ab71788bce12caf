"""The context is extended in the midst of a run: phases without YaRN, then with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from quintet.cli.main import main
from quintet.errors import SpecError
from quintet.spec.model import Yarn
from quintet.spec.run import Checkpoint, Run
from quintet.train.trained import open_trained
from tests.train.runs import PHASE, records, train, where

pytestmark = pytest.mark.usefixtures("quick")
YARN = Yarn(factor=4.0, original_context=16)
SHORT = replace(PHASE, name="short", length="3 steps", sequence_length=16, yarn=False)
LONG = replace(PHASE, name="long", length="2 steps")


def test_before_its_extension_a_model_has_no_yarn_and_the_original_context(run: Run) -> None:
    run = replace(run, model=replace(run.model, yarn=YARN), phases=(SHORT, LONG))
    assert run.model_in(LONG) == run.model
    assert run.model_in(SHORT) == replace(run.model, yarn=None, max_context=16)


def test_a_phase_without_yarn_is_no_longer_than_the_original_context(run: Run) -> None:
    with pytest.raises(SpecError, match=r"sequence_length \(32\) must be at most model.yarn.original_context \(16\)"):
        replace(run, model=replace(run.model, yarn=YARN), phases=(replace(LONG, yarn=False),))
    with pytest.raises(SpecError, match="yarn is false, but the model has none"):
        replace(run, phases=(SHORT,))


def test_a_run_trains_plain_until_it_is_extended_and_every_checkpoint_is_used_as_it_was_trained(run: Run, tmp_path: Path) -> None:
    plain = replace(run, directory=str(tmp_path / "plain"), phases=(replace(SHORT, yarn=True), LONG))
    extended = replace(
        run,
        directory=str(tmp_path / "extended"),
        model=replace(run.model, yarn=YARN),
        phases=(SHORT, LONG),
        checkpoint=Checkpoint(every=3, keep_last=9),
    )
    assert train(plain) == train(extended) == 0
    losses, others = ([record.loss for record in records(each)] for each in (plain, extended))
    assert losses[:3] == others[:3] and all(a != b for a, b in zip(losses[3:], others[3:], strict=True))

    root = where(extended) / "checkpoints"
    found = {}
    for step in (3, 5):
        path = root / f"step-{step:08d}"
        assert main(["export", str(path), str(tmp_path / f"hf{step}"), "--dtype", "fp32"]) == 0
        found[step] = json.loads((tmp_path / f"hf{step}" / "config.json").read_text()), open_trained(path)
    (before, opened), (after, whole) = found[3], found[5]
    assert before["rope_scaling"] is None and before["max_position_embeddings"] == 16
    assert after["rope_scaling"]["factor"] == 4.0 and after["max_position_embeddings"] == 64
    assert (opened.phase.name, opened.model.model.yarn) == ("short", None)
    assert (whole.phase.name, whole.model.model.yarn) == ("long", YARN)
