"""Held-out loss: the mean over every predicted token, per source, the same ones each time."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from quintet.data.loader import held_out_batches
from quintet.data.prepare import Prepared, prepare
from quintet.errors import DataError
from quintet.evaluate.perplexity import evaluate
from quintet.model.transformer import Transformer
from quintet.spec.run import Evaluation, Run
from quintet.train.held_out import held_out_loss
from tests.train.runs import MODEL, corpus, make_quick, tiny_run, train, where


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("evaluate")
    run = tiny_run(corpus(folder), folder / "runs")
    prepare(run.data, vocab_size=MODEL.vocab_size, seed=0)
    return replace(run, evaluation=Evaluation(num_sequences=5))


@pytest.fixture(scope="module")
def prepared(run: Run) -> Prepared:
    return prepare(run.data, vocab_size=MODEL.vocab_size, seed=0)


@pytest.fixture
def model(run: Run) -> Transformer:
    model = Transformer(run.model)
    model.initialize(0)
    return model


@torch.no_grad()
def test_it_is_the_mean_cross_entropy_of_every_next_token(run: Run, prepared: Prepared, model: Transformer) -> None:
    evaluated = held_out_loss(model, prepared, run, sequence_length=16, step=7)
    for name in ("code", "prose"):
        batches = [*held_out_batches(prepared, name, sequence_length=16, num_sequences=5, batch_size=1)]
        inputs, labels = torch.cat([batch.inputs for batch in batches]), torch.cat([batch.labels for batch in batches])
        expected = F.cross_entropy(model.logits(inputs).flatten(0, 1), labels.flatten())
        assert evaluated.losses[name] == pytest.approx(float(expected), rel=1e-5)
        assert evaluated.tokens[name] == int((labels >= 0).sum()) > 0
        meta = prepared.sources[name].held_out.meta
        assert evaluated.bits_per_byte[name] == pytest.approx(float(expected) / math.log(2) * meta.num_tokens / meta.num_bytes, rel=1e-5)
    assert (evaluated.step, evaluated.domains) == (7, {"code": "code", "prose": "prose"})


def test_the_micro_batch_does_not_change_it(run: Run, prepared: Prepared, model: Transformer) -> None:
    one, two = (
        held_out_loss(model, prepared, replace(run, train=replace(run.train, micro_batch=size)), sequence_length=16, step=0)
        for size in (1, 3)
    )
    assert one.losses == pytest.approx(two.losses, rel=1e-5)
    assert one.tokens == two.tokens


def test_a_model_that_knows_nothing_has_the_entropy_of_its_vocabulary(run: Run, prepared: Prepared, model: Transformer) -> None:
    with torch.no_grad():
        model.head.weight.zero_()
    evaluated = held_out_loss(model, prepared, run, sequence_length=16, step=0)
    assert evaluated.losses == pytest.approx(dict.fromkeys(("code", "prose"), math.log(MODEL.vocab_size)), rel=1e-5)


def test_documents_see_only_themselves_where_the_recipe_masks(run: Run, prepared: Prepared, model: Transformer) -> None:
    masked = replace(run, data=replace(run.data, document_mask=True))
    plain = held_out_loss(model, prepared, run, sequence_length=64, step=0)
    assert held_out_loss(model, prepared, masked, sequence_length=64, step=0).losses != plain.losses


def test_without_any_held_out_document_there_is_nothing_to_evaluate(tmp_path: Path, model: Transformer) -> None:
    data = corpus(tmp_path)
    data = replace(data, held_out=0.0)
    without = tiny_run(data, tmp_path / "runs")
    prepared = prepare(data, vocab_size=MODEL.vocab_size, seed=0)
    with pytest.raises(DataError, match=r"no source in .* has a held-out document; raise data\.held_out or add text"):
        held_out_loss(model, prepared, without, sequence_length=16, step=0)


def test_evaluation_leaves_the_model_and_the_random_numbers_alone(run: Run, prepared: Prepared, model: Transformer) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    held_out_loss(model, prepared, run, sequence_length=16, step=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_uses_the_last_phases_sequence_length(run: Run, prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)
    phases = (replace(run.phases[0], length="1 steps"), replace(run.phases[0], name="last", length="1 steps", sequence_length=8))
    run = replace(run, name="two", phases=phases)
    train(run)
    evaluated = evaluate(where(run))
    assert evaluated.tokens["code"] <= 5 * 8
    assert evaluated.step == 2
