"""`quintet prepare`: statistics for people and as JSON, and nothing done twice."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from quintet.cli.main import main
from quintet.cli.prepare import Bars


@pytest.fixture
def arguments(tmp_path: Path, root: Path) -> list[str]:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.txt").write_text("".join(f"line {i * j} of {i}\n" for j in range(40)))
    options = ["--data.directory", str(tmp_path / "prepared"), "--model.vocab-size", "300"]
    for source in (0, 1):
        options += [f"--data.sources.{source}.paths", str(folder)]
    return ["prepare", str(root / "recipes" / "laptop.toml"), *options]


def test_statistics_are_printed_and_what_is_done_is_not_done_again(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--json"]) == 0
    first, err = capsys.readouterr()
    assert "preparing stdlib" in err
    statistics = json.loads(first)["stdlib"]
    assert statistics["documents"] + statistics["held_out_documents"] == 8
    assert statistics["reused"] is False
    assert main(arguments) == 0
    again, err = capsys.readouterr()
    assert err == f"report: {tmp_path / 'prepared' / 'report.html'}\n"
    assert "Some that were kept" not in (tmp_path / "prepared/report.html").read_text()
    words = " ".join(again.split())
    assert f"tokens to train on {statistics['tokens']:,}" in words
    assert "work done before done before" in words


def test_what_is_there_from_other_text_is_replaced_only_when_asked(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    (tmp_path / "text" / "0.txt").write_text("other text")
    assert main(arguments) == 10
    assert f"quintet prepare {arguments[1]} --replace" in capsys.readouterr().err
    assert main([*arguments, "--replace"]) == 0
    assert main(arguments) == 0


def test_what_was_skipped_is_told_with_its_place_and_remedy(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text" / "bad.txt").write_bytes(b"abc\xff")
    (tmp_path / "text" / "picture.png").write_bytes(b"")
    assert main(arguments) == 0
    words = "".join(capsys.readouterr().out.split())  # lines are broken within long paths, too
    assert f"skippedindocs:1invalid_utf8,suchas{tmp_path / 'text' / 'bad.txt'}(atbyte3):itisnotUTF-8" in words
    assert "skippedinstdlib:1not_text:thenameisnotthatofatextfile" in words
    assert "skipped22work" in words


def test_a_missing_folder_is_a_data_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--data.sources.0.paths", "no/such/folder"]) == 10
    assert "'no/such/folder'" in capsys.readouterr().err


def test_bars_move_on_a_terminal_and_are_gone_afterwards() -> None:
    output = StringIO()
    console = Console(file=output, force_terminal=True, width=120)
    with Bars(console) as bars:
        bars.start("stdlib", 1000)
        bars.advance("stdlib", 2, 500)
        bars.tell("a notice")
        bars._progress.refresh()
    text = output.getvalue()
    assert "2 documents" in text
    assert "500" in text and "a notice" in text
    assert "preparing" not in text
