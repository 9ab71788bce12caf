"""README.md and the pages of docs/ stay true: every command in them is run, every recipe in them is read, the exit codes are the program's.

The commands run in order in a folder like a clone's, in which the laptop recipe is a small one of the same name and the interpreter's
library is a few files. `make` is asked what it would do, and what it would train is looked at with --dry-run.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quintet import errors
from quintet.cli.main import main, usage
from quintet.cost.flops import parameters
from quintet.data import sources
from quintet.errors import QuintetError
from quintet.spec import parse
from quintet.spec.run import Run
from tests.train.runs import MODEL, write_texts

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "docs/training.md",
    "docs/data.md",
    "docs/checkpoints.md",
    "docs/parallelism.md",
    "docs/pipeline.md",
    "docs/planner.md",
)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SHELL = re.compile(r"[|&;<>$`]")


def blocks(page: str, *languages: str) -> list[str]:
    """The fenced blocks of a page in these languages."""
    return [text for language, text in _FENCE.findall((ROOT / page).read_text()) if language in languages]


def commands(page: str) -> Iterator[str]:
    """The shell commands of a page in order: every line of a bash block, every line after `$` of a console block."""
    for language, text in _FENCE.findall((ROOT / page).read_text()):
        for line in text.splitlines():
            if language == "bash" and line.strip() and not line.startswith("#"):
                yield line
            elif language == "console" and line.startswith("$ "):
                yield line.removeprefix("$ ")


def small(run: Run) -> Run:
    """The run with a tiny model, uncompiled, and with few and short sequences."""
    phases = tuple(replace(phase, length="20 steps", sequence_length=16, batch=("2",)) for phase in run.phases)
    return replace(
        run,
        model=replace(MODEL, max_context=1024),
        phases=phases,
        train=replace(run.train, micro_batch=2, compile=False, device="cpu"),
        evaluation=replace(run.evaluation, num_sequences=2),
        monitor=replace(run.monitor, sample_tokens=4),
    )


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the recipes, the laptop's made small, texts of one's own, and the environment that `make install` makes."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    laptop = folder / "recipes" / "laptop.toml"
    laptop.write_text(parse.dumps(small(parse.read(laptop))))
    library = write_texts(folder / "library", count=40, seed=1)
    (library / "documented.py").write_text('"""A module with a docstring that is long enough to be kept as prose."""\n')
    (library / "pydoc_data").mkdir()
    topics = {f"topic {i}": f"what there is to say about {i} " * 5 for i in range(20)}
    (library / "pydoc_data" / "topics.py").write_text(f"topics = {topics!r}")
    write_texts(folder / "my-code", count=30, seed=2)
    write_texts(folder / "my-notes", count=10, seed=3)
    (folder / "more-notes").mkdir()
    (folder / "more-notes" / "a.jsonl").write_text('{"text": "a note of my own"}\n' * 5)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").write_text(f'export PATH="{Path(sys.executable).parent}:$PATH"\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sources, "sysconfig", SimpleNamespace(get_path=lambda name: str(library)))
        yield folder


def run_command(line: str, clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run one line; where it fails, so does the test, with what the line said."""
    words = shlex.split(line)
    if words[0] == "make":
        check_make(words)
    elif words[0] == "quintet" and not _SHELL.search(re.sub(r"'[^']*'|\"[^\"$`]*\"", "", line)):
        code = main(words[1:])
        assert code == 0, f"{line}\n{capsys.readouterr().err}"
        if words[1] == "import":
            shrink(clone / words[3] / "recipe.toml")
    else:
        path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        done = subprocess.run(["bash", "-ec", line], cwd=clone, env={"PATH": path}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stderr}"


def check_make(words: list[str]) -> None:
    """Make knows what it is asked for, and what it would train is a run."""
    done = subprocess.run([words[0], "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr}"
    for line in done.stdout.splitlines():
        if line.startswith(".venv/bin/quintet train"):
            assert main([*shlex.split(line)[1:], "--dry-run"]) == 0, line


def shrink(recipe: Path) -> None:
    """Edit an imported run's recipe, as the page tells people to do, so that it trains for a moment only."""
    run = parse.read(recipe)
    phase = replace(run.phases[0], length="2 steps", sequence_length=16, batch=("2",))
    train = replace(run.train, compile=False, device="cpu")
    run = replace(run, phases=(phase,), train=train, monitor=replace(run.monitor, tensorboard=False, sample_tokens=4))
    recipe.write_text(parse.dumps(run))


def test_every_command_of_the_pages_runs(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for page in PAGES for line in commands(page)]
    assert len(lines) > 20
    for line in lines:
        run_command(line, clone, capsys)
    # And a run has left what the first listing says; what `make train` exports besides is not made here.
    assert {path.name for path in (clone / "runs").iterdir()} >= {"first", "second", "mine"}
    names = re.findall(r"^([\w.]+)/? ", blocks("README.md", "")[0], re.MULTILINE)
    assert len(names) == 8
    assert {*names} - {path.name for path in (clone / "runs" / "mine").iterdir()} == {"hf"}


def test_the_readme_shows_every_command() -> None:
    from quintet.cli.main import COMMANDS

    shown = {shlex.split(line)[1] for line in commands("README.md") if line.startswith("quintet ")}
    assert shown == set(COMMANDS)


def test_a_command_that_fails_would_be_noticed(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("quintet info recipes/none.toml", "make nothing", "false", 'make train ARGS="--train.setps 3"'):
        with pytest.raises(AssertionError):
            run_command(line, clone, capsys)


@pytest.mark.parametrize("page", PAGES)
def test_every_recipe_on_a_page_is_one(page: str) -> None:
    laptop = tomllib.loads((ROOT / "recipes" / "laptop.toml").read_text())
    for text in blocks(page, "toml"):
        run = parse.build(merged(laptop, tomllib.loads(text)), origin=page)
        assert run.name == "laptop"


def merged(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The tree with the changes; tables are merged, anything else is replaced."""
    return tree | {k: merged(tree[k], v) if isinstance(v, dict) and k in tree else v for k, v in changes.items()}


def test_the_sizes_of_the_recipes_are_counted() -> None:
    rows = re.findall(
        r"^\| `(recipes/.*?)` \| ([\d.]+) ([MB])\b[^|]*?([\d.]+) ([MB]) active", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert {row[0] for row in rows} == {str(path.relative_to(ROOT)) for path in (ROOT / "recipes").glob("*.toml")}
    for recipe, *shown in rows:
        weights = parameters(parse.read(ROOT / recipe).model)
        for number, digits, unit in zip((weights.total, weights.active), shown[::2], shown[1::2], strict=True):
            assert abs(number / {"M": 1e6, "B": 1e9}[unit] / float(digits) - 1) < 0.025, recipe


def test_the_exit_codes_are_the_programs_own() -> None:
    def codes(kind: type[QuintetError]) -> set[int]:
        return {kind.exit_code}.union(*(codes(inner) for inner in kind.__subclasses__()))

    table = {int(code) for code in re.findall(r"^\| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)}
    known = codes(QuintetError) | {errors.DONE, errors.INTERRUPTED, errors.KEYBOARD_INTERRUPT}
    assert table == known
    assert {int(code) for code in re.findall(r"\b(\d+) [a-z]", usage().partition("exit codes:")[2])} == known


@pytest.mark.parametrize("page", [*PAGES, "docs/architecture.md", "docs/glossary.md", "docs/LOG.md"])
def test_links_within_the_repository_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"
