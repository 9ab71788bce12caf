"""`quintet schedule`: figures beside formulas and other schedules, files on request, refusals by rule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quintet.cli.main import main
from quintet.schedule import NAMES


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["schedule", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_figures_stand_beside_formulas_and_all_other_schedules(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    code, out, err = told(capsys, "dualpipe", "--ranks", "4", "--microbatches", "8")
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line.split() for line in out.splitlines()[1:9]}
    assert next(iter(rows)) == "dualpipe"
    assert set(rows) == set(NAMES)
    # Step, efficiency, bubble, formula.
    assert rows["dualpipe"][1:8] == ["26", "s", "92.3%", "2", "s", "2", "s"]
    assert rows["1f1b"][1:8] == ["33", "s", "72.7%", "9", "s", "9", "s"]
    assert "(P/2-1)(F&B+B-3W)" in out
    assert sum(line.startswith("rank ") for line in out.splitlines()) == 4


def test_schedules_that_do_not_take_the_shape_are_left_out_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = told(capsys, "zbv", "--ranks", "3", "--microbatches", "4")
    assert code == 0
    assert "left out: num_microbatches (4) must be at least 2 x num_ranks (6) for dualpipev" in " ".join(out.split())


def test_json_has_every_figure_per_rank(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = told(capsys, "dualpipe", "--ranks", "16", "--microbatches", "120", "--costs", "deepseek-v3", "--alone", "--json")
    (figures,) = json.loads(out)
    assert code == 0
    assert figures["schedule"] == "dualpipe"
    assert figures["copies_of_parameters"] == 2
    assert len(figures["bubble_per_rank"]) == len(figures["exposed_p2p_seconds_per_rank"]) == 16
    assert figures["step_seconds"] == pytest.approx(sum(figures["anatomy_seconds"].values()))
    assert max(figures["peak_activations_per_rank"]) == figures["formula"]["activations"] == 17


def test_a_recipe_tells_the_peak_memory_of_every_rank(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    shape = ("dualpipe", "--ranks", "4", "--microbatches", "8", "--recipe", "recipes/v3-16b.toml")
    code, out, _ = told(capsys, *shape)
    assert code == 0
    assert "memory" in out.splitlines()[0]
    assert all("GiB" in line for line in out.splitlines()[1:9])
    _, out, _ = told(capsys, *shape, "--alone", "--json")
    (figures,) = json.loads(out)
    parts = (figures[f"{name}_per_rank"] for name in ("peak_memory", "peak_activations", "states"))
    for peak, activations, states in zip(*parts, strict=True):
        assert peak == activations + sum(states.values())
        assert {"weights", "gradients", "master_weights", "moments"} <= set(states)


def test_a_recipe_whose_layers_do_not_suffice_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = told(capsys, "zbv", "--ranks", "16", "--microbatches", "32", "--recipe", "recipes/laptop.toml")
    assert code == 2
    assert "must be at most model.num_layers" in err


def test_the_order_and_the_program_are_printed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "gpipe", "--ranks", "2", "--microbatches", "1", "--order") == (0, "rank 0: 0F0 0B0\nrank 1: 1F0 1B0\n", "")
    _, out, _ = told(capsys, "gpipe", "--ranks", "2", "--microbatches", "1", "--program")
    assert out.splitlines()[0] == "rank 0: 0F0 [send 0F0 to 1, receive 0B0 from 1] 0B0"


def test_pictures_and_traces_are_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.svg", "a.html", "a.json")]
    options = [word for option, path in zip(("--svg", "--html", "--trace"), paths, strict=True) for word in (option, str(path))]
    assert told(capsys, "zb1p", "--ranks", "2", "--microbatches", "4", *options)[0] == 0
    assert paths[0].read_text().startswith("<svg")
    assert paths[1].read_text().count("<svg") == len(NAMES)
    processes = [event for event in json.loads(paths[2].read_text())["traceEvents"] if event["name"] == "process_name"]
    assert {event["args"]["name"] for event in processes} == set(NAMES)


def test_a_search_tells_its_bound_and_what_it_beats_and_can_be_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    path = str(tmp_path / "kept.json")
    shape = ("--ranks", "2", "--microbatches", "4", "--costs", "pair=0.8")
    code, out, _ = told(capsys, "search", *shape, "--memory", "2.5", "--once", "--seconds", "0.2", "--save", path)
    assert code == 0
    assert "which nothing on its routes can beat" in out
    assert "the best named schedule with at most 2.5 activations is dualpipev" in out
    code, again, _ = told(capsys, path, "--costs", "pair=0.8", "--alone")
    assert code == 0
    assert again.splitlines()[1].split() == out.splitlines()[1].split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dualpipes",), "'dualpipes' is not a schedule (did you mean 'dualpipe'?)"),
        (("dualpipe", "--ranks", "5"), "num_ranks (5) must be even for dualpipe"),
        (("dualpipev", "--ranks", "8", "--microbatches", "15"), "choose 16 or more micro-batches, at most 7 ranks, or zbv"),
        (("1f1b", "--costs", "deepsek-v3"), "(did you mean 'deepseek-v3'?)"),
        (("nowhere.json",), "cannot read the schedule nowhere.json"),
        (("search", "--ranks", "4", "--memory", "0.5", "--seconds", "0.1"), "memory (0.5) holds no schedule of 4 ranks; choose at least 1"),
        (("1f1b", "--svg", "/nowhere/a.svg"), "cannot write /nowhere/a.svg: No such file or directory"),
    ],
)
def test_bad_input_is_refused_with_the_remedy(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    code, out, err = told(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
