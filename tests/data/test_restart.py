"""Restart: wherever prepare is killed, starting it again ends in the same bytes, and no part that was done is done again."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from quintet.data import engine as engine_module
from quintet.data import origin
from quintet.data import part as part_module
from quintet.data.engine import Local
from quintet.data.part import Job
from quintet.data.prepare import Prepared, prepare
from quintet.data.shards import free_again
from quintet.data.tokenizer import Tokenizer
from quintet.errors import DataError
from quintet.spec.quality import Basic, Dedup, Quality
from quintet.spec.run import Data
from tests.data.corpus import some_texts, source, write_texts

SMALL = 4000


def recipe(tmp_path: Path, tokenizer: Tokenizer) -> Data:
    tokenizer.save(tmp_path / "t.json")
    sources = tuple(
        source(write_texts(tmp_path / name, [*some_texts(30, seed=i), *some_texts(5, seed=9)]), name=name) for i, name in enumerate("ab")
    )
    return Data(
        sources=sources,
        directory=str(tmp_path / "prepared"),
        tokenizer=str(tmp_path / "t.json"),
        quality=Quality(code=("basic",), basic=Basic(min_tokens=20, min_code_lines=0, max_mean_line=1e9)),
        dedup=Dedup(),
        held_out=0.1,
    )


def content(directory: str) -> dict[str, object]:
    """Every file but the lock, without times."""
    found: dict[str, object] = {}
    for path in sorted(Path(directory).rglob("*")):
        if path.is_file() and path.name != ".lock":
            raw = path.read_bytes()
            found[str(path.relative_to(directory))] = without_times(json.loads(raw)) if path.suffix == ".json" else raw
    return found


def without_times(tree: object) -> object:
    if isinstance(tree, dict):
        return {key: without_times(value) for key, value in tree.items() if key != "seconds"}
    return [without_times(item) for item in tree] if isinstance(tree, list) else tree


KILLED = """
    import os, signal, sys
    from pathlib import Path
    import msgspec
    from quintet.data import origin, part
    from quintet.data.engine import Local
    from quintet.data.prepare import prepare
    from quintet.spec.run import Data
    origin.PART_BYTES = {small}
    left = int(sys.argv[1])
    def counted(do):
        def event(*arguments, **options):
            global left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return do(*arguments, **options)
        return event
    os.fsync, Path.rename, Path.write_bytes = counted(os.fsync), counted(Path.rename), counted(Path.write_bytes)
    write = part._write
    def told(job, *arguments):
        write(job, *arguments)
        print(job.target.name, flush=True)
    part._write = told
    prepare(msgspec.json.decode({data!r}, type=Data), vocab_size=400, seed=0, engine=Local(workers=1))
    print("done", left, flush=True)
"""


def test_killed_anywhere_it_ends_in_the_same_bytes_and_does_nothing_twice(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import msgspec

    monkeypatch.setattr(origin, "PART_BYTES", SMALL)
    data = recipe(tmp_path, tokenizer)
    prepare(replace(data, directory=str(tmp_path / "whole")), vocab_size=400, seed=0)
    script = textwrap.dedent(KILLED.format(small=SMALL, data=msgspec.json.encode(data)))
    made: list[str] = []
    for kill_at in (2, 30, 45, 60, 21, 9, 10**6):
        run = subprocess.run([sys.executable, "-c", script, str(kill_at)], capture_output=True, text=True)
        assert run.returncode == (0 if kill_at == 10**6 else -signal.SIGKILL), run.stderr
        made += [line for line in run.stdout.splitlines() if not line.startswith("done")]
    assert content(data.directory) == content(str(tmp_path / "whole"))
    parts = {path.name for name in "ab" for path in (Path(data.directory) / f"{name}.parts").iterdir()}
    again = len(made) - len(parts)
    assert set(made) == parts and len(parts) > 6 and again <= 6, "only the part that a kill fell into is made again"


def test_processes_make_the_same_bytes_as_one(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origin, "PART_BYTES", SMALL)
    data = recipe(tmp_path, tokenizer)
    prepare(data, vocab_size=400, seed=0, engine=Local(workers=1))
    prepare(replace(data, directory=str(tmp_path / "other")), vocab_size=400, seed=0, engine=Local(workers=2))
    assert content(str(tmp_path / "other")) == content(data.directory)


def test_a_changed_rule_redoes_the_sources_that_it_judges_and_a_changed_share_no_part(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    make = part_module.make

    def counted(job: Job, *arguments: object) -> None:
        made.append(job.source.name)
        make(job, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(engine_module, "make", counted)
    data = recipe(tmp_path, tokenizer)
    quality = replace(data.quality or Quality(), prose=())
    stricter = replace(quality, basic=replace(quality.basic, min_tokens=30))
    prose = replace(data, sources=(data.sources[0], replace(data.sources[1], domain="prose")), quality=quality)

    def again(changed: Data) -> Prepared:
        made.clear()
        return prepare(changed, vocab_size=400, seed=0, on_other="replace")

    again(prose)
    assert sorted(made) == ["a", "b"]
    again(replace(prose, held_out=0.3, dedup=replace(Dedup(), prefer="longest")))
    assert made == []
    again(replace(prose, quality=stricter))
    assert made == ["a"]
    again(replace(prose, quality=stricter, dedup=Dedup(bands=7)))
    assert sorted(made) == ["a", "b"]


@pytest.mark.parametrize("place", ["in a part", "behind the parts"])
def test_a_full_disk_pauses_with_a_message_and_goes_on(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    data = recipe(tmp_path, tokenizer)
    fsync, calls, fails, told = os.fsync, [0], [0], list[str]()

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == fails[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    expected = prepare(replace(data, directory=str(tmp_path / "whole")), vocab_size=400, seed=0).fingerprint
    fails[0] = 3 if place == "in a part" else calls[0] - 6
    calls[0] = 0
    monkeypatch.setattr(engine_module, "free_again", lambda path, wanted: told.append(f"asked for {wanted}"))
    prepared = prepare(data, vocab_size=400, seed=0, on_message=told.append, engine=Local(workers=1, patient=True))
    assert prepared.fingerprint == expected
    assert "is full" in told[0] and "MB more are free" in told[0] and told[1].startswith("asked for")
    assert (".parts is full" in told[0]) == (place == "in a part")
    calls[0] = 0
    with pytest.raises(DataError, match="No space left"):
        prepare(replace(data, directory=str(tmp_path / "third")), vocab_size=400, seed=0, engine=Local(workers=1))


def test_waiting_for_space_ends_when_there_is_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, slept = iter([10, 10, 5000]), list[float]()

    class Usage:
        def __init__(self, free: int) -> None:
            self.free = free

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(next(seen)))
    free_again(tmp_path, 4000, sleep=slept.append)
    assert len(slept) == 2
