"""The house as a test: the floors of docs/architecture.md, written once, and the proof that imports only go down."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

# Floor -> rooms, lowest first; a room is a folder or a file of quintet/, and one marked ° imports no torch.
FLOORS = {
    1: "ops errors°",
    2: "schedule° spec°",
    3: "model data checkpoint cost°",
    4: "parallel plan° monitor°",
    5: "train launch°",
    6: "posttrain evaluate",
    7: "cli",
}
FLOOR_OF = {room.rstrip("°"): floor for floor, rooms in FLOORS.items() for room in rooms.split()}
WITHOUT_TORCH = {room.rstrip("°") for rooms in FLOORS.values() for room in rooms.split() if room.endswith("°")}
HEAVY = {"torch", "torchgen", "functorch", "torchvision", "transformers", "safetensors.torch"}

PACKAGE = Path(__file__).parent.parent / "quintet"


def module_name(path: Path, package: Path) -> str:
    parts = [package.name, *path.relative_to(package).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, name: str, *, is_package: bool) -> Iterator[str]:
    """Dotted names that a module imports anywhere in its text: at the top, in functions, under TYPE_CHECKING, by importlib.

    `from a import b` yields both a and a.b, because b may be a module.
    """
    here = name.split(".") if is_package else name.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield origin
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                target = str(node.args[0].value)
                yield f"{'.'.join(here)}.{target.lstrip('.')}" if target.startswith(".") else target


def graph(package: Path) -> dict[str, set[str]]:
    """Every module of the package -> what it imports, in modules of the package and in whole outside names."""
    paths = {module_name(path, package): path for path in sorted(package.rglob("*.py"))}
    edges: dict[str, set[str]] = {}
    for name, path in paths.items():
        found = set(imports(path.read_text(), name, is_package=path.name == "__init__.py"))
        inside = {target for target in found if target in paths}
        # Importing a.b.c also runs the packages a and a.b; only what is named counts, so that an __init__ may name its own modules.
        edges[name] = (inside | {target for target in found if target.split(".")[0] != package.name}) - {name}
    return edges


def room_of(module: str) -> str | None:
    """The folder or file of the package that a module lies in; None for the package itself, its `-m` entry and outside names."""
    parts = module.split(".")
    return parts[1] if parts[0] == "quintet" and len(parts) > 1 and parts[1] != "__main__" else None


def wrong_way(edges: dict[str, set[str]]) -> list[str]:
    """Imports between two rooms that do not go down."""
    found = []
    for module, targets in edges.items():
        for target in sorted(targets):
            here, there = room_of(module), room_of(target)
            if here and there and here != there and FLOOR_OF[there] >= FLOOR_OF[here]:
                found.append(f"{module} (floor {FLOOR_OF[here]}) imports {target} (floor {FLOOR_OF[there]})")
    return found


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The modules of one circle of imports, or nothing."""
    inside = {module: {target for target in targets if target in edges} for module, targets in edges.items()}
    try:
        TopologicalSorter(inside).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def heavy(edges: dict[str, set[str]]) -> list[str]:
    """Imports of torch in rooms that must do without."""
    return [
        f"{module} imports {target}"
        for module, targets in edges.items()
        for target in sorted(targets)
        if room_of(module) in WITHOUT_TORCH and (target in HEAVY or target.split(".")[0] in HEAVY)
    ]


EDGES = graph(PACKAGE)


def test_every_room_stands_on_a_floor() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path.is_dir() and any(path.rglob("*.py")))}
    assert rooms - {"__init__", "__main__"} <= set(FLOOR_OF)


def test_every_folder_of_python_is_a_package() -> None:
    assert [path for path in PACKAGE.rglob("*.py") if not (path.parent / "__init__.py").is_file()] == []


def test_imports_only_go_down_and_never_to_a_neighbour() -> None:
    assert wrong_way(EDGES) == []


def test_the_package_itself_imports_no_room() -> None:
    assert {target for target in EDGES["quintet"] if room_of(target)} == set()


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(EDGES) == []


def test_rooms_without_torch_do_not_name_it() -> None:
    assert heavy(EDGES) == []


def test_rooms_without_torch_do_not_load_it() -> None:
    modules = [module for module in EDGES if room_of(module) in WITHOUT_TORCH]
    program = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, f'{name} loads torch'\n"
        "    assert 'transformers' not in sys.modules, f'{name} loads transformers'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr


def test_nothing_is_called_utils() -> None:
    words = {"util", "utils", "utilities", "helper", "helpers", "misc", "common"}
    assert [path for path in PACKAGE.rglob("*") if path.stem.lower() in words] == []


def test_an_init_names_the_public_face_and_nothing_else() -> None:
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Expr)
    for path in PACKAGE.rglob("__init__.py"):
        strange = [node for node in ast.parse(path.read_text()).body if not isinstance(node, allowed)]
        assert strange == [], path


# What the proof itself sees, on little packages.


@pytest.mark.parametrize(
    "text",
    [
        "import quintet.train.trainer",
        "from quintet.train import trainer",
        "from quintet.train.trainer import Trainer",
        "from ..train import trainer",
        "def later():\n    import quintet.train.trainer",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from quintet.train import trainer",
        "import importlib\nimportlib.import_module('quintet.train.trainer')",
        "try:\n    from quintet.train import trainer\nexcept ImportError:\n    pass",
    ],
)
def test_an_import_upwards_is_found_wherever_it_stands(text: str, tmp_path: Path) -> None:
    edges = graph(little_house(tmp_path, {"model/layers.py": text, "train/trainer.py": ""}))
    assert "quintet.model.layers (floor 3) imports quintet.train.trainer (floor 5)" in wrong_way(edges)


def test_a_neighbour_and_a_circle_are_found(tmp_path: Path) -> None:
    house = {"model/a.py": "from quintet.data import b", "data/b.py": "", "ops/x.py": "from . import y", "ops/y.py": "import quintet.ops.x"}
    edges = graph(little_house(tmp_path, house))
    assert wrong_way(edges) == [
        "quintet.model.a (floor 3) imports quintet.data (floor 3)",
        "quintet.model.a (floor 3) imports quintet.data.b (floor 3)",
    ]
    assert set(circle(edges)) == {"quintet.ops.x", "quintet.ops.y"}


def test_torch_in_a_light_room_is_found(tmp_path: Path) -> None:
    edges = graph(little_house(tmp_path, {"cost/memory.py": "def f():\n    from torch import nn", "model/a.py": "import torch"}))
    assert heavy(edges) == ["quintet.cost.memory imports torch", "quintet.cost.memory imports torch.nn"]


def little_house(folder: Path, files: dict[str, str]) -> Path:
    package = folder / "quintet"
    for name, text in ({"__init__.py": ""} | files).items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text)
    return package
