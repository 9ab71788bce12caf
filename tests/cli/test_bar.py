"""The bar of commands that take a while: on a terminal alone, and gone afterwards."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from quintet.cli.bar import Bar


def test_a_bar_pulses_then_fills_on_a_terminal() -> None:
    output = StringIO()
    with Bar("exporting [to] x", Console(file=output, force_terminal=True, width=100)) as bar:
        bar._progress.refresh()
        assert "exporting [to] x" in output.getvalue() and "50%" not in output.getvalue()
        bar(512, 1024)
        bar._progress.refresh()
        assert "50%" in output.getvalue()
    assert output.getvalue().endswith("\x1b[2K")  # the line is erased


def test_nothing_is_drawn_elsewhere() -> None:
    output = StringIO()
    with Bar("exporting", Console(file=output)) as bar:
        bar(1, 2)
    assert output.getvalue() == ""
