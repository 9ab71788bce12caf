"""Costs: spread over stages, overlapped on two streams, and read from words, files and names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pytest import approx

from quintet.errors import SpecError, UsageError
from quintet.plan.costs import DEEPSEEK_V3_TRACE, PRESETS, Costs, Layer, durations, overlapped, pair_seconds, read, share_of_rank, stages
from quintet.schedule import build

LAYER = Layer(
    attention_forward=1.0,
    attention_backward_input=2.0,
    attention_weight=1.0,
    mlp_forward=3.0,
    mlp_backward_input=3.0,
    mlp_weight=3.0,
    dispatch_bytes=10.0,
    combine_bytes=20.0,
)


def layered(*, seconds_per_byte: float, layers: int = 1) -> Costs:
    return Costs(layer=LAYER, layers=layers, all_to_all_bandwidth=1 / seconds_per_byte)


def forwards(costs: Costs, *, num_ranks: int, num_stages: int) -> list[float]:
    return [stage.forward for stage in stages(costs, num_ranks=num_ranks, num_stages=num_stages)]


def test_two_stages_per_rank_have_half_each() -> None:
    assert forwards(Costs(forward=3.0), num_ranks=4, num_stages=4) == [3.0] * 4
    assert forwards(Costs(forward=3.0), num_ranks=4, num_stages=8) == [1.5] * 8


def test_a_profile_is_cut_wherever_stages_begin() -> None:
    heavy_end = Costs(profile=(1.0, 1.0, 1.0, 3.0))
    assert forwards(heavy_end, num_ranks=4, num_stages=4) == approx([2 / 3, 2 / 3, 2 / 3, 2.0])
    assert forwards(heavy_end, num_ranks=2, num_stages=2) == approx([2 / 3, 4 / 3])
    assert forwards(heavy_end, num_ranks=4, num_stages=8) == approx([1 / 3] * 6 + [1.0] * 2)
    assert forwards(heavy_end, num_ranks=3, num_stages=3) == approx([2 / 3, 2 / 3, 5 / 3])


@given(
    profile=st.lists(st.floats(0.1, 9), min_size=1, max_size=9).map(tuple),
    num_ranks=st.integers(1, 6),
    per_rank=st.integers(1, 3),
)
def test_cutting_keeps_the_whole(profile: tuple[float, ...], num_ranks: int, per_rank: int) -> None:
    cut = stages(Costs(weight=2.0, profile=profile), num_ranks=num_ranks, num_stages=per_rank * num_ranks)
    assert sum(stage.weight for stage in cut) == approx(2.0 * num_ranks)
    assert sum(stage.activation_bytes for stage in cut) == approx(num_ranks)


# A layer's components.


def test_alone_a_forward_waits_for_its_all_to_alls() -> None:
    share = share_of_rank(layered(seconds_per_byte=0.1, layers=2))
    assert (share.forward, share.backward_input, share.weight) == approx((2 * (1 + 3 + 1 + 2), 2 * (2 + 3 + 1 + 2), 2 * 4))
    assert share.all_to_all == approx(6.0)


@given(layers=st.integers(1, 6))
def test_without_communication_a_pair_takes_the_sum_of_its_computation(layers: int) -> None:
    assert overlapped(layered(seconds_per_byte=1e-9), num_layers=layers) == approx(13 * layers, rel=1e-6)


def test_communication_that_fits_beside_the_computation_vanishes() -> None:
    # Attention forward takes 1 while the gradient's dispatch takes 1; MLP backward 3 + 3 hides dispatch and combine; and so on.
    assert overlapped(layered(seconds_per_byte=0.1), num_layers=3) == approx(13 * 3)


def test_one_layer_whose_communication_dominates() -> None:
    # Dispatch 10, combine 20. COMBINE(B) until 10, DISPATCH(F) until 20; MLP(I) 10..13, and its DISPATCH(B) 20..40; MLP(W) 13..16;
    # MLP(F) 20..23, and COMBINE(F) 40..60; ATTN(I) from 40 and ATTN(W) until 43.
    assert overlapped(layered(seconds_per_byte=1.0), num_layers=1) == approx(60.0)


@given(a=st.floats(0.01, 3), layers=st.integers(1, 5), forward=st.floats(0.2, 2), backward=st.floats(0.2, 2))
def test_a_pair_is_no_shorter_than_either_stream_and_no_longer_than_both(a: float, layers: int, forward: float, backward: float) -> None:
    computation = layers * (forward * 4 + backward * 9)
    communication = layers * a * 30 * (forward + backward)
    seconds = overlapped(layered(seconds_per_byte=a), num_layers=layers, forward=forward, backward=backward)
    assert max(computation, communication) <= seconds * (1 + 1e-9)
    assert seconds <= (computation + communication) * (1 + 1e-9)


def test_the_published_trace_hides_all_of_its_communication() -> None:
    # Busy in the trace: compute 118.2 ms, dispatch and combine 80.4 ms. Its span of 129.0 ms has gaps that no dependency asks for.
    share = share_of_rank(DEEPSEEK_V3_TRACE)
    assert 2 * share.all_to_all == approx(80.4e-3, rel=0.01)
    assert share.forward + share.backward_input + share.weight - 2 * share.all_to_all == approx(118.2e-3, rel=1e-3)
    assert pair_seconds(DEEPSEEK_V3_TRACE, share, share, stages_per_rank=1) == approx(118.2e-3, rel=1e-3)


def test_durations_of_a_pair_come_from_the_two_stages_it_joins() -> None:
    schedule = build("dualpipe", 2, 4)
    found = durations(schedule, Costs(profile=(1.0, 3.0), pair=0.5))
    assert found.forward == (0.5, 1.5)
    assert found.pair == {(0, 0): 0.75, (0, 1): 1.75, (1, 0): 1.25, (1, 1): 2.25}
    deep = durations(build("dualpipev", 2, 4), layered(seconds_per_byte=0.1, layers=4))
    assert deep.pair[0, 3] == approx(2 * 13)


# Reading.


def test_costs_are_read_from_names_words_and_files(tmp_path: Path) -> None:
    assert read("deepseek-v3") is PRESETS["deepseek-v3"]
    assert read("forward=2,backward-input=3, pair=0.75") == Costs(forward=2.0, backward_input=3.0, pair=0.75)
    path = tmp_path / "costs.toml"
    path.write_text("layers = 3\nprofile = [1, 2]\np2p_latency = 1e-5\n[layer]\n" + "".join(f"{k} = {v}\n" for k, v in vars(LAYER).items()))
    assert read(str(path)) == Costs(layers=3, profile=(1.0, 2.0), p2p_latency=1e-5, layer=LAYER)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("deepsek-v3", "'deepsek-v3' is no costs (did you mean 'deepseek-v3'?); give equal, deepseek-v3"),
        ("forwrad=1", "unknown cost 'forwrad' (did you mean 'forward'?)"),
        ("forward=fast", "'forward=fast' in the costs must be a name, '=' and a number"),
        ("forward=-1", "forward (-1.0) must be finite and not negative"),
        ("pair=0", "pair (0.0) must lie above 0"),
        ("p2p_bandwidth=0", "p2p_bandwidth (0.0) must be above 0"),
        ("nowhere.toml", "cannot read costs from nowhere.toml"),
    ],
)
def test_what_is_no_costs_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        read(text)
    assert message in str(error.value)


def test_a_broken_file_is_refused_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "costs.toml"
    path.write_text("[layer]\nattention = 1\n")
    with pytest.raises(SpecError, match="layer: unknown cost 'attention'"):
        read(str(path))
    path.write_text("forward = 'slow'")
    with pytest.raises(SpecError, match=r"Expected `float`, got `str` - at `\$.forward`"):
        read(str(path))
    path.write_text("profile = [0, 0]")
    with pytest.raises(SpecError, match="one above 0"):
        read(str(path))


def test_not_a_number_is_refused() -> None:
    with pytest.raises(SpecError, match="must be finite and not negative"):
        replace(Costs(), forward=float("nan"))
