"""From command-line words to a frozen dataclass, with a recipe's own values as the defaults of its dotted options."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import tyro

from quintet.cli.tell import leave_the_word, speaks_for_all
from quintet.errors import UsageError, did_you_mean
from quintet.spec import parse
from quintet.spec.run import Run

T = TypeVar("T")


class HasRecipe(Protocol):
    """Arguments with a recipe; and a `run`, whose fields are options."""

    @property
    def recipe(self) -> Path:
        """The path that was given."""


R = TypeVar("R", bound=HasRecipe)

Overrides = Annotated[Run, tyro.conf.arg(name="")]
"""A run whose fields are options by their dotted path."""

Recipe = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RECIPE.toml")]
"""The path of a recipe, which `read_with_recipe` has read."""

RunPath = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
"""The path of a run or a checkpoint."""

ModelPath = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
"""The path of a run or a checkpoint, or a checkpoint's URL."""

Directory = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIRECTORY")]
"""The path of another directory."""

Switch = tyro.conf.FlagCreatePairsOff[bool]
"""An option that is only ever given, never negated."""


def read(kind: type[T], arguments: Sequence[str], *, command: str, default: T | None = None) -> T:
    """The arguments as a `kind`, those of `default` where they are absent. Exits with 0 after help and with 2, and a message that names
    near options, for what does not fit; of several processes that were started alike only one says so. Raises UsageError for a word that is
    not among an option's choices."""
    _refuse_other_choices(kind, arguments)
    with contextlib.ExitStack() as quiet:
        if not speaks_for_all():
            quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
            quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
        more: dict[str, Any] = {} if default is None else {"default": default}
        try:
            return tyro.cli(kind, args=arguments, prog=f"quintet {command}", config=(tyro.conf.AvoidSubcommands,), **more)
        except SystemExit:
            leave_the_word()
            raise


def _refuse_other_choices(kind: type, arguments: Sequence[str]) -> None:
    """Raise UsageError for the first option whose value is not one of its choices, with the nearest."""
    given = [word.split("=", 1) if "=" in word else [word, following] for word, following in itertools.pairwise([*arguments, ""])]
    for option, value in given:
        choices = _choices(kind, option.removeprefix("--").replace("-", "_").split(".")) if option.startswith("--") else ()
        if choices and value not in (*map(str, choices), "None"):
            names = [str(choice) for choice in choices]
            raise UsageError(f"{option} {value!r} is not one of its choices{did_you_mean(value.lower(), names)}: {', '.join(names)}")


def _choices(kind: Any, path: Sequence[str]) -> tuple[object, ...]:
    """The values that the field at a dotted path takes, if they are a closed list."""
    if typing.get_origin(kind) is typing.Literal:
        return () if path else typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if path and path[0] in hints:
            return _choices(hints[path[0]], path[1:])
        return _choices(hints["run"], path) if path and "run" in hints else ()
    several = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else ()  # an optional section or value
    return next((found for each in several if (found := _choices(each, path))), ())


def read_with_recipe(kind: type[R], arguments: Sequence[str], *, command: str) -> R:
    """As `read`, for a `kind` with fields `recipe` and `run`: the recipe's values stand wherever no option replaces them.

    Raises UsageError without a recipe and for words that are not UTF-8, and what reading the recipe raises.
    """
    recipe = _recipe(arguments)
    if recipe is None and not {"-h", "--help"} & set(arguments):
        here = sorted(str(path) for path in Path("recipes").glob("*.toml"))
        raise UsageError(
            f"no recipe given; write: quintet {command} RECIPE.toml [OPTIONS]; recipes here: {', '.join(here) or 'none'}; "
            f"all options: quintet {command} --help"
        )
    for word in arguments:
        if word != str(recipe):
            refuse_broken_text("an option's value", word)  # for it becomes part of recipe.toml
    run = unset(Run) if recipe is None else _with_named_sections(parse.read(recipe), arguments)
    default = dataclasses.replace(unset(kind), run=run)  # type: ignore[type-var]
    given = read(kind, arguments, command=command, default=default)
    if given.recipe != recipe:
        raise UsageError(f"{recipe} was read as the recipe, but {given.recipe} stands in its place; put the recipe first")
    return given


def refuse_broken_text(name: str, text: str) -> None:
    """Raise UsageError for text whose bytes are not UTF-8, which Python hands over as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        wrong, before = os.fsencode(text[error.start]), text[: error.start][-20:]
        raise UsageError(f"{name} is not UTF-8 text: {wrong!r} after {before!r}; convert it, for example with iconv -t utf-8") from None


def _recipe(arguments: Sequence[str]) -> Path | None:
    """The recipe among the words: the first one, or else the first that ends in .toml."""
    words = [word for i, word in enumerate(arguments) if not word.startswith("-") and (i == 0 or word.endswith(".toml"))]
    return Path(words[0]) if words else None


def _with_named_sections(value: Any, arguments: Sequence[str], prefix: str = "--") -> Any:
    """The dataclass with each absent section that an option reaches into (`--model.yarn.factor 4`) at the section's defaults."""
    hints = typing.get_type_hints(type(value))
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        inner, path = getattr(value, field.name), f"{prefix}{field.name}."
        section: Any = next((kind for kind in typing.get_args(hints[field.name]) if dataclasses.is_dataclass(kind)), None)
        if inner is None and section and any(word.replace("-", "_").startswith(path.replace("-", "_")) for word in arguments):
            changes[field.name] = section()
        elif dataclasses.is_dataclass(inner):
            new = _with_named_sections(inner, arguments, path)
            if new is not inner:
                changes[field.name] = new
    return dataclasses.replace(value, **changes) if changes else value


def unset(kind: type[T]) -> T:
    """An instance whose fields without a default are marked as required, for help and completion; its rules are not checked."""
    hints = typing.get_type_hints(kind)
    instance = object.__new__(kind)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        object.__setattr__(instance, field.name, _unset_value(field, hints[field.name]))
    return instance


def _unset_value(field: dataclasses.Field[Any], hint: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    if dataclasses.is_dataclass(hint):
        return unset(typing.cast(Any, hint))
    items: tuple[Any, ...] = typing.get_args(hint) if typing.get_origin(hint) is tuple else ()
    return (unset(typing.cast(Any, items[0])),) if items and dataclasses.is_dataclass(items[0]) else tyro.MISSING


def completion(kinds: Mapping[str, type], *, descriptions: Mapping[str, str], shell: str) -> str:
    """A script that completes the commands and all their options in `shell`."""
    commands: Any = None
    for name, kind in kinds.items():
        command = Annotated[
            kind,  # type: ignore[valid-type]
            tyro.conf.subcommand(name, default=unset(kind), description=descriptions[name]),
            tyro.conf.AvoidSubcommands,
        ]
        commands = command if commands is None else commands | command
    script = io.StringIO()
    with contextlib.redirect_stdout(script), contextlib.suppress(SystemExit):
        tyro.cli(commands, args=["--tyro-print-completion", shell], prog="quintet")
    # Where nothing of ours fits, bash completes file names.
    return script.getvalue().replace("complete -F ", "complete -o default -F ")
