"""The recipes that come with the project: each parses, and DeepSeek-V3's is the published one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from quintet.cost.flops import flops_per_token, parameters
from quintet.spec import parse
from quintet.spec.curriculum import PhaseCurves, curriculum
from quintet.spec.curve import Curve, Place
from quintet.spec.run import Run

RECIPES = sorted((Path(__file__).parent.parent.parent / "recipes").glob("*.toml"))
B, T = 10**9, 10**12


@pytest.fixture
def v3(root: Path) -> Run:
    return parse.read(root / "recipes" / "v3-671b.toml")


def test_the_recipes_of_the_project_are_there() -> None:
    assert {path.stem for path in RECIPES} >= {"laptop", "v3-16b", "v3-671b"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_is_called_as_its_file_and_reads_back_equal(path: Path) -> None:
    run = parse.read(path)
    assert run.name == path.stem
    assert parse.loads(parse.dumps(run), origin="written") == run


def test_the_laptop_model_has_about_20m_parameters(root: Path) -> None:
    assert 15e6 < parameters(parse.read(root / "recipes" / "laptop.toml").model).total_with_mtp < 25e6


def test_the_16b_model_has_v2_lites_size(root: Path) -> None:
    counted = parameters(parse.read(root / "recipes" / "v3-16b.toml").model)
    assert round(counted.total / 1e9, 1) == 15.7
    assert counted.active / 1e9 == pytest.approx(2.4, abs=0.06)


def test_the_16b_schedules_turn_at_v3s_shares(root: Path, v3: Run) -> None:
    ours, theirs = PhaseCurves(parse.read(root / "recipes" / "v3-16b.toml").phases[0]), PhaseCurves(v3.phases[0])
    for share in (0.01, 0.5, 0.67, 0.68, 0.8, 0.96, 0.97, 0.98, 0.995):
        here, there = (curves.progress(10**5, round(curves.length.value * share)) for curves in (ours, theirs))
        assert ours.learning_rate.at(here) / 4.2e-4 == pytest.approx(theirs.learning_rate.at(there) / 2.2e-4, rel=0.02)
        assert ours.mtp_weight.at(here) == theirs.mtp_weight.at(there)
        assert ours.bias_speed.at(here) == theirs.bias_speed.at(there)


def test_v3_has_the_published_parameters_and_flops(v3: Run) -> None:
    counted = parameters(v3.model)
    assert counted.total / 1e9 == pytest.approx(671, abs=0.5)
    assert round(counted.active / 1e9) == 37
    assert flops_per_token(v3.model, sequence_length=4096).total / 1e9 == pytest.approx(250, rel=0.01)


def test_v3s_layout_is_2048_devices(v3: Run) -> None:
    assert (v3.layout.pp, v3.layout.ep, v3.layout.dp, v3.layout.tp, v3.layout.zero) == (16, 64, 128, 1, 1)
    assert v3.layout.num_ranks == 2048
    assert v3.model.num_routed_experts // v3.layout.ep == 4  # experts per device
    assert 15360 // v3.layout.dp == 120  # sequences of each pipeline per step


def test_v3s_learning_rate_is_the_published_one(v3: Run) -> None:
    curves = PhaseCurves(v3.phases[0])
    rate = curves.learning_rate
    for steps, expected in ((0, 0.0), (500, 0.55e-4), (1000, 1.1e-4), (2000, 2.2e-4)):
        assert rate.at(curves.progress(steps, steps * 3072 * 4096)) == pytest.approx(expected)
    later = {
        5 * T: 2.2e-4,
        10 * T: 2.2e-4,
        12.15 * T: (2.2e-4 + 2.2e-5) / 2,  # half of the cosine's 4.3T tokens
        11.075 * T: 2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + math.cos(math.pi / 4)) / 2,
        14.3 * T: 2.2e-5,
        14.632 * T: 2.2e-5,
        14.634 * T: 7.3e-6,
        14.8 * T: 7.3e-6,
    }
    for tokens, expected in later.items():
        assert rate.at(curves.progress(240_000, round(tokens))) == pytest.approx(expected), tokens


def test_v3s_learning_rate_pieces_last_the_published_tokens(v3: Run) -> None:
    turns = [segment.until.value for segment in Curve.parse(v3.phases[0].learning_rate).segments[1:] if segment.until]
    lengths = [end - begin for begin, end in zip([0, *turns], [*turns, Place.parse(v3.phases[0].length).value], strict=True)]
    assert lengths == [10 * T, 4300 * B, 333 * B, 167 * B]


def test_v3s_batch_grows_from_3072_to_15360_sequences_over_469b_tokens(v3: Run) -> None:
    curves = PhaseCurves(v3.phases[0])
    sequences = {0: 3072, round(234.5 * B): (3072 + 15360) // 2, 469 * B: 15360, 470 * B: 15360, 14 * T: 15360}
    for tokens, expected in sequences.items():
        assert curves.batch_sequences(1, tokens) == expected, tokens
    assert 15360 * curves.sequence_length == 62_914_560


def test_v3_takes_the_steps_that_its_tokens_and_batches_make(v3: Run) -> None:
    stretch, *extensions = curriculum(v3)
    assert [(each.num_steps, each.num_tokens) for each in extensions] == [(1000, 1000 * 15360 * 4096)] * 2
    assert (stretch.first_batch, stretch.last_batch) == (3072, 15360)
    assert 14.8 * T <= stretch.num_tokens < 14.8 * T + 15360 * 4096
    # The batch grows in proportion to the tokens, so the steps of the ramp are tokens over the logarithmic mean of its ends.
    ramp = 469 * B / 4096 * math.log(15360 / 3072) / (15360 - 3072)
    assert stretch.num_steps == pytest.approx(ramp + (14.8 * T - 469 * B) / 4096 / 15360, rel=1e-4)


def test_v3s_mtp_weight_and_bias_speed_turn_where_published(v3: Run) -> None:
    curves = PhaseCurves(v3.phases[0])
    at = {tokens: curves.progress(10**5, round(tokens * T)) for tokens in (0, 9.9, 10.1, 14.2, 14.4)}
    assert [curves.mtp_weight.at(at[tokens]) for tokens in (0, 9.9, 10.1, 14.4)] == [0.3, 0.3, 0.1, 0.1]
    assert [curves.bias_speed.at(at[tokens]) for tokens in (0, 10.1, 14.2, 14.4)] == [0.001, 0.001, 0.001, 0.0]


def test_v3s_other_constants_are_the_published_ones(v3: Run) -> None:
    optimizer = v3.optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay, optimizer.clip_norm) == (0.9, 0.95, 0.1, 1.0)
    assert (v3.model.init_std, v3.model.routed_scaling_factor, v3.train.balance_weight, v3.data.fim_rate) == (0.006, 2.5, 1e-4, 0.1)
    assert not v3.data.document_mask
