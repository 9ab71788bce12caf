"""Checkpoints that refer to an earlier one for what has not changed: as whole, as verified and as durable as any other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quintet.checkpoint import store
from quintet.checkpoint.background import Saver, Written
from quintet.checkpoint.contents import convert
from quintet.checkpoint.load import list_checkpoints, load, read_manifest, verify
from quintet.checkpoint.manifest import File, Manifest, Piece, Tensor, dumps
from quintet.checkpoint.pieces import Pieces
from quintet.checkpoint.place import Remote, entries
from quintet.checkpoint.retention import prune
from quintet.errors import CheckpointError
from quintet.spec.run import Checkpoint
from tests.ranks import on_ranks

EXTRAS = {"recipe.toml": "x"}


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert of the test's state is a piece."""
    monkeypatch.setattr(store, "CUT", 5000)


def state(step: int, experts: torch.Tensor) -> dict[str, Any]:
    return {"experts": experts, "other": torch.full((300,), float(step)), "step": step}


def save_all(saver: Saver, steps: dict[int, dict[str, Any]]) -> list[int]:
    """Save each, and the bytes that it took."""
    sizes = []
    for step, each in steps.items():
        saver.save(each, step=step, extras=EXTRAS, rounded={})
        saver.finish()
        (told,) = saver.told()
        assert isinstance(told, Written) and told.problem is None, told
        sizes.append(told.num_bytes)
    return sizes


def loaded(path: Any) -> dict[str, Any]:
    target = {"experts": torch.zeros(8, 50, 100), "other": torch.zeros(300), "step": None}
    return target | load(target, path)


def test_an_expert_that_does_not_change_is_written_once(tmp_path: Path) -> None:
    experts = torch.randn(8, 50, 100)
    trained = experts.clone()
    trained[3] += 1
    saver = Saver(tmp_path, Checkpoint(keep_last=9, full_every=3))
    sizes = save_all(saver, {1: state(1, experts), 2: state(2, trained), 3: state(3, experts), 4: state(4, experts), 5: state(5, trained)})
    assert sizes[1] < sizes[0] / 5 and sizes[2] < sizes[0] / 20  # one expert of eight; none
    assert sizes[3] == pytest.approx(sizes[0], rel=0.01) and sizes[4] < sizes[3] / 5  # the fourth is a first one again
    for step, value in ((1, experts), (2, trained), (3, experts), (4, experts), (5, trained)):
        path = tmp_path / f"step-{step:08d}"
        verify(path)
        assert torch.equal(loaded(path)["experts"], value) and loaded(path)["other"].tolist() == [step] * 300
    assert [found.refers_to for found in list_checkpoints(tmp_path)] == [(), (1,), (1,), (), (4,)]


def test_what_is_referred_to_stays_and_goes_with_the_last_that_refers(tmp_path: Path) -> None:
    experts = torch.randn(8, 50, 100)
    saver = Saver(tmp_path, Checkpoint(keep_last=1, full_every=3))
    save_all(saver, {step: state(step, experts) for step in (1, 2, 3)})
    assert sorted(entries(tmp_path)) == ["step-00000001", "step-00000003"]
    save_all(saver, {4: state(4, experts)})
    assert sorted(entries(tmp_path)) == ["step-00000004"]
    assert prune(tmp_path, Checkpoint(keep_last=1)) == []


def test_where_the_earlier_one_is_gone_the_next_holds_all(tmp_path: Path) -> None:
    experts = torch.randn(8, 50, 100)
    saver = Saver(tmp_path, Checkpoint(keep_last=9, full_every=9))
    save_all(saver, {1: state(1, experts)})
    shutil.rmtree(tmp_path / "step-00000001")
    save_all(saver, {2: state(2, experts), 3: state(3, experts)})
    assert [found.refers_to for found in list_checkpoints(tmp_path)] == [(), (2,)]
    shutil.rmtree(tmp_path / "step-00000002")
    (found,) = list_checkpoints(tmp_path)
    assert "step-00000002" in (found.problem or "")


def test_damage_of_the_earlier_one_is_found_by_those_that_use_it(tmp_path: Path) -> None:
    experts = torch.randn(8, 50, 100)
    saver = Saver(tmp_path, Checkpoint(keep_last=9, full_every=9))
    save_all(saver, {1: state(1, experts), 2: state(2, experts)})
    base = tmp_path / "step-00000001" / "data-00000.bin"
    content = bytearray(base.read_bytes())
    piece = next(piece for piece in read_manifest(tmp_path / "step-00000002").tensors["experts"].pieces if "/" in piece.file)
    content[piece.offset + piece.length // 2] ^= 1
    base.write_bytes(content)
    for check in (verify, loaded):
        with pytest.raises(CheckpointError, match=r"step-00000001/data-00000.bin is damaged"):
            check(tmp_path / "step-00000002")
    base.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="is missing or has another size"):
        verify(tmp_path / "step-00000002")


def test_one_that_refers_is_made_independent_by_converting(tmp_path: Path) -> None:
    experts = torch.randn(8, 50, 100)
    save_all(Saver(tmp_path / "a", Checkpoint(keep_last=9, full_every=9)), {1: state(1, experts), 2: state(2, experts)})
    made = convert(tmp_path / "a" / "step-00000002", tmp_path / "b", codec="planes")
    shutil.rmtree(tmp_path / "a")
    verify(made)
    assert torch.equal(loaded(made)["experts"], experts)


def test_ranks_refer_each_to_what_it_wrote(tmp_path: Path) -> None:
    import torch.distributed as dist

    full = torch.randn(8, 50, 100)

    def work(rank: int) -> None:
        mine = full[4 * rank : 4 * rank + 4]
        saver = Saver(tmp_path, Checkpoint(keep_last=9, full_every=9), group=dist.new_group(backend="gloo"))
        for step in (1, 2):
            part = Pieces(full.shape, [((4 * rank, 0, 0), mine)], dtype=full.dtype)
            saver.save({"experts": part, "other": torch.full((300,), 1.0 * step), "step": step}, step=step, extras=EXTRAS, rounded={})
            saver.finish()
            assert isinstance(saver.told()[0], Written)

    on_ranks(2, work)
    last = tmp_path / "step-00000002"
    verify(last)
    assert torch.equal(loaded(last)["experts"], full)
    holders = {piece.file for piece in read_manifest(last).tensors["experts"].pieces}
    assert holders == {"step-00000001/data-00000.bin", "step-00000001/data-00001.bin"}


def test_a_store_keeps_what_is_referred_to_as_well(bucket: Remote) -> None:
    experts = torch.randn(8, 50, 100)
    saver = Saver(bucket, Checkpoint(keep_last=1, full_every=3))
    sizes = save_all(saver, {step: state(step, experts) for step in (1, 2, 3)})
    assert sizes[2] < sizes[0] / 20 and sorted(bucket.entries()) == ["step-00000001", "step-00000003"]
    verify(bucket / "step-00000003")
    assert torch.equal(loaded(bucket / "step-00000003")["experts"], experts)


@settings(max_examples=15)
@given(changes=st.lists(st.sets(st.integers(0, 7)), min_size=1, max_size=5), full_every=st.integers(1, 4), keep_last=st.integers(1, 3))
def test_any_chain_of_changes_comes_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, changes: list[set[int]], full_every: int, keep_last: int
) -> None:
    root = tmp_path_factory.mktemp("chain")
    saver = Saver(root, Checkpoint(keep_last=keep_last, full_every=full_every))
    experts, history = torch.randn(8, 50, 100), {}
    for step, changed in enumerate(changes, 1):
        experts = experts.clone()
        experts[sorted(changed)] += 1
        history[step] = experts
        save_all(saver, {step: state(step, experts)})
        found = list_checkpoints(root)
        assert all(each.problem is None for each in found)
        assert {each.step for each in found} >= set(list(history)[-keep_last:])
        for each in found:
            assert torch.equal(loaded(each.path)["experts"], history[each.step])


@pytest.mark.parametrize("path", ["step-00000007/data-00000.bin", "step-00000006/../x.bin", "../data-00000.bin", "step-6/data-00000.bin"])
def test_a_reference_to_a_later_step_or_out_of_the_folder_is_refused(path: str) -> None:
    piece = Piece(offsets=(0,), sizes=(4,), file=path, offset=0, length=56, codec="raw", blake3="0" * 64)
    tensor = Tensor(dtype="float32", shape=(4,), pieces=(piece,))
    file = File(path=path, size=56, blake3=None)
    with pytest.raises(CheckpointError, match=r"is no data file of an earlier checkpoint|is not a file name"):
        dumps(Manifest(step=7, files=(file,), tensors={"w": tensor}, values={}))
