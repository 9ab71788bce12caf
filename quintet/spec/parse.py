"""Recipes in TOML to a `Run` and back; an unknown key, a wrong type or a broken rule names its dotted path."""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal

import msgspec
import tomli_w

from quintet.errors import SpecError, UsageError, did_you_mean
from quintet.spec.run import Run


def read(path: Path) -> Run:
    """The run that a recipe file describes. Raises UsageError for a missing file or broken TOML, SpecError for its content."""
    try:
        text = path.read_bytes().decode("utf-8-sig")  # some editors begin a file with a byte order mark
    except FileNotFoundError:
        here = sorted(str(p) for p in (path.parent if path.parent.is_dir() else Path()).glob("*.toml"))
        raise UsageError(f"no recipe at {path}{did_you_mean(str(path), here)}; recipes there: {', '.join(here) or 'none'}") from None
    except IsADirectoryError:
        here = sorted(str(p) for p in path.glob("*.toml"))
        raise UsageError(f"cannot read the recipe {path}: it is a folder; recipes in it: {', '.join(here) or 'none'}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"cannot read the recipe {path}: {error}; save it as UTF-8") from None
    except OSError as error:
        raise UsageError(f"cannot read the recipe {path}: {error.strerror}") from None
    return loads(text, origin=str(path))


def loads(text: str, *, origin: str) -> Run:
    """The run that TOML text describes; `origin` names the text in errors."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{origin} is not valid TOML: {error}") from None
    except RecursionError:
        raise UsageError(f"{origin} is no recipe: its values are nested hundreds of levels deep") from None
    return build(tree, origin=origin)


def build(tree: dict[str, Any], *, origin: str) -> Run:
    """The run that a nested dictionary describes; strict: no unknown key, no silent conversion."""
    _refuse_unknown(tree, Run, path="", origin=origin)
    try:
        return msgspec.convert(tree, Run, strict=True)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$")
        place = where.rstrip("`").lstrip(".")
        raise SpecError(f"{origin}: {place or 'recipe'}: {message}{_right_form(tree, place, message)}") from None


def _right_form(tree: dict[str, Any], place: str, message: str) -> str:
    """What to write instead, where a list, a table, a string or a number is wanted; empty where nothing can be said."""
    value: Any = tree
    for key in re.findall(r"[^.\[\]]+", place):
        value = value[int(key) if isinstance(value, list) else key]
    if message.startswith("Invalid enum value"):
        choices = _choices(place)
        return f"{did_you_mean(str(value).lower(), choices)}; choose from {', '.join(choices)}"
    if message.startswith("Expected `array`") and isinstance(value, dict):
        name = re.sub(r"\[\d+\]", "", place)
        return f"; begin each one with [[{name}]] instead of [{name}]"
    if message.startswith("Expected `object`") and isinstance(value, list):
        return f"; write [{place}] once instead of [[{place}]]"
    if message.startswith("Expected `array") and not isinstance(value, list):
        return f"; write {place.rpartition('.')[2]} = [{_quoted(value)}]"
    if message.startswith("Object missing required field"):
        return f"; add {message.split('`')[1]} = ..." + (f" under [{place}]" if place else "")
    if message.startswith("Expected `str`") and isinstance(value, int | float):
        return f"; write it as {_quoted(f'{value} steps' if place.endswith('.length') else value)}"
    if message.startswith(("Expected `int", "Expected `float")) and (number := _number(value, whole=message.startswith("Expected `int"))):
        return f"; write it as {number}"
    return ""


def _number(value: Any, *, whole: bool) -> str:
    """A number that was written in another form, such as "8" or 8.0, as it should be; empty if it is none."""
    try:
        number = float(value) if isinstance(value, str | float) else math.nan
    except ValueError:
        return ""
    if not math.isfinite(number) or (whole and number != int(number)):
        return ""
    return str(int(number) if whole else number)


def _choices(place: str) -> list[str]:
    """The values that a field of the run may have, by its dotted path."""
    kind: Any = Run
    for key in re.sub(r"\[\d+\]", "", place).split("."):
        kind = typing.get_type_hints(next(option for option in _options(kind) if dataclasses.is_dataclass(option)))[key]
        if typing.get_origin(kind) is tuple:
            kind = typing.get_args(kind)[0]
    return [str(value) for option in _options(kind) if typing.get_origin(option) is Literal for value in typing.get_args(option)]


def _quoted(value: Any) -> str:
    return tomli_w.dumps({"x": str(value)}).partition("=")[2].strip()


def tree(run: Run) -> dict[str, Any]:
    """The run as nested dictionaries of plain values, without absent ones; `build` reads it back equal."""
    return _without_none(msgspec.to_builtins(run))


def dumps(run: Run) -> str:
    """The run as TOML; `loads` reads it back equal."""
    return tomli_w.dumps(tree(run))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_without_none(v) for v in value]
    return value


def _refuse_unknown(value: Any, kind: Any, *, path: str, origin: str) -> None:
    for option in _options(kind):
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            hints = typing.get_type_hints(option)
            for key, inner in value.items():
                here = f"{path}.{key}" if path else key
                if key not in hints:
                    raise SpecError(f"{origin}: unknown key {here!r}{did_you_mean(key, hints)}; known here: {', '.join(hints)}")
                _refuse_unknown(inner, hints[key], path=here, origin=origin)
        elif typing.get_origin(option) is tuple and isinstance(value, list):
            for i, inner in enumerate(value):
                _refuse_unknown(inner, typing.get_args(option)[0], path=f"{path}[{i}]", origin=origin)


def _options(kind: Any) -> tuple[Any, ...]:
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if union else (kind,)
