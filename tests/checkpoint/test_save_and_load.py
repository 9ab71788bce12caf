"""What is saved comes back bit for bit, and only into the model that it belongs to."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quintet.checkpoint.load import latest, list_checkpoints, load, read_extra, read_manifest
from quintet.checkpoint.manifest import ITEM_SIZE
from quintet.checkpoint.save import save
from quintet.errors import CheckpointError
from tests.checkpoint.states import blank, same_bits, small_state, tensors, values

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)


@settings(max_examples=60)
@given(st.dictionaries(names, tensors() | values(), max_size=5), st.integers(0, 10**12))
@example({"a": torch.tensor(1.5), "b": torch.empty(0, 3), "c": 2**200, "d": -0.0}, 5)
def test_any_state_comes_back_bit_for_bit(state: dict[str, Any], step: int) -> None:
    with tempfile.TemporaryDirectory() as root:
        directory = save(state, Path(root), step=step)
        found = blank(state)
        plain = load(found, directory)
    for name, value in state.items():
        assert same_bits(found[name], value) if isinstance(value, Tensor) else repr(plain[name]) == repr(value), name


def test_every_dtype_of_the_manifest_is_torchs_and_has_its_size() -> None:
    assert all(getattr(torch, name).itemsize == size for name, size in ITEM_SIZE.items())


def test_a_parameter_that_requires_grad_is_filled_in_place(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    directory = save({"w": weight}, tmp_path, step=1)
    other = torch.nn.Parameter(torch.zeros(2))
    load({"w": other}, directory)
    assert other.tolist() == [1.0, 2.0] and other.requires_grad


def test_the_directory_holds_raw_tensors_a_manifest_and_the_extras(tmp_path: Path) -> None:
    directory = save(small_state(), tmp_path, step=100, extras={"recipe.toml": "name = 'ä'\n"})
    assert directory == tmp_path / "step-00000100"
    assert sorted(path.name for path in directory.iterdir()) == ["data-00000.bin", "manifest.json", "recipe.toml"]
    data = (directory / "data-00000.bin").read_bytes()
    assert np.frombuffer(data, np.float32, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert data[64:72] == b"\x80\x3f" * 4  # bf16 ones, behind the first tensor's 24 bytes and its one row of 40
    assert read_extra(directory, "recipe.toml") == "name = 'ä'\n"
    with pytest.raises(CheckpointError, match=r"holds no recipe.tml \(did you mean 'recipe.toml'\?\)"):
        read_extra(directory, "recipe.tml")


def test_a_failed_load_names_everything_that_does_not_fit_and_touches_nothing(tmp_path: Path) -> None:
    directory = save(small_state(), tmp_path, step=3)
    state = {"layers.0.w": torch.zeros(2, 4), "norm": torch.zeros(4), "layers.1.w": torch.zeros(1), "seed": None}
    with pytest.raises(CheckpointError) as error:
        load(state, directory)
    assert str(error.value) == (
        f"{directory} is not a checkpoint of this model; resume with the recipe that it was saved with, or start a new run:\n"
        "  another shape or dtype: layers.0.w (float32[2, 3] there, float32[2, 4] here), norm (bfloat16[4] there, float32[4] here)\n"
        "  missing in the checkpoint: layers.1.w, seed"
    )
    assert all(not value.any() for value in state.values() if isinstance(value, Tensor))


def test_a_tensor_too_many_is_refused_unless_the_load_is_not_strict(tmp_path: Path) -> None:
    directory = save(small_state(), tmp_path, step=3)
    state = {"norm": torch.zeros(4, dtype=torch.bfloat16)}
    with pytest.raises(CheckpointError, match=r"in the checkpoint but not in this model: layers\.0\.w"):
        load(state, directory)
    assert load(state, directory, strict=False)["steps"] == 7
    assert state["norm"].tolist() == [1, 1, 1, 1]


def test_a_renamed_tensor_is_answered_with_the_likely_name(tmp_path: Path) -> None:
    directory = save({"embed.weight": torch.zeros(1)}, tmp_path, step=3)
    with pytest.raises(CheckpointError, match=r"missing in the checkpoint: embd.weight \(did you mean 'embed.weight'\?\)"):
        load({"embd.weight": torch.zeros(1)}, directory)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((1, 2), "x is a tuple"),
        ({"a": {3}}, "x.a is a set"),
        ([b"bytes"], r"x\[0\] is a bytes"),
        ({1: 2}, "x has the key 1"),
        (float("nan"), "x is nan"),
        ([float("inf")], r"x\[0\] is inf"),
        (object(), "x is a object.*nothing in it is pickled"),
        (np.float32(1), "x is a float32"),
        (torch.zeros(2, 2).to_sparse(), "only dense"),
        (torch.zeros(2, device="meta"), "materialized"),
    ],
)
def test_what_cannot_be_kept_exactly_is_refused_by_name(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        save({"x": value}, tmp_path, step=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../recipe.toml", "/etc/passwd", "a/b", "manifest.json", ".hidden", "", "data-00000.bin"])
def test_an_extra_file_cannot_leave_the_directory_or_take_a_name_of_the_checkpoint(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError):
        save({}, tmp_path, step=1, extras={name: ""})


def test_saving_a_step_again_returns_it_if_equal_and_refuses_if_not(tmp_path: Path) -> None:
    directory = save(small_state(), tmp_path, step=1, extras={"a.txt": "a"})
    before = directory.stat().st_ino
    assert save(small_state(), tmp_path, step=1, extras={"a.txt": "a"}) == directory
    assert directory.stat().st_ino == before
    for state, text in ((small_state(2.0), "a"), (small_state() | {"steps": 8}, "a"), (small_state(), "b")):
        with pytest.raises(CheckpointError, match="exists already, is whole, and holds other content"):
            save(state, tmp_path, step=1, extras={"a.txt": text})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_latest_is_the_highest_step_and_unknown_names_are_left_out(tmp_path: Path) -> None:
    for step in (3, 100_000_000, 20):
        save(small_state(step), tmp_path, step=step)
    for name in ("step-abc", "step-0000000099999999", ".tmp-x", "latest", "step-200000000.corrupt-0"):
        (tmp_path / name).mkdir()
    assert [found.step for found in list_checkpoints(tmp_path)] == [3, 20, 100_000_000]
    assert latest(tmp_path).name == "step-100000000"


def test_no_checkpoint_is_an_error_with_a_reason(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="no checkpoint under"):
            latest(root)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load({}, tmp_path / "absent")


def test_the_manifest_says_where_each_tensor_lies(tmp_path: Path) -> None:
    manifest = read_manifest(save(small_state(), tmp_path, step=1))
    (piece,) = manifest.tensors["norm"].pieces
    assert (piece.offsets, piece.sizes, piece.codec) == ((0,), (4,), "raw")
    assert (piece.file, piece.offset, piece.length) == ("data-00000.bin", 64, 48)  # 8 bytes, and a row of 40
