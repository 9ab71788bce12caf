"""The command line: what it answers, with which exit code, and without importing torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import quintet
from quintet.cli import main as cli
from quintet.cli.main import COMMANDS, main
from quintet.errors import CheckpointError, DataError, GivenUp, NumericsError, QuintetError
from quintet.spec import parse
from quintet.spec.run import Run


@pytest.fixture
def recipe(root: Path) -> str:
    return str(root / "recipes" / "laptop.toml")


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> TellMain:
    return TellMain(capsys)


class TellMain:
    """Runs the command line and gives (exit code, stdout, stderr), with the frames of boxed messages taken off."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        code = main(list(arguments))
        out, err = self.capsys.readouterr()
        return code, out, " ".join(err.replace("│", " ").split())


def resolved(output: str) -> Run:
    """The run that a dry run has printed before its tables."""
    return parse.loads(output.partition("parameters ──")[0], origin="dry run")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--layout.schedule", "1f1d"], "--layout.schedule '1f1d' is not one of its choices (did you mean '1f1b'?): gpipe, 1f1b,"),
        (["--train.recompute=ful"], "--train.recompute 'ful' is not one of its choices (did you mean 'full'?): none, selective, full"),
        (["--layout.zero", "4"], "--layout.zero '4' is not one of its choices: 0, 1, 2, 3"),
    ],
)
def test_a_word_that_is_not_among_an_options_choices_gets_the_nearest(words: list[str], expected: str, recipe: str, told: TellMain) -> None:
    code, _, err = told("train", recipe, "--dry-run", *words)
    assert code == 2 and expected in err


def test_choices_are_taken_whichever_way_they_are_written(recipe: str, told: TellMain) -> None:
    code, out, err = told("train", recipe, "--dry-run", "--layout.schedule=1f1b", "--layout.zero", "0", "--layout.schedule", "None")
    assert code == 0 and not err and resolved(out).layout.schedule is None


def test_help_names_every_command(told: TellMain) -> None:
    code, out, _ = told("--help")
    assert code == 0
    assert all(f"  {name} " in out for name in COMMANDS)
    assert told() == (0, out, "")


def test_version(told: TellMain) -> None:
    assert told("--version") == (0, f"quintet {quintet.__version__}\n", "")


@pytest.mark.parametrize(
    ("given", "meant"), [("trian", "train"), ("Train", "train"), ("evalute", "evaluate"), ("--verison", "--version"), ("gen", None)]
)
def test_an_unknown_command_answers_did_you_mean(told: TellMain, given: str, meant: str | None) -> None:
    code, out, err = told(given)
    assert (code, out) == (2, "")
    assert (f"(did you mean '{meant}'?)" in err) == (meant is not None)
    assert "commands: prepare, data, train, resume" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(told: TellMain, command: str) -> None:
    code, out, _ = told(command, "--help")
    assert code == 0
    assert out.startswith(f"usage: quintet {command} ")


def test_help_of_train_holds_the_descriptions_of_the_fields_without_a_recipe(told: TellMain) -> None:
    _, out, _ = told("train", "--help")
    words = " ".join(out.replace("│", " ").split())
    assert "--model.kv-lora-rank INT Width of the compressed key and value, which is what generation caches. (required)" in words
    assert "--phases.0.batch [STR [STR ...]] Curve of the global batch, in sequences. (required)" in words
    assert "--train.micro-batch INT Sequences of one forward and backward" in words


def test_help_with_a_recipe_shows_its_values(told: TellMain, recipe: str) -> None:
    _, out, _ = told("train", recipe, "--help")
    assert "Width of the residual stream. (default: 192)" in " ".join(out.replace("│", " ").split())


def test_dotted_options_replace_the_recipes_values(told: TellMain, recipe: str) -> None:
    options = ["--train.steps", "200", "--model.num-layers", "4", "--name", "x", "--train.no-compile"]
    options += ["--phases.0.length", "7 steps", "--data.sources.1.weight", "3", "--phases.0.batch", "linear from 2 to 4 until 50%", "4"]
    code, out, _ = told("train", recipe, *options, "--dry-run")
    assert code == 0
    run = resolved(out)
    assert (run.name, run.train.steps, run.model.num_layers, run.train.compile) == ("x", 200, 4, False)
    assert (run.phases[0].length, run.data.sources[1].weight) == ("7 steps", 3)
    assert run.phases[0].batch == ("linear from 2 to 4 until 50%", "4")
    assert run.model.hidden_size == parse.read(Path(recipe)).model.hidden_size


def test_underscores_and_hyphens_are_one_and_the_recipe_may_come_later(told: TellMain, recipe: str) -> None:
    _, out, _ = told("train", "--dry-run", recipe, "--model.num_layers", "4", "--train.micro-batch", "2")
    assert resolved(out).model.num_layers == 4


def test_without_options_the_run_is_the_recipes(told: TellMain, recipe: str) -> None:
    _, out, _ = told("train", recipe, "--dry-run")
    assert resolved(out) == parse.read(Path(recipe))


def test_an_option_reaches_into_a_section_that_the_recipe_leaves_out(told: TellMain, recipe: str) -> None:
    _, out, _ = told("train", recipe, "--dry-run", "--model.yarn.original_context", "512")
    yarn = resolved(out).model.yarn
    assert yarn is not None
    assert (yarn.original_context, yarn.factor) == (512, 40)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train.setps", "3"], "Perhaps you meant: --train.steps"),
        (["--train.steps", "many"], "invalid literal for int() with base 10: 'many'"),
        (["--train.precision", "fp23"], "fp23"),
        (["--model.num-groups", "3"], "num_routed_experts (56) must be divisible by num_groups (3)"),
        (["--model.max-context", "100"], "sequence_length (256) must be at most model.max_context (100)"),
        (["--phases.0.batch", "cubic to 3"], "'cubic to 3' is not a piece of a curve"),
        (["--name", "../x"], "name '../x' may hold only letters"),
    ],
)
def test_what_does_not_fit_is_a_usage_error_with_its_reason(told: TellMain, recipe: str, options: list[str], message: str) -> None:
    code, out, err = told("train", recipe, *options, "--dry-run")
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_a_missing_recipe_names_the_nearest(told: TellMain, root: Path) -> None:
    code, _, err = told("train", str(root / "recipes" / "latop.toml"))
    assert code == 2
    assert "did you mean" in err and "laptop.toml" in err


def test_without_a_recipe_the_usage_is_told(told: TellMain) -> None:
    code, _, err = told("train", "--train.steps", "3")
    assert code == 2
    assert "quintet train RECIPE.toml [OPTIONS]" in err


def test_a_recipe_that_stands_behind_an_option_is_not_mistaken(told: TellMain, recipe: str, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    shutil.copy(recipe, other)
    code, _, err = told("train", "--data.tokenizer", str(other), recipe, "--dry-run")
    assert code == 2
    assert "put the recipe first" in err


@pytest.mark.parametrize(("kind", "code"), [(DataError, 10), (CheckpointError, 11), (NumericsError, 12), (GivenUp, 93), (QuintetError, 1)])
def test_an_error_is_one_message_and_its_exit_code(
    told: TellMain, monkeypatch: pytest.MonkeyPatch, kind: type[QuintetError], code: int
) -> None:
    def fail(arguments: list[str]) -> int:
        raise kind("values [1] were wrong; do [bold]that[/bold] instead, " + "long " * 50)

    monkeypatch.setattr(cli, "dispatch", fail)
    exit_code, out, err = told("train")
    assert (exit_code, out) == (code, "")
    assert err.startswith("error: values [1] were wrong; do [bold]that[/bold] instead")


def test_ctrl_c_is_130(told: TellMain, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "dispatch", interrupt)
    assert told("train") == (130, "", "error: interrupted")


def loaded(*arguments: str) -> tuple[int, set[str]]:
    """(exit code, top-level packages that are imported when the command line ends), in a process of its own."""
    script = (
        "import sys; from quintet.cli.main import main; code = main(sys.argv[1:]); print('\\n', *sys.modules, file=sys.stderr); exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    return done.returncode, {name.partition(".")[0] for name in done.stderr.splitlines()[-1].split()}


def test_help_imports_nothing_heavy() -> None:
    code, modules = loaded("--help")
    assert code == 0
    assert not modules & {"torch", "numpy", "tyro", "rich", "msgspec", "transformers", "matplotlib", "tensorboard"}


@pytest.mark.parametrize("arguments", ["train --help", "train RECIPE --dry-run", "info RECIPE", "--print-completion bash"])
def test_what_plans_and_describes_imports_no_torch(recipe: str, arguments: str) -> None:
    code, modules = loaded(*(recipe if word == "RECIPE" else word for word in arguments.split()))
    assert code == 0
    assert not modules & {"torch", "transformers", "matplotlib", "tensorboard"}


@pytest.mark.parametrize("encoding", ["ascii", "utf-8:strict"])
def test_letters_that_a_terminal_lacks_are_no_reason_to_stop(recipe: str, encoding: str) -> None:
    command = [sys.executable, "-m", "quintet.cli.main", "train", recipe, "--dry-run", "--name", "öl"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding}, check=False)
    assert done.returncode == 0, done.stderr
    assert (b"\\xf6l" if encoding == "ascii" else "öl".encode()) in done.stdout


def test_a_value_that_is_not_utf_8_is_a_usage_error_for_it_would_stand_in_a_recipe(told: TellMain, recipe: str) -> None:
    code, out, err = told("train", recipe, "--dry-run", "--data.directory", os.fsdecode(b"caf\xe9"))
    assert (code, out) == (2, "") and "an option's value is not UTF-8 text: b'\\xe9' after 'caf'" in err


def test_on_a_narrow_terminal_the_schedule_is_told_in_lines(told: TellMain, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    code, out, _ = told("train", recipe, "--dry-run")
    assert code == 0 and "peak learning rate  0.003" in out and "…" not in out.partition("schedule")[2]


def test_a_dry_run_that_cannot_be_counted_prints_nothing_but_the_error(
    told: TellMain, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(run: Run) -> dict[str, object]:
        raise DataError("cannot be counted")

    monkeypatch.setattr("quintet.cli.train.run_figures", refuse)
    assert told("train", recipe, "--dry-run") == (10, "", "error: cannot be counted")


def test_output_into_a_closed_pipe_is_no_error(recipe: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    script = "import sys; from quintet.cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", script, "train", "--help"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [("quintet ev", "evaluate"), ("quintet train x.toml --model.num-moe", None), ("quintet train x.toml --train.st", "--train.steps")],
)
def test_bash_completes_commands_and_dotted_options(told: TellMain, tmp_path: Path, words: str, offered: str | None) -> None:
    code, out, _ = told("--print-completion", "bash")
    assert code == 0
    (tmp_path / "completion.sh").write_text(out)
    array = " ".join(f"'{word}'" for word in words.split())
    script = f'source completion.sh; COMP_WORDS=({array}); COMP_CWORD={len(words.split()) - 1}; _tyro_quintet; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (offered or "")


def test_an_unknown_shell_is_a_usage_error(told: TellMain) -> None:
    code, _, err = told("--print-completion", "fish")
    assert code == 2
    assert "takes one of bash, zsh, got 'fish'" in err
