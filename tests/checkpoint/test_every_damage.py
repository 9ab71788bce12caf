"""Thousands of random damages to a checkpoint of two ranks, of every kind: each one is found, by verifying and by loading."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quintet.checkpoint.load import latest, load, read_extra, verify
from quintet.checkpoint.manifest import NAME
from quintet.checkpoint.pieces import Pieces
from quintet.checkpoint.save import save
from quintet.errors import CheckpointError
from tests.checkpoint.states import same_bits
from tests.ranks import on_ranks

TRIALS = 2000
Files = dict[str, bytes]


def state_of(rank: int, scale: float) -> dict[str, Any]:
    """Half of a master in each rank, its rounding, a weight that is none, small tensors and values."""
    master = torch.linspace(-1, 1, 10_000).sin().mul(scale).view(100, 100)
    half = slice(50 * rank, 50 * rank + 50)
    return {
        "master": Pieces(master.shape, [((50 * rank, 0), master[half])], dtype=master.dtype),
        "weight": Pieces(master.shape, [((50 * rank, 0), master[half].bfloat16())], dtype=torch.bfloat16),
        "other": torch.arange(5000, dtype=torch.bfloat16) * scale,
        "bias": torch.full((3,), scale),
        "steps": int(scale),
    }


def targets() -> dict[str, Any]:
    return {
        "master": torch.zeros(100, 100),
        "weight": torch.zeros(100, 100, dtype=torch.bfloat16),
        "other": torch.zeros(5000, dtype=torch.bfloat16),
        "bias": torch.zeros(3),
        "steps": None,
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Checkpoints of steps 1 and 2, with files of the same names."""
    root = tmp_path_factory.mktemp("checkpoints")

    def work(rank: int) -> None:
        for step in (1, 2):
            save(state_of(rank, float(step)), root, step=step, extras={"recipe.toml": f"{step}"}, rounded={"weight": "master"})

    on_ranks(2, work)
    return root / "step-00000001", root / "step-00000002"


def flip_a_bit(files: Files, other: Files, chance: random.Random) -> Files:
    name = chance.choice(sorted(files))
    content = bytearray(files[name])
    bit = chance.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    return {name: bytes(content)}


def change_a_byte_of_the_manifest(files: Files, other: Files, chance: random.Random) -> Files:
    content = bytearray(files[NAME])
    content[chance.randrange(len(content))] ^= chance.randrange(1, 256)
    return {NAME: bytes(content)}


def cut_short(files: Files, other: Files, chance: random.Random) -> Files:
    name = chance.choice(sorted(files))
    return {name: files[name][: chance.randrange(len(files[name]))]}


def append(files: Files, other: Files, chance: random.Random) -> Files:
    name = chance.choice(sorted(files))
    return {name: files[name] + chance.randbytes(chance.randint(1, 9))}


def zero_a_run(files: Files, other: Files, chance: random.Random) -> Files:
    name = chance.choice(sorted(files))
    begin = chance.randrange(len(files[name]))
    length = min(chance.choice([16, 512, 4096]), len(files[name]) - begin)
    return {name: files[name][:begin] + bytes(length) + files[name][begin + length :]}


def swap_two_runs(files: Files, other: Files, chance: random.Random) -> Files:
    """As when pieces change places within a file."""
    name = chance.choice([name for name in files if name.endswith(".bin")])
    content, length = bytearray(files[name]), chance.choice([8, 40, 1000])
    a, b = (chance.randrange(len(content) - length) for _ in range(2))
    content[a : a + length], content[b : b + length] = content[b : b + length], content[a : a + length]
    return {name: bytes(content)}


def swap_two_files(files: Files, other: Files, chance: random.Random) -> Files:
    one, two = chance.sample(sorted(files), 2)
    return {one: files[two], two: files[one]}


def lose_files(files: Files, other: Files, chance: random.Random) -> Files:
    return dict.fromkeys(chance.sample(sorted(files), chance.randint(1, 2)), b"")  # b"" is removed


def leave_something_stale(files: Files, other: Files, chance: random.Random) -> Files:
    return {f"data-{chance.randint(2, 99):05d}.bin": other["data-00000.bin"]}


def mix_steps(files: Files, other: Files, chance: random.Random) -> Files:
    return {name: other[name] for name in chance.sample(sorted(files), chance.randint(1, len(files)))}


KINDS: list[Callable[[Files, Files, random.Random], Files]] = [
    flip_a_bit,
    change_a_byte_of_the_manifest,
    cut_short,
    append,
    zero_a_run,
    swap_two_runs,
    swap_two_files,
    lose_files,
    leave_something_stale,
    mix_steps,
]


def refused(act: Callable[[], object]) -> bool:
    try:
        act()
    except CheckpointError:
        return True
    return False


def test_of_thousands_of_random_damages_every_single_one_is_found(two: tuple[Path, Path], seed: int) -> None:
    older, newer = two
    files, other = ({path.name: path.read_bytes() for path in directory.iterdir()} for directory in (newer, older))
    chance, found, missed = random.Random(seed), Counter[str](), list[str]()
    for trial in range(TRIALS):
        kind = flip_a_bit if trial % 2 else chance.choice(KINDS)
        damage = kind(files, other, chance)
        if all(files.get(name) == content for name, content in damage.items()):
            continue  # zeros where zeros were
        for name, content in damage.items():
            (newer / name).write_bytes(content) if content else (newer / name).unlink(missing_ok=True)
        found[kind.__name__] += 1
        loads = refused(lambda: (load(targets(), newer), read_extra(newer, "recipe.toml")))
        if not (refused(lambda: verify(newer)) and loads and (trial % 20 or latest(newer.parent, verify_content=True) == older)):
            missed.append(f"{kind.__name__} {sorted(damage)}")
        for name in damage:
            (newer / name).write_bytes(files[name]) if name in files else (newer / name).unlink(missing_ok=True)
    assert missed == []
    assert sum(found.values()) > 0.9 * TRIALS and found.keys() == {kind.__name__ for kind in KINDS}
    print(f"{sum(found.values())} damages, all found: {dict(found)}")
    verify(newer)


def test_what_the_damages_are_done_to_is_whole_and_comes_back(two: tuple[Path, Path]) -> None:
    expected = torch.linspace(-1, 1, 10_000).sin().mul(2).view(100, 100)
    state = targets()
    assert load(state, two[1]) == {"steps": 2}
    assert same_bits(state["master"], expected) and same_bits(state["weight"], expected.bfloat16())
    manifest = verify(two[1])
    assert manifest.tensors["weight"].pieces == () and manifest.tensors["weight"].rounded_from == "master"
    assert {piece.codec for tensor in manifest.tensors.values() for piece in tensor.pieces} == {"raw", "planes"}
