"""Steps run straight, are set aside and resumed, and carry what is needed behind them across."""

from __future__ import annotations

import torch
from torch import Tensor

from quintet.model.crossing import Aside, Crossing, Done, Steps, begin, carrying, straight


def twice(x: Tensor) -> Steps[Tensor]:
    """x -> ((x + 1) + 1), set aside before each addition."""
    for _ in range(2):
        (x,) = yield (x,)
        x = x + 1
    return x


def outer(x: Tensor) -> Steps[Tensor]:
    """x -> 10 x + twice(x): x lives on beside the inner steps."""
    inner, (x,) = yield from carrying(begin(twice(x)), (x,))
    return 10 * x + inner


def never(x: Tensor) -> Steps[Tensor]:
    yield from ()
    return x


def test_steps_run_straight_are_an_ordinary_function() -> None:
    assert straight(outer(torch.tensor(3.0))) == 35 and straight(never(torch.tensor(3.0))) == 3


def test_what_lives_on_comes_across_every_crossing_as_it_was_given_back() -> None:
    seen: list[Crossing] = []
    begun = begin(outer(torch.tensor(3.0)))
    while isinstance(begun, Aside):
        seen.append(begun.crossing)
        begun = begun.resume(tuple(tensor + 100 for tensor in begun.crossing))
    assert [tuple(float(t) for t in crossing) for crossing in seen] == [(3, 3), (104, 103)]
    assert isinstance(begun, Done) and begun.result == 10 * 203 + 205


def test_a_graph_can_be_cut_at_a_crossing() -> None:
    x = torch.tensor(3.0, requires_grad=True)
    begun, cuts = begin(outer(x * 2)), list[tuple[Crossing, Crossing]]()
    while isinstance(begun, Aside):
        leaves = tuple(tensor.detach().requires_grad_() for tensor in begun.crossing)
        cuts.append((begun.crossing, leaves))
        begun = begun.resume(leaves)
    begun.result.backward()
    assert x.grad is None, "the graph ends at the last crossing"
    for crossing, leaves in reversed(cuts):
        torch.autograd.backward(crossing, [leaf.grad for leaf in leaves])
    assert x.grad == 22
