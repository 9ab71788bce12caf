"""The report is one page without scripts or outside references, whose plots are valid SVG and whose text is escaped."""

from __future__ import annotations

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from quintet.errors import DataError
from quintet.monitor.metrics import Event
from quintet.monitor.report import write_report
from quintet.monitor.sinks import JsonLines
from tests.monitor.events import evaluated, record, saved

SVG = "{http://www.w3.org/2000/svg}"


def report(tmp_path: Path, *items: Event, recipe: str = "name = 'x'", samples: list[tuple[str, str]] | None = None) -> str:
    sink = JsonLines(tmp_path / "metrics.jsonl")
    for item in items:
        sink.write(item)
    sink.close()
    path = write_report(tmp_path, recipe_toml=recipe, samples=samples or [])
    assert path == tmp_path / "report.html"
    return path.read_text(encoding="utf-8")


def plots(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg .*?</svg>", page, re.DOTALL)]


def labels(plot: ElementTree.Element) -> str:
    return " ".join("".join(text.itertext()) for text in plot.iter(f"{SVG}text"))


def test_samples_and_recipe_are_escaped(tmp_path: Path) -> None:
    hostile = "<script>alert('&')</script>"
    page = report(tmp_path, record(1), recipe=f"# {hostile}", samples=[(hostile, "x < 1 && y")])
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;") == 2
    assert "x &lt; 1 &amp;&amp; y" in page


def test_the_page_stands_alone_and_every_plot_is_valid_svg(tmp_path: Path) -> None:
    page = report(tmp_path, *(record(step) for step in range(1, 11)), evaluated(5), saved(5), evaluated(10))
    found = plots(page)
    assert [plot.attrib["role"] for plot in found] == ["img"] * 4
    assert "held out: stdlib" in labels(found[0])
    assert "MoE layer" in labels(found[1])
    assert "MFU" in labels(found[2])
    assert "Learning rate" in labels(found[3])
    # No reference leads outside: only XML namespaces, images inside the page, and ids of the page's own.
    outside = re.findall(r'(?:src|href)="(?!#|data:)([^"]*)"|url\((?!#)([^)]*)\)|@import', page)
    assert outside == []


def test_ids_are_unique_and_every_reference_has_its_target(tmp_path: Path) -> None:
    page = report(tmp_path, *(record(step) for step in range(1, 4)))
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(ids)


def test_plots_follow_the_readers_theme(tmp_path: Path) -> None:
    page = report(tmp_path, record(1), record(2))
    assert "prefers-color-scheme: dark" in page
    assert "stroke: var(--series-0)" in page
    assert "fill: var(--ink)" in page
    assert "#010203" not in page


def test_the_final_figures_are_told(tmp_path: Path) -> None:
    page = report(tmp_path, record(1), record(2), evaluated(2), saved(2))
    for figure in ("2 of 10", "8,192", "8.19K tokens/s", "41.0%", "1 GiB", "0.364", "4.2500", "70.11", "1.7500", "16,384"):
        assert figure in page, figure


def test_a_run_that_failed_on_its_first_step_still_has_a_report(tmp_path: Path) -> None:
    page = report(tmp_path, record(1, loss=math.nan, main_loss=math.nan, mfu=None, expert_load=()))
    assert "no routed experts" in page
    assert "Training time, seconds" in page


def test_a_long_run_makes_no_larger_page(tmp_path: Path) -> None:
    short = report(tmp_path, *(record(step) for step in range(1, 801)))
    long = report(tmp_path, *(record(step) for step in range(801, 3201)))
    assert len(long) < 1.2 * len(short)


def test_without_records_there_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no record"):
        report(tmp_path, saved(1))
