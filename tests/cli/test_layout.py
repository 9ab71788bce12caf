"""`quintet layout`: groups, places and one rank of a layout of any size, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quintet.cli.layout import listed, shortened
from quintet.cli.main import main
from quintet.spec.layout import Layout

RECIPES = Path(__file__).parents[2] / "recipes"


def told(capsys: pytest.CaptureFixture[str], *arguments: str, recipe: str = "v3-671b.toml") -> tuple[int, str, str]:
    code = main(["layout", str(RECIPES / recipe), *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_eight_thousand_ranks_are_shown_in_few_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    code, out, err = told(capsys, "--layout.pp", "16", "--layout.dp", "512", "--layout.ep", "64")
    assert (code, err) == (0, "")
    assert "8,192 ranks on 1,024 nodes of 8" in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert rows["ep"][1:7] == ["128", "64", "0,", "1,", "2", "..."]
    assert rows["expert.shard"][1:3] == ["1,024", "8"]
    assert rows["64"] == ["64", "8", "0", "64", "0", "0", "0", "1"]
    assert rows["8191"] == ["8191", "1023", "15", "511", "0", "0", "63", "7"]
    assert len(out.splitlines()) < 50


def test_a_rank_is_shown_in_full(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    flags = "--layout.pp 1 --layout.dp 4 --layout.tp 2 --layout.ep 4 --layout.zero 3 --rank 5".split()
    code, out, _ = told(capsys, *flags, recipe="laptop.toml")
    assert code == 0
    groups = {line.split()[0]: line for line in out.partition("rank 5, built")[2].splitlines() if line.strip()}
    assert groups["tp"].split()[1:] == ["2", "1", "4,", "5"]
    assert groups["ep"].split()[1:] == ["4", "1", "1,", "3,", "5,", "7"]
    assert groups["layers.*.ffn.experts.w13"].split()[-4:] == ["28,", "0,", "0,", "0"]
    assert "56 x 2 x 128 x 192    14 x 2 x 128 x 192" in groups["layers.*.ffn.experts.w13"]
    assert groups["head.weight"].split()[1:] == ["4096", "x", "192", "2048", "x", "192", "2048,", "0"]


def test_json_has_the_whole_rank(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = told(capsys, "--layout.dp", "8", "--layout.ep", "2", "--layout.zero", "1", "--rank", "3", "--json", recipe="laptop.toml")
    assert code == 0
    figures: dict[str, Any] = json.loads(out)
    rank = figures["rank"]
    assert figures["num_ranks"] == 8 and figures["groups"]["expert.shard"] == {
        "count": 2,
        "size": 4,
        "first": [0, 2, 4, 6],
        "fewest_nodes": 1,
        "most_nodes": 1,
    }
    assert rank["groups"]["expert.shard"] == [1, 3, 5, 7]
    assert rank["parameters"]["layers.2.ffn.experts.w2"]["offsets"] == [28, 0, 0]
    held = rank["held_bytes"]
    assert held["total"] == held["weights"] + held["gradients"] + held["master"] + held["moments"]
    assert rank["step_bytes"]["total"] > held["total"] * 0.99
    assert rank["num_parameters"] < held["weights"] / 2 * 1.01


def test_one_device_has_no_groups(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = told(capsys, recipe="laptop.toml")
    assert code == 0 and "one device" in out and "1 rank on 1 node of 8" in out and "a single device sends nothing" in out


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--layout.dp", "127"], "layout.dp x cp (127) must be divisible by layout.ep (64)"),
        (["--layout.dp", "64", "--layout.ep", "48"], "nearest legal layouts:"),
        (["--rank", "2048"], "--rank (2048) must lie between 0 and 2047"),
        (["--layout.dp", "65536"], "takes 1,048,576 ranks; each is numbered and put into its groups here, at most 65,536"),
    ],
)
def test_what_cannot_be_is_refused(flags: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = told(capsys, *flags)
    assert (code, out) == (2, "")
    assert expected in " ".join(err.split())


def test_few_ranks_are_all_listed_and_of_many_the_corners() -> None:
    assert listed(Layout(dp=16), 3) == [*range(16)]
    assert listed(Layout(pp=2, dp=8, cp=2, tp=4, ep=4), 77) == [0, 1, 2, 3, 4, 7, 8, 15, 16, 63, 64, 77, 127]
    assert (shortened([0, 8]), shortened([*range(0, 64, 8)])) == ("0, 8", "0, 8, 16 ... 56")
