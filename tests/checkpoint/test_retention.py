"""Pruning keeps the newest few, the round, the best and the pinned ones, and never touches what it does not know."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from quintet.checkpoint.load import Found, latest, list_checkpoints, verify
from quintet.checkpoint.retention import keep, pin, prune, unpin
from quintet.checkpoint.save import save
from quintet.spec.run import Checkpoint
from tests.checkpoint.states import small_state


def found(step: int, *, pinned: bool = False, loss: float | None = None) -> Found:
    return Found(path=Path(f"step-{step:08d}"), step=step, problem=None, pinned=pinned, loss=loss)


def kept(steps: list[int], **settings: int | None) -> set[int]:
    return set(keep([found(step) for step in steps], Checkpoint(**settings)))  # type: ignore[arg-type]


def test_the_newest_and_the_round_ones_are_kept() -> None:
    assert kept([100, 150, 200, 250, 300], keep_last=2) == {250, 300}
    assert kept([100, 150, 200, 250, 300], keep_last=1, keep_every=100) == {100, 200, 300}
    assert kept([], keep_last=3, keep_every=10) == set()


def test_the_best_and_the_pinned_are_kept_each_with_its_reason() -> None:
    checkpoints = [found(1, loss=2.0), found(2, loss=1.0), found(3, pinned=True), found(4, loss=1.0), found(5, loss=3.0), found(6)]
    assert keep(checkpoints, Checkpoint(keep_last=1, keep_best=1)) == {3: "pinned", 4: "best", 6: "newest"}
    assert keep(checkpoints, Checkpoint(keep_last=1, keep_best=3, keep_every=2)) == {
        1: "best", 2: "round, best", 3: "pinned", 4: "round, best", 6: "newest, round"
    }  # fmt: skip


@given(
    st.lists(st.tuples(st.integers(0, 1000), st.booleans(), st.none() | st.floats(0, 9)), unique_by=lambda made: made[0]),
    st.builds(Checkpoint, keep_last=st.integers(1, 5), keep_every=st.none() | st.integers(1, 50), keep_best=st.integers(0, 3)),
)
def test_keep_is_a_subset_with_the_newest_and_the_pinned_and_keeping_twice_changes_nothing(
    made: list[tuple[int, bool, float | None]], settings: Checkpoint
) -> None:
    checkpoints = [found(step, pinned=pinned, loss=loss) for step, pinned, loss in made]
    stay = keep(checkpoints, settings)
    steps = {checkpoint.step for checkpoint in checkpoints}
    assert set(stay) <= steps and set(sorted(steps)[-settings.keep_last :]) <= set(stay)
    assert {checkpoint.step for checkpoint in checkpoints if checkpoint.pinned} <= set(stay)
    assert keep([checkpoint for checkpoint in checkpoints if checkpoint.step in stay], settings).keys() == stay.keys()


def test_pruning_leaves_the_kept_the_damaged_and_the_unknown(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(small_state(step), tmp_path, step=step)
    (tmp_path / "step-00000006" / "data-00000.bin").unlink()
    (tmp_path / "step-00000002" / "data-00000.bin").unlink()
    (tmp_path / "notes.txt").write_text("keep me")
    (tmp_path / "step-00000003.corrupt-0").mkdir()
    settings = Checkpoint(keep_last=1, keep_every=3)
    foreseen = prune(tmp_path, settings, only_tell=True)
    assert [path.name for path in foreseen] == ["step-00000001", "step-00000004"] and all(path.is_dir() for path in foreseen)
    assert prune(tmp_path, settings) == foreseen
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "notes.txt", "step-00000002", "step-00000003", "step-00000003.corrupt-0", "step-00000005", "step-00000006"
    ]  # fmt: skip
    assert latest(tmp_path, report=lambda _: None).name == "step-00000005"
    assert prune(tmp_path, settings) == []


def test_a_pin_and_a_low_held_out_loss_keep_a_checkpoint_and_leave_it_whole(tmp_path: Path) -> None:
    for step, loss in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, None)):
        save(small_state(step) | {"held_out_loss": loss}, tmp_path, step=step)
    pin(tmp_path / "step-00000001")
    pin(tmp_path / "step-00000001")
    verify(tmp_path / "step-00000001")
    settings = Checkpoint(keep_last=1, keep_best=1)
    assert [path.name for path in prune(tmp_path, settings)] == ["step-00000003", "step-00000004"]
    listed = [(each.step, each.pinned, each.loss) for each in list_checkpoints(tmp_path)]
    assert listed == [(1, True, 3.0), (2, False, 1.0), (5, False, None)]
    unpin(tmp_path / "step-00000001")
    assert [path.name for path in prune(tmp_path, settings)] == ["step-00000001"]


def test_the_newest_whole_one_survives_when_all_newer_are_damaged(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(small_state(step), tmp_path, step=step)
    for step in (2, 3):
        (tmp_path / f"step-0000000{step}" / "manifest.json").unlink()
    prune(tmp_path, Checkpoint(keep_last=1))
    assert [each.step for each in list_checkpoints(tmp_path) if each.problem is None] == [1]
