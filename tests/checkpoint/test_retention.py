"""Pruning keeps the newest few and the round ones, and never what it does not know."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from quintet.checkpoint.load import latest, list_checkpoints
from quintet.checkpoint.retention import keep, prune
from quintet.checkpoint.save import save
from tests.checkpoint.states import small_state


def test_the_newest_and_the_round_ones_are_kept() -> None:
    assert keep([100, 150, 200, 250, 300], last=2, every=None) == {250, 300}
    assert keep([100, 150, 200, 250, 300], last=1, every=100) == {100, 200, 300}
    assert keep([], last=3, every=10) == set()


@given(st.lists(st.integers(0, 1000), unique=True), st.integers(1, 5), st.none() | st.integers(1, 50))
def test_keep_is_a_subset_with_the_newest_and_keeping_twice_changes_nothing(steps: list[int], last: int, every: int | None) -> None:
    kept = keep(steps, last=last, every=every)
    assert kept <= set(steps) and set(sorted(steps)[-last:]) <= kept
    assert keep(sorted(kept), last=last, every=every) == kept


def test_pruning_leaves_the_kept_the_damaged_and_the_unknown(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(small_state(step), tmp_path, step=step)
    (tmp_path / "step-00000006" / "data-00000.bin").unlink()
    (tmp_path / "step-00000002" / "data-00000.bin").unlink()
    (tmp_path / "notes.txt").write_text("keep me")
    (tmp_path / "step-00000003.corrupt-0").mkdir()
    assert [path.name for path in prune(tmp_path, last=1, every=3)] == ["step-00000001", "step-00000004"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "notes.txt", "step-00000002", "step-00000003", "step-00000003.corrupt-0", "step-00000005", "step-00000006"
    ]  # fmt: skip
    assert latest(tmp_path, report=lambda _: None).name == "step-00000005"
    assert prune(tmp_path, last=1, every=3) == []


def test_the_newest_whole_one_survives_when_all_newer_are_damaged(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(small_state(step), tmp_path, step=step)
    for step in (2, 3):
        (tmp_path / f"step-0000000{step}" / "manifest.json").unlink()
    prune(tmp_path, last=1, every=None)
    assert [found.step for found in list_checkpoints(tmp_path) if found.problem is None] == [1]
