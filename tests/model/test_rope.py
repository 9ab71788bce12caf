"""Rotary embedding and YaRN against their formulas and V3's published numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quintet.model.rope import frequencies, rotation, softmax_scale
from quintet.ops.pointwise import rotate
from quintet.spec.model import Model, Yarn
from tests.checkpoint.models import like_small

CPU = torch.device("cpu")


def v3(yarn: Yarn | None) -> Model:
    """V3's head widths: 128 without and 64 with rotary embedding."""
    return like_small(qk_nope_head_dim=128, qk_rope_head_dim=64, yarn=yarn)


def test_frequencies_fall_from_1_towards_1_over_theta() -> None:
    assert frequencies(like_small(qk_rope_head_dim=4), CPU).tolist() == pytest.approx([1.0, 0.01])
    assert frequencies(like_small(qk_rope_head_dim=8, rope_theta=16.0), CPU).tolist() == pytest.approx([1.0, 0.5, 0.25, 0.125])


def test_rotation_is_cos_and_sin_of_place_times_frequency() -> None:
    cos, sin = rotation(like_small(qk_rope_head_dim=4), torch.tensor([0, 3]))
    assert cos.tolist() == [[1.0, 1.0], pytest.approx([math.cos(3), math.cos(0.03)])]
    assert sin.tolist() == [[0.0, 0.0], pytest.approx([math.sin(3), math.sin(0.03)])]


yarns = st.builds(Yarn, factor=st.floats(1, 64), original_context=st.integers(16, 4096))


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500), st.none() | yarns)
def test_the_product_of_query_and_key_depends_on_their_distance_alone(a: int, b: int, move: int, yarn: Yarn | None) -> None:
    model = like_small(qk_rope_head_dim=8, yarn=yarn)
    q, k = torch.randn(2, 8)

    def score(query_at: int, key_at: int) -> float:
        cos, sin = rotation(model, torch.tensor([query_at, key_at]))
        return float(rotate(q, cos[0], sin[0]) @ rotate(k, cos[1], sin[1]))

    assert score(a, b) == pytest.approx(score(a + move, b + move), abs=2e-3)


@given(st.integers(0, 10**5))
def test_turning_keeps_lengths(place: int) -> None:
    cos, sin = rotation(like_small(qk_rope_head_dim=8), torch.tensor([place]))
    x = torch.randn(8)
    assert rotate(x, cos[0], sin[0]).norm().item() == pytest.approx(x.norm().item(), rel=1e-5)


def test_yarn_as_v3_keeps_11_pairs_slows_9_to_a_fortieth_and_ramps_between() -> None:
    # A pair turns `rotations` times in 4096 tokens at 64 ln(4096 / (rotations 2 pi)) / (2 ln 10000): 32 times at 10.5, once at 22.5.
    plain, extended = frequencies(v3(None), CPU), frequencies(v3(Yarn()), CPU)
    ratio = (extended / plain).tolist()
    assert ratio[:11] == [1.0] * 11
    assert ratio[23:] == pytest.approx([1 / 40] * 9)
    assert ratio[11:23] == pytest.approx([1 - step / 13 * (1 - 1 / 40) for step in range(1, 13)])


@given(yarns)
def test_yarn_slows_no_pair_by_more_than_its_factor_and_none_speeds_up(yarn: Yarn) -> None:
    ratio = frequencies(v3(yarn), CPU) / frequencies(v3(None), CPU)
    assert (ratio <= 1 + 1e-6).all() and (ratio >= 1 / yarn.factor - 1e-6).all()
    assert (ratio.diff() <= 1e-6).all(), "slower pairs are slowed more"


def test_yarn_of_factor_1_changes_nothing() -> None:
    one, none = v3(Yarn(factor=1.0)), v3(None)
    torch.testing.assert_close(frequencies(one, CPU), frequencies(none, CPU))
    assert softmax_scale(one) == softmax_scale(none)


def test_attention_logits_are_scaled_as_in_v3() -> None:
    assert softmax_scale(v3(None)) == 192**-0.5
    # 192^-0.5 (0.1 ln 40 + 1)^2
    assert softmax_scale(v3(Yarn())) == pytest.approx(0.07216878365 * 1.368887945**2)
    assert softmax_scale(v3(Yarn(mscale_all_dim=0.0))) == 192**-0.5


@pytest.mark.parametrize(
    ("mscale", "mscale_all_dim", "length"),
    [
        (1.0, 1.0, 1.0),
        (0.707, 0.707, 1.0),
        (0.5, 1.0, (1 + 0.05 * math.log(40)) / (1 + 0.1 * math.log(40))),
        (0.0, 0.0, 1 + 0.1 * math.log(40)),
        (0.0, 1.0, 1 + 0.1 * math.log(40)),
    ],
)
def test_the_rotated_part_is_lengthened_by_the_ratio_of_mscales(mscale: float, mscale_all_dim: float, length: float) -> None:
    cos, sin = rotation(v3(Yarn(mscale=mscale, mscale_all_dim=mscale_all_dim)), torch.arange(5))
    torch.testing.assert_close((cos.square() + sin.square()).sqrt(), torch.full((5, 32), length))


def test_angles_are_computed_in_fp32_whatever_the_positions_type() -> None:
    cos, sin = rotation(like_small(), torch.arange(3))
    assert cos.dtype == sin.dtype == torch.float32
