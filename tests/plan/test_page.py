"""docs/pipeline.md stays true: its pictures, tables and outputs are what the tool gives."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from quintet.cli.main import main
from quintet.plan.bound import lower_bound
from quintet.plan.break_even import break_even
from quintet.plan.costs import PRESETS, read
from quintet.plan.simulate import held_by, simulate
from quintet.schedule import NAMES, build, check
from quintet.schedule.held import peak
from quintet.schedule.text import loads
from quintet.spec import parse

PAGE = (Path(__file__).parent.parent.parent / "docs" / "pipeline.md").read_text()
DRAWINGS = re.findall(r"^quintet (schedule .*) --svg docs/(images/\S+)$", PAGE, re.MULTILINE)


def test_every_picture_of_the_page_is_drawn() -> None:
    assert {path for _, path in DRAWINGS} == set(re.findall(r"!\[.*?\]\((.*?)\)", PAGE))


@pytest.mark.parametrize(("line", "path"), DRAWINGS)
def test_pictures_are_what_the_tool_draws(line: str, path: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    assert main([*shlex.split(line), "--svg", str(tmp_path / "drawn.svg")]) == 0
    assert (tmp_path / "drawn.svg").read_text() == (root / "docs" / path).read_text()


def test_what_the_page_shows_is_what_the_tool_prints(capsys: pytest.CaptureFixture[str]) -> None:
    shown = re.findall(r"^\$ quintet (schedule .*)\n((?:rank .*\n)+)", PAGE, re.MULTILINE)
    assert len(shown) == 2
    for line, output in shown:
        assert main(shlex.split(line)) == 0
        assert capsys.readouterr().out == output


def test_the_costs_file_of_the_page_can_be_read(tmp_path: Path) -> None:
    (text,) = re.findall(r"^```text\n(# The last.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "costs.toml").write_text(text)
    costs = read(str(tmp_path / "costs.toml"))
    assert (costs.profile, costs.layers) == ((1.0, 1.0, 1.0, 1.5), 4)


def test_the_table_of_deepseeks_costs_is_simulated() -> None:
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) s \| ([\d.]+) % \| ([\d.]+) s \| [\d.]+ s \| ([\d.]+) \|$", PAGE, re.MULTILINE)
    assert {row[0] for row in rows} == set(NAMES)
    for name, *shown in rows:
        found = simulate(build(name, 16, 120), PRESETS["deepseek-v3"])
        kept = max(found.peak_activations)
        assert [float(one) for one in shown] == pytest.approx(
            [round(found.makespan, 1), round(100 - 100 * found.mean_bubble, 1), round(found.anatomy["bubble"], 2), kept]
        )


def test_the_table_of_memory_is_that_of_the_recipe(root: Path) -> None:
    rows = re.findall(r"^\| ([\w-]+) \| (\d+), (\d+) \| (\d+), (\d+) \| (\d+), (\d+) \|$", PAGE, re.MULTILINE)
    run = parse.read(root / "recipes" / "v3-671b.toml")
    assert {row[0] for row in rows} == set(NAMES)
    for name, *shown in rows:
        schedule, found = build(name, 16, 120), list[float]()
        for recompute in ("none", "selective", "full"):
            held = held_by(schedule, replace(run, train=replace(run.train, recompute=recompute)), sequence_length=4096)
            kept = [peak(row, kept=held.kept, put_off=held.put_off) for row in schedule.table]
            found += [max(kept) / 2**30, max(one + sum(states.values()) for one, states in zip(kept, held.states, strict=True)) / 2**30]
        assert shown == [f"{one:.0f}" for one in found], name


def test_the_schedule_that_was_found_beats_dualpipe_and_is_close_to_the_bound(root: Path) -> None:
    found = loads((root / "docs" / "images" / "found.json").read_text(), origin="found.json")
    costs = read("pair=0.75")
    checked, step = check(found), simulate(found, costs).makespan
    dualpipe = simulate(build("dualpipe", 4, 16), costs)
    assert (step, dualpipe.makespan, lower_bound(found, costs, memory=5.0)) == (40.25, 41.0, 40.0)
    assert max(checked.peak_activations) == max(dualpipe.peak_activations) == 5


@pytest.mark.parametrize(
    ("file", "seconds", "kept"),
    [("found_4x16_in_4", 46.25, 4.0), ("found_8x16_in_9", 45.75, 9.0), ("found_8x16_in_8", 48.125, 8.0), ("found_8x16_in_4.5", 68.9, 4.5)],
)
def test_the_found_schedules_of_the_benchmark_take_what_the_page_says(root: Path, file: str, seconds: float, kept: float) -> None:
    schedule = loads((root / "benchmarks" / "schedules" / f"{file}.json").read_text(), origin=file)
    check(schedule)
    found = simulate(schedule, read("pair=0.75"))
    assert (found.makespan, max(found.peak_activations)) == (pytest.approx(seconds, abs=0.05), kept)
    row = rf"^\| {schedule.num_ranks}, 16 \| F = I = W, pairs 0.75 \| {kept:g} \| .* \| {seconds:g} s"
    assert re.search(row, PAGE, re.MULTILINE)


def test_the_break_evens_are_simulated() -> None:
    rows = re.findall(r"^\| (\d+), (\d+) \| (.+?) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 5
    for ranks, microbatches, name, *shown in rows:
        costs = PRESETS.get(name, PRESETS["equal"])
        plain = [one for one in NAMES if not one.startswith("dualpipe")]
        best = min(simulate(build(one, int(ranks), int(microbatches)), costs).makespan for one in plain)
        for one, share in zip(("dualpipe", "dualpipev"), shown, strict=True):
            found = break_even(build(one, int(ranks), int(microbatches)), costs, against=best)
            assert found == pytest.approx(float(share), abs=0.001)
