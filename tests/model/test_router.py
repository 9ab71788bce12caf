"""The router: who is chosen, with what weight, and what brings the load into balance."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quintet.model.router import Router, count_choices, sequence_balance_loss, sum_affinities, updated_bias
from quintet.spec.model import Model
from tests.checkpoint.models import like_small


def router_for(**changes: object) -> Router:
    """A router whose matrix is the identity, so that its inputs are the logits of its experts."""
    model = like_small(**changes)
    router = Router(model)
    torch.nn.init.eye_(router.weight)
    return router


def logits(*scores: float) -> Tensor:
    """One token whose sigmoid scores are these."""
    return torch.tensor([scores]).logit()


def balance(scores: Tensor, num_sequences: int, per_token: int) -> Tensor:
    """The balance loss of whole sequences."""
    return sequence_balance_loss(count_choices(scores, num_sequences, per_token), sum_affinities(scores, num_sequences), per_token)


EIGHT = {"hidden_size": 8, "num_routed_experts": 8, "num_experts_per_token": 3, "num_groups": 4, "num_groups_per_token": 2}


def test_experts_come_from_the_groups_whose_best_two_sum_highest() -> None:
    router = router_for(**EIGHT, routed_scaling_factor=2.5)
    # Groups of two sum to 1.0, 1.1, 0.9 and 0.8: the best expert of all, of 0.85, stands in a closed group.
    scores = (0.55, 0.45, 0.6, 0.5, 0.85, 0.05, 0.4, 0.4)
    routing = router(logits(*scores))
    assert routing.experts.tolist() == [[2, 0, 3]]
    assert routing.gates[0].tolist() == pytest.approx([2.5 * 0.6 / 1.65, 2.5 * 0.55 / 1.65, 2.5 * 0.5 / 1.65])
    assert routing.scores[0].tolist() == pytest.approx(scores)


def test_the_bias_changes_who_is_chosen_and_not_their_gates() -> None:
    router = router_for(**EIGHT | {"num_groups": 1, "num_groups_per_token": 1, "num_experts_per_token": 2})
    scores = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    assert router(logits(*scores)).experts.tolist() == [[7, 6]]
    router.expert_bias[0] = 10.0
    routing = router(logits(*scores))
    assert routing.experts.tolist() == [[0, 7]]
    assert routing.gates[0].tolist() == pytest.approx([2.5 * 0.1 / 0.9, 2.5 * 0.8 / 0.9])


def test_the_bias_moves_groups_too() -> None:
    router = router_for(**EIGHT | {"num_groups_per_token": 1, "num_experts_per_token": 2})
    scores = (0.9, 0.8, 0.5, 0.5, 0.1, 0.1, 0.2, 0.2)
    assert router(logits(*scores)).experts.tolist() == [[0, 1]]
    router.expert_bias[:2] = -0.5
    assert sorted(router(logits(*scores)).experts[0].tolist()) == [2, 3]


def test_gates_that_are_not_normalised_are_scores_times_the_factor() -> None:
    router = router_for(**EIGHT | {"num_experts_per_token": 2}, normalize_gates=False, routed_scaling_factor=2.0)
    routing = router(logits(0.9, 0.8, 0.5, 0.5, 0.1, 0.1, 0.2, 0.2))
    assert routing.gates[0].tolist() == pytest.approx([1.8, 1.6])


@st.composite
def routed(draw: st.DrawFn) -> tuple[Model, Tensor, Tensor]:
    """A model, scores [T, E] without ties, and biases [E]."""
    group_size, num_groups = draw(st.integers(2, 5)), draw(st.integers(1, 4))
    per_token = draw(st.integers(1, num_groups))
    experts = group_size * num_groups
    model = like_small(
        num_routed_experts=experts,
        num_groups=num_groups,
        num_groups_per_token=per_token,
        num_experts_per_token=draw(st.integers(1, group_size * per_token)),
        normalize_gates=draw(st.booleans()),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return model, torch.rand(6, experts, generator=generator), torch.randn(experts, generator=generator)


@given(routed())
def test_the_choice_is_that_of_the_published_steps(example: tuple[Model, Tensor, Tensor]) -> None:
    model, scores, bias = example
    router = Router(model)
    router.expert_bias.copy_(bias)
    size = model.num_routed_experts // model.num_groups
    for token, chosen in zip((scores + bias).tolist(), router.choose(scores).tolist(), strict=True):
        sums = [sum(sorted(token[g * size : (g + 1) * size])[-2:]) for g in range(model.num_groups)]
        best = sorted(range(model.num_groups), key=sums.__getitem__, reverse=True)[: model.num_groups_per_token]
        open_experts = [e for e in range(len(token)) if e // size in best]
        expected = sorted(open_experts, key=token.__getitem__, reverse=True)[: model.num_experts_per_token]
        assert sorted(chosen) == sorted(expected)


@given(routed())
def test_a_tokens_experts_differ_lie_in_few_groups_and_their_gates_sum_to_the_factor(example: tuple[Model, Tensor, Tensor]) -> None:
    model, _, bias = example
    router = Router(model)
    torch.nn.init.normal_(router.weight)
    router.expert_bias.copy_(bias)
    routing = router(torch.randn(9, model.hidden_size))
    for experts in routing.experts.tolist():
        assert len(set(experts)) == model.num_experts_per_token
        assert len({e // (model.num_routed_experts // model.num_groups) for e in experts}) <= model.num_groups_per_token
    expected = routing.scores.gather(1, routing.experts)
    if model.normalize_gates:
        expected = expected / expected.sum(1, keepdim=True)
    torch.testing.assert_close(routing.gates, expected * model.routed_scaling_factor)


def test_a_bf16_router_scores_in_fp32() -> None:
    router = router_for(**EIGHT).bfloat16()
    router.expert_bias = router.expert_bias.float()
    x = torch.randn(5, 8).bfloat16()
    routing = router(x)
    assert routing.gates.dtype == routing.scores.dtype == torch.float32
    torch.testing.assert_close(routing.scores, x.float().sigmoid())


def test_the_routers_matrix_learns_from_gates_and_its_bias_does_not_learn() -> None:
    router = router_for(**EIGHT)
    router(torch.randn(4, 8)).gates.square().sum().backward()
    assert router.weight.grad is not None and router.weight.grad.any()
    assert not router.expert_bias.requires_grad and [name for name, _ in router.named_parameters()] == ["weight"]


def test_the_bias_falls_where_load_is_above_the_mean_and_rises_below_it() -> None:
    bias, load = torch.tensor([0.5, 0.5, 0.5, 0.5]), torch.tensor([10, 6, 2, 6])
    assert updated_bias(bias, load, 0.25).tolist() == [0.25, 0.5, 0.75, 0.5]
    assert updated_bias(bias, load, 0.0).tolist() == bias.tolist()


def test_the_bias_update_brings_a_skewed_stream_into_balance() -> None:
    router = router_for(**EIGHT, routed_scaling_factor=1.0)
    generator = torch.Generator().manual_seed(0)
    preference = torch.linspace(-1.0, 1.0, 8)

    def load_variation() -> float:
        x = torch.randn(512, 8, generator=generator) + preference
        load = torch.bincount(router(x).experts.flatten(), minlength=8)
        router.expert_bias.copy_(updated_bias(router.expert_bias, load, 0.01))
        return float(load.double().std() / load.double().mean())

    variations = [load_variation() for _ in range(150)]
    assert variations[0] > 0.5
    assert max(variations[-20:]) < 0.15


def balance_by_the_formulas(scores: list[list[float]], per_token: int) -> float:
    """V3 eq. 17-20 of one sequence, without alpha."""
    length, num_experts = len(scores), len(scores[0])
    total = 0.0
    for i in range(num_experts):
        selected = sum(i in sorted(range(num_experts), key=s.__getitem__)[-per_token:] for s in scores)
        f_i = num_experts / (per_token * length) * selected
        p_i = sum(s[i] / sum(s) for s in scores) / length
        total += f_i * p_i
    return total


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), st.integers(0, 4))
def test_the_balance_loss_is_the_reports_sum_added_up_over_sequences(sequences: int, length: int, per_token: int, more: int) -> None:
    scores = torch.rand(sequences * length, per_token + more)
    rows = scores.view(sequences, length, -1).tolist()
    expected = sum(balance_by_the_formulas(sequence, per_token) for sequence in rows)
    assert balance(scores, sequences, per_token).item() == pytest.approx(expected, rel=1e-4)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_at_perfect_balance_the_loss_is_1(per_token: int, rounds: int, sequences: int) -> None:
    # Every expert is chosen equally often, however large its scores: f_i = 1, and the P_i sum to 1.
    num_experts = 4
    turns = [[2.0 if (token + k) % num_experts < per_token else 1.0 for k in range(num_experts)] for token in range(num_experts * rounds)]
    scores = (torch.tensor(turns) * torch.rand(num_experts * rounds, 1).add(0.1)).repeat(sequences, 1)
    assert balance(scores, sequences, per_token).item() == pytest.approx(sequences)


def test_when_all_tokens_choose_the_same_experts_the_loss_grows_to_experts_per_chosen_one() -> None:
    scores = torch.tensor([[1.0, 1.0, 1e-6, 1e-6, 1e-6, 1e-6]]).repeat(5, 1)
    assert balance(scores, 1, 2).item() == pytest.approx(6 / 2, rel=1e-4)


def test_balance_is_asked_of_each_sequence_not_of_the_batch() -> None:
    first, second = torch.tensor([[1.0, 1e-6]]).repeat(4, 1), torch.tensor([[1e-6, 1.0]]).repeat(4, 1)
    both = torch.cat((first, second))
    assert balance(both, 2, 1).item() == pytest.approx(4.0, rel=1e-4)
    assert balance(both, 1, 1).item() == pytest.approx(1.0, rel=1e-4)


def test_going_down_the_balance_loss_lowers_the_scores_of_the_overloaded() -> None:
    scores = torch.tensor([[0.9, 0.4, 0.5], [0.8, 0.5, 0.4]], requires_grad=True)
    balance(scores, 1, 1).backward()
    assert scores.grad is not None
    assert (scores.grad[:, 0] > 0).all() and (scores.grad[:, 1:] < 0).all()
