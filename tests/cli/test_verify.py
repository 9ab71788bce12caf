"""`quintet verify`: its verdict, what it names, and what it refuses."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from quintet.cli.main import main
from quintet.cli.verify import DIFFERENT, report
from quintet.evaluate.parity import Row
from quintet.launch import room
from quintet.spec import parse
from quintet.spec.layout import Layout
from quintet.spec.run import Run

LAPTOP = Path(__file__).parents[2] / "recipes" / "laptop.toml"


def told(rows: list[Row], run: Run) -> tuple[int, str]:
    out = io.StringIO()
    return report(rows, run, everything=False, out=Console(file=out, width=200)), out.getvalue()


def test_equal_computations_pass_and_a_difference_names_parameter_step_and_rank() -> None:
    run = replace(parse.read(LAPTOP), layout=Layout(dp=2))
    good = [Row(1, "total loss", "", 1e-7, 1e-4, 0), Row(1, "gradient", "embed.weight", 1e-6, 1e-4, 1)]
    assert told(good, run) == (0, told(good, run)[1]) and "2 comparisons in bf16 pass" in told(good, run)[1]
    code, text = told([*good, Row(1, "gradient", "layers.3.ffn.router.weight", 0.5, 1e-4, 3), Row(2, "weight", "x", 1.0, 1e-4, 0)], run)
    assert code == DIFFERENT
    assert "2 of 4 comparisons fail; the first is the gradient of layers.3.ffn.router.weight in step 1: off by 5.0e-01" in text
    assert "most on rank 3" in text


def test_nan_is_a_failure_and_stands_first() -> None:
    run = replace(parse.read(LAPTOP), layout=Layout(dp=2))
    code, text = told([Row(1, "gradient", "a", 0.1, 1e-4, 0), Row(1, "gradient", "b", math.nan, 1e-4, 1)], run)
    assert code == DIFFERENT and text.index(" b ") < text.index(" a ")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "the layout is one device"),
        (["--layout.pp", "2", "--layout.schedule", "dualpipe", "--sequences", "3"], "sequences (3) must be at least"),
        (["--layout.dp", "2", "--steps", "0"], "steps (0) and sequences (5) must be at least 1"),
        (["--layout.tp", "3"], "must be divisible by layout.tp (3)"),
        (["--layout.dp", "4", "--max-ranks", "3"], "the layout (dp=4) takes 4 ranks, and --max-ranks allows 3"),
    ],
)
def test_what_cannot_be_verified_is_refused(options: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(LAPTOP), "--tiny", *options]) == 2
    assert expected in " ".join(capsys.readouterr().err.split())


def test_no_smaller_layout_is_named_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(LAPTOP), "--tiny", "--layout.dp", "2", "--max-ranks", "1"]) == 2
    assert "--max-ranks allows 1; allow it all the same with --max-ranks 2\n" in capsys.readouterr().err


def test_the_published_model_in_small_is_verified_on_its_own_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = LAPTOP.with_name("v3-671b.toml")
    layout = ["--layout.pp", "1", "--layout.dp", "2", "--layout.ep", "2", "--layout.zero", "1"]
    assert main(["verify", str(recipe), "--tiny", "--steps", "1", "--train.precision", "fp32", *layout]) == 0
    assert "dp=2 ep=2 zero=1: " in capsys.readouterr().out


def test_a_layout_for_a_cluster_is_refused_with_a_small_one_that_divides_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(room.machine, "num_cores", lambda: 2)
    monkeypatch.setattr(room.machine, "free_memory", lambda: 10**11)
    recipe = str(LAPTOP.with_name("v3-671b.toml"))
    assert main(["verify", recipe]) == 2
    assert "one device, with which the layout is compared, takes about" in capsys.readouterr().err
    assert main(["verify", recipe, "--tiny"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "takes 2,048 ranks, each a process on this machine, whose 2 cores are for 32" in told
    assert "on 16, with --layout.pp 2 --layout.dp 8 --layout.ep 4, or allow it all the same with --max-ranks 2048" in told


def test_numbers_are_whole_in_a_narrow_terminal() -> None:
    out = io.StringIO()
    rows = [Row(1, "gradient", "layers.12.attention.kv_norm.weight.and.more.of.it.that.is.long", 1.25e-3, 1e-4, 1000)]
    report(rows, replace(parse.read(LAPTOP), layout=Layout(dp=2)), everything=False, out=Console(file=out, width=80))
    table = out.getvalue().partition("dp=2")[0]
    assert all(word in table for word in ("layers.12.attention.", "is.lo", "1.3e-03", "1.0e-04", "1000", "FAIL"))
