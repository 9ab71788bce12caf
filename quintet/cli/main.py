"""The `quintet` command: find the command, run it, turn errors into one message and an exit code.

Nothing heavy is imported before a command is known, so that `quintet --help` answers at once.
"""

from __future__ import annotations

import importlib
import io
import os
import sys

import quintet
from quintet.cli.tell import leave_the_word, speaks_for_all, tell
from quintet.errors import KEYBOARD_INTERRUPT, QuintetError, UsageError, did_you_mean
from quintet.monitor.interrupt import remembered

COMMANDS = {
    "prepare": "turn the text of a recipe into token shards, once",
    "data": "say which quality rules a document passes, and why",
    "train": "train a model as a recipe says",
    "resume": "continue a run from its newest checkpoint",
    "watch": "show where a run stands, live, from another terminal",
    "generate": "continue a prompt with a trained model",
    "evaluate": "measure the loss on held-out documents",
    "checkpoint": "list, inspect, compare, verify, keep and rewrite checkpoints",
    "export": "write a checkpoint as a Hugging Face model",
    "import": "make a run of a Hugging Face model",
    "info": "describe a recipe, a run or a Hugging Face model",
    "verify": "prove that a layout computes what one device computes",
    "layout": "show who sits where in a layout, and what a rank holds",
    "plan": "tell memory, time and cost of a run on a cluster, and the best layout",
    "schedule": "simulate and draw a pipeline schedule",
    "doctor": "tell what this machine can do, and what is missing",
}

SHELLS = ("bash", "zsh")

OPTIONS = {
    "-h, --help": "show this text; `quintet COMMAND --help` shows a command's own",
    "--version": "show the version",
    f"--print-completion {{{','.join(SHELLS)}}}": "print a completion script for the shell",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's own) and return the exit code; errors are told on stderr."""
    arguments = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # a letter that the terminal does not have is no reason to stop
    try:
        with remembered():
            return dispatch(arguments)
    except QuintetError as error:
        if speaks_for_all():
            tell(str(error))
        leave_the_word()
        return error.exit_code
    except KeyboardInterrupt:
        if speaks_for_all():
            tell("interrupted")
        return KEYBOARD_INTERRUPT
    except BrokenPipeError:
        # The reader of our output has gone (`quintet info x | head`); Python's own flush at exit must not meet the pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as stop:
        # How the option parser ends: 0 after help, 2 after a usage error that it has told.
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else UsageError.exit_code


def dispatch(arguments: list[str]) -> int:
    """Run the command that the first argument names."""
    first, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if first in ("-h", "--help", "help"):
        print(usage())
        return 0
    if first == "--version":
        print(f"quintet {quintet.__version__}")
        return 0
    if first == "--print-completion":
        return print_completion(rest)
    if first not in COMMANDS:
        kind = "an option" if first.startswith("-") else "a command"
        known = [*COMMANDS, "--help", "--version", "--print-completion"]
        raise UsageError(f"{first!r} is not {kind} of quintet{did_you_mean(first, known)}; commands: {', '.join(COMMANDS)}")
    # Read by OpenMP when torch is loaded. By default its threads spin while they wait for each other, and a step becomes tens of times
    # slower as soon as another program wants one of the cores; a short spin is as fast on a quiet machine, and bears a busy one.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    return int(importlib.import_module(_module(first)).main(rest))


def usage() -> str:
    """The text of `quintet --help`."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    options = "\n".join(f"  {name:{max(map(len, OPTIONS))}}  {text}" for name, text in OPTIONS.items())
    return (
        "usage: quintet COMMAND [OPTIONS]\n\n"
        "From raw text to a trained, checked and exported DeepSeek-V3-class language model.\n\n"
        f"commands:\n{commands}\n\n"
        f"options:\n{options}\n\n"
        "exit codes: 0 done, 1 other error, 2 usage, 10 data, 11 checkpoint, 12 numerics, 75 stopped by a signal (resume it),\n"
        "            76 a rank is lost (resume it), 93 given up, 130 interrupted (Ctrl-C)"
    )


def print_completion(arguments: list[str]) -> int:
    """Print the completion script for a shell."""
    shell = arguments[0] if len(arguments) == 1 else ""
    if shell not in SHELLS:
        raise UsageError(f"--print-completion takes one of {', '.join(SHELLS)}, got {' '.join(arguments) or 'nothing'!r}")
    from quintet.cli.options import completion

    kinds = {name: importlib.import_module(_module(name)).Arguments for name in COMMANDS}
    print(completion(kinds, descriptions=COMMANDS, shell=shell))
    return 0


def _module(command: str) -> str:
    return f"quintet.cli.{'import_' if command == 'import' else command}"


if __name__ == "__main__":
    sys.exit(main())
