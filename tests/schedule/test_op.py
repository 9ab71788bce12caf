"""What ops need, do, and how they print."""

from __future__ import annotations

from quintet.schedule import Op, Pair
from quintet.schedule.op import does, needs

PAIR = Pair(Op("F", 2, 5), Op("B", 5, 3))


def text(ops: tuple[Op, ...]) -> str:
    return " ".join(map(str, ops))


def test_ops_print_as_stage_kind_microbatch() -> None:
    assert str(Op("F", 2, 0)) == "2F0"
    assert str(PAIR) == "(2F5;5B3)"


def test_handlers_are_found_by_kind() -> None:
    assert [work.kind for work in (Op("W", 0, 0), PAIR)] == ["W", "FB"]
    assert Op("W", 0, 0).ops == (Op("W", 0, 0),)


def test_a_full_backward_does_both_halves() -> None:
    assert text(does(Op("B", 2, 0))) == "2I0 2W0"
    assert text(does(PAIR)) == "2F5 5I3 5W3"
    assert text(does(Op("W", 2, 0))) == "2W0"


def test_activations_come_from_the_stage_before_and_gradients_from_the_stage_after() -> None:
    assert text(needs(Op("F", 0, 7), num_stages=4)) == ""
    assert text(needs(Op("F", 2, 7), num_stages=4)) == "1F7"
    assert text(needs(Op("B", 3, 7), num_stages=4)) == "3F7"
    assert text(needs(Op("B", 2, 7), num_stages=4)) == "2F7 3I7"
    assert text(needs(Op("I", 2, 7), num_stages=4)) == "2F7 3I7"
    assert text(needs(Op("W", 2, 7), num_stages=4)) == "2I7"
    assert text(needs(PAIR, num_stages=8)) == "1F5 5F3 6I3"
