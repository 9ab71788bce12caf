"""What rank 0 makes of a run before training, such as where its data lies, every rank goes on with."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from quintet.cli.together import _of_rank_0, _values
from quintet.errors import DataError
from quintet.parallel.rendezvous import Ranks
from quintet.spec import parse
from quintet.spec.run import Run


def ranks(count: int) -> list[Ranks]:
    """Ranks that share a store, of which nothing else is looked at."""
    store = dist.HashStore()
    return [Ranks(mesh=SimpleNamespace(rank=rank), store=store) for rank in range(count)]  # type: ignore[arg-type]


def test_all_ranks_take_the_run_of_rank_0(root: Path) -> None:
    run = parse.read(root / "recipes" / "laptop.toml")
    moved = replace(run, data=replace(run.data, directory="prepared/laptop-12345678"))
    found: dict[int, Run] = {}

    def work(each: Ranks) -> None:
        found[each.mesh.rank] = _of_rank_0(lambda: moved if each.is_lead else pytest.fail("only rank 0 prepares"), each)

    threads = [threading.Thread(target=work, args=(each,)) for each in reversed(ranks(3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: moved, 1: moved, 2: moved}


def test_where_rank_0_fails_the_others_leave_with_its_exit_code() -> None:
    def fail() -> Any:
        raise DataError("no text")

    lead, other = ranks(2)
    with pytest.raises(DataError, match="no text"):
        _of_rank_0(fail, lead)
    with pytest.raises(SystemExit) as left:
        _of_rank_0(fail, other)
    assert left.value.code == 10


def test_every_value_of_the_recipe_is_compared_under_its_name_and_long_ones_by_digest(root: Path) -> None:
    run = parse.read(root / "recipes" / "laptop.toml")
    values = _values(run)
    assert values["layout.zero in the recipe"] == "0" and values["name in the recipe"] == "'laptop'"
    assert all(len(value) <= 24 for value in values.values())
    changed = _values(replace(run, phases=(replace(run.phases[0], learning_rate=("1e-5",)),)))
    assert [name for name in values if values[name] != changed[name]] == ["phases in the recipe"]
