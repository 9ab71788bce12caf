"""Sources: what is read, in which order, and what every kind of bad input is counted as."""

from __future__ import annotations

import errno
import gzip
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from quintet.data import sources
from quintet.data.sources import REMEDIES, Reader, _lines, list_files
from quintet.errors import DataError
from tests.data.corpus import source


def reader_of(*paths: Path | str, text_key: str = "text", max_document_bytes: int = 1000, strict: bool = False) -> Reader:
    return Reader(list_files(source(*paths)).files, text_key=text_key, max_document_bytes=max_document_bytes, strict=strict)


def read(
    *paths: Path | str, text_key: str = "text", max_document_bytes: int = 1000, strict: bool = False
) -> tuple[list[str], dict[str, int]]:
    """Texts and skip counts."""
    reader = reader_of(*paths, text_key=text_key, max_document_bytes=max_document_bytes, strict=strict)
    return [document.text for document in reader], {str(reason): count for reason, count in reader.skips.counts.items()}


def jsonl(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def test_a_folder_is_every_text_file_in_it_in_name_order_without_hidden_and_binary_ones(tmp_path: Path) -> None:
    for name in ("b/z.py", "b/a.md", "a.txt", ".git/config.txt", "__pycache__/x.py", ".hidden.py", "Makefile", "pic.png", "c.so"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    listing = list_files(source(tmp_path))
    assert [os.path.relpath(file.path, tmp_path) for file in listing.files] == ["Makefile", "a.txt", "b/a.md", "b/z.py"]
    assert listing.num_not_text == 2


def test_a_file_named_twice_is_read_once_and_globs_reach_into_folders(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x/1.py").write_text("one")
    (tmp_path / "x/2.weird").write_text("two")
    assert read(tmp_path / "x/1.py", tmp_path / "**/*.py", tmp_path / "x/*") == (["one", "two"], {})


def test_links_devices_and_pipes_do_not_trap_the_walk(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text("good")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "broken.py").symlink_to(tmp_path / "nowhere")
    (tmp_path / "zero.py").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.py")
    assert read(tmp_path) == (["good"], {})


@pytest.mark.parametrize("name, what", [("missing", "does not exist"), ("empty", "holds no text"), ("*.nothing", "matches nothing")])
def test_a_missing_or_empty_folder_is_an_error_with_a_remedy(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/only.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=f"(?s){what}.*(correct|put)"):
        list_files(source(tmp_path / name))


def test_an_unknown_special_path_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'python:stdlib'"):
        list_files(source("python:stdlb"))


BAD_FILES = {
    "empty": (b" \n\t\n", "empty"),
    "nul": (b"abc\0def", "nul_bytes"),
    "latin": ("caf\u00e9".encode("latin-1"), "invalid_utf8"),
    "long": (b"x" * 1001, "over_long"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_text_file_is_counted_or_named_under_strict(tmp_path: Path, name: str) -> None:
    content, reason = BAD_FILES[name]
    (tmp_path / "bad.py").write_bytes(content)
    (tmp_path / "good.py").write_bytes(b"\xef\xbb\xbfgood")
    assert read(tmp_path) == (["good"], {reason: 1})
    with pytest.raises(DataError, match=rf"bad\.py.*{reason}.*data\.strict"):
        read(tmp_path, strict=True)


BAD_LINES = {
    b'{"text": "broken': "corrupt_json",
    b"[1, 2]": "corrupt_json",
    b'{"text": "\xff\xfe"}': "invalid_utf8",
    b'{"txt": "misspelt"}': "missing_text",
    b'{"text": null}': "missing_text",
    b'{"text": 7}': "not_a_string",
    b'{"text": "a\\u0000b"}': "nul_bytes",
    b'{"text": "  "}': "empty",
    b'{"text": "' + b"y" * 1001 + b'"}': "over_long",
    b'{"text": "' + b"y" * 2_000_000 + b'"}': "over_long",
    b'{"text": "\\ud800"}': "corrupt_json",
    b"[" * 5000: "corrupt_json",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: f"{BAD_LINES[line]}-{len(line)}")
def test_a_bad_jsonl_line_is_counted_and_the_others_kept_or_named_under_strict(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "x.jsonl").write_bytes(jsonl("one") + line + b"\n\n" + jsonl("two"))
    assert read(tmp_path) == (["one", "two"], {BAD_LINES[line]: 1})
    with pytest.raises(DataError, match=rf"x\.jsonl:2: {BAD_LINES[line]}"):
        read(tmp_path, strict=True)


def test_all_bad_lines_together_are_counted_exactly(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(BAD_LINES) + b"\n" + jsonl("last").rstrip())
    expected = {reason: list(BAD_LINES.values()).count(reason) for reason in BAD_LINES.values()}
    assert read(tmp_path / "x.jsonl") == (["last"], expected)


def test_a_misspelt_text_key_says_did_you_mean(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"content": "hello"}\n')
    reader = Reader(list_files(source(tmp_path)).files, text_key="contents", max_document_bytes=99, strict=True)
    with pytest.raises(DataError, match=r"missing_text.*did you mean 'content'"):
        list(reader)


def compress(kind: str, content: bytes) -> bytes:
    return gzip.compress(content) if kind == "gz" else zstandard.compress(content)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compressed_jsonl_of_several_members_is_read_whole(tmp_path: Path, kind: str) -> None:
    (tmp_path / f"x.jsonl.{kind}").write_bytes(compress(kind, jsonl("a", "b")[:-7]) + compress(kind, jsonl("a", "b")[-7:]))
    assert read(tmp_path) == (["a", "b"], {})


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("cut", ["none", "nothing", "middle", "tail"])
def test_a_truncated_archive_keeps_what_was_readable_and_counts_once(tmp_path: Path, kind: str, cut: str) -> None:
    texts = [f"{i} {os.urandom(200).hex()}" for i in range(2000)]
    whole = compress(kind, jsonl(*texts))
    size = {"none": len(whole), "nothing": 0, "middle": len(whole) // 2, "tail": len(whole) - 4}[cut]
    (tmp_path / f"x.jsonl.{kind}").write_bytes(whole[:size])
    kept, skipped = read(tmp_path)
    assert kept == texts[: len(kept)]
    assert skipped == ({} if cut == "none" else {"truncated": 1})
    assert {"none": len(kept) == 2000, "nothing": not kept, "middle": 700 < len(kept) < 1300, "tail": len(kept) > 1300}[cut]
    if skipped:
        with pytest.raises(DataError, match=rf"x\.jsonl\.{kind}: truncated"):
            read(tmp_path, strict=True)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_damaged_archive_keeps_what_was_readable_and_counts_once(tmp_path: Path, kind: str) -> None:
    (tmp_path / f"x.jsonl.{kind}").write_bytes(compress(kind, jsonl("first")) + b"this is no member")
    (tmp_path / f"y.jsonl.{kind}").write_bytes(b"not an archive")
    assert read(tmp_path) == (["first"], {"corrupt_file": 2})


def write_parquet(path: Path, column: pa.Array, name: str = "text") -> None:
    pq.write_table(pa.table({name: column}), path, row_group_size=10)


def test_parquet_rows_are_read_and_bad_ones_counted(tmp_path: Path) -> None:
    rows = [b"good", None, b"", b"\xff", b"nul\0", b"z" * 1001, "caf\u00e9".encode()]
    write_parquet(tmp_path / "x.parquet", pa.array(rows, pa.binary()))
    expected = {"missing_text": 1, "empty": 1, "invalid_utf8": 1, "nul_bytes": 1, "over_long": 1}
    assert read(tmp_path) == (["good", "caf\u00e9"], expected)
    with pytest.raises(DataError, match=r"x\.parquet:row 1: missing_text"):
        read(tmp_path, strict=True)


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_every_string_type_of_parquet_is_read(tmp_path: Path, type_: pa.DataType) -> None:
    texts = [f"text {i}" for i in range(100)]
    write_parquet(tmp_path / "x.parquet", pa.array(texts, pa.string()).cast(type_))
    assert read(tmp_path) == (texts, {})


def test_a_parquet_column_that_is_missing_or_no_string_counts_every_row(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", pa.array([1, 2, 3]))
    write_parquet(tmp_path / "y.parquet", pa.array(["a", "b"]), name="texts")
    assert read(tmp_path) == ([], {"not_a_string": 3, "missing_text": 2})
    with pytest.raises(DataError, match=r"y\.parquet: missing_text.*did you mean 'texts'"):
        read(tmp_path / "y.parquet", strict=True)


def test_a_truncated_parquet_counts_once_and_a_damaged_page_keeps_the_rows_before_it(tmp_path: Path) -> None:
    texts = [f"{i} {os.urandom(50).hex()}" for i in range(300)]
    write_parquet(tmp_path / "x.parquet", pa.array(texts))
    whole = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(whole[: len(whole) // 2])
    assert read(tmp_path) == ([], {"corrupt_file": 1})
    damaged = bytearray(whole)
    damaged[len(whole) // 2 : len(whole) // 2 + 2000] = b"\xff" * 2000
    (tmp_path / "x.parquet").write_bytes(damaged)
    kept, skipped = read(tmp_path)
    assert skipped == {"corrupt_file": 1} and 0 < len(kept) < 300 and kept == texts[: len(kept)]


def test_a_200_mb_line_passes_quickly_and_in_bounded_memory(tmp_path: Path) -> None:
    with open(tmp_path / "x.jsonl", "wb") as file:
        file.write(jsonl("before") + b'{"text": "')
        file.seek(200_000_000, os.SEEK_CUR)  # A hole: 200 MB of NUL that take no disk.
        file.write(b'"}\n' + jsonl("after"))
    with open(tmp_path / "y.txt", "wb") as file:
        file.truncate(200_000_000)
    script = (
        "import sys, resource\nfrom quintet.data.sources import Reader, list_files\nfrom quintet.spec.run import Source\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "files = list_files(Source(name='s', paths=(sys.argv[1],), domain='code', weight=1.0)).files\n"
        "reader = Reader(files, text_key='text', max_document_bytes=1_000_000, strict=False)\n"
        "print([d.text for d in reader], dict(reader.skips.counts), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60)
    shown, kilobytes = result.stdout.rsplit(" ", 1)
    assert shown == "['before', 'after'] {'over_long': 2}"
    assert int(kilobytes) < 60_000
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime < 60


@given(content=st.binary(max_size=60).map(lambda b: b.replace(b"\r", b"\n")), size=st.integers(1, 9), limit=st.integers(0, 20))
def test_lines_do_not_depend_on_how_the_bytes_arrive(content: bytes, size: int, limit: int) -> None:
    chunks = [content[i : i + size] for i in range(0, len(content), size)]
    lines = content.split(b"\n")
    expected = [line if len(line) <= limit else None for line in (lines if lines[-1] else lines[:-1])]
    assert list(_lines(chunks, limit)) == expected


def test_every_reason_has_a_remedy_and_examples_are_kept(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"{i}.py").write_bytes(b"\0")
    reader = Reader(list_files(source(tmp_path)).files, text_key="text", max_document_bytes=9, strict=False)
    assert list(reader) == [] and reader.bytes_read == 5
    assert len(reader.skips.examples["nul_bytes"]) == 3
    assert all(REMEDIES.values())


def test_a_file_that_vanishes_is_counted_as_unreadable(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("a")
    (tmp_path / "b.py").write_text("b")
    files = list_files(source(tmp_path)).files
    (tmp_path / "a.py").unlink()
    reader = Reader(files, text_key="text", max_document_bytes=9, strict=False)
    assert [document.text for document in reader] == ["b"] and dict(reader.skips.counts) == {"unreadable": 1}


def test_the_standard_library_is_there_as_code_without_installed_packages() -> None:
    files = list_files(source("python:stdlib")).files
    names = [file.path for file in files]
    assert sum(file.num_bytes for file in files) > 5_000_000
    assert any(name.endswith("/argparse.py") for name in names) and all(name.endswith(".py") for name in names)
    assert not any(part in name for name in names for part in ("site-packages", "dist-packages", "__pycache__", "/encodings/"))


def test_documentation_is_topics_and_docstrings_without_code_and_shares_the_fate_of_its_module() -> None:
    files = list_files(source("python:docs")).files
    topics = [file for file in files if file.kind == "topics"]
    textwrap = [file for file in files if file.path.endswith("/textwrap.py")]
    reader = Reader([*topics, *textwrap], text_key="text", max_document_bytes=1_000_000, strict=True)
    documents = list(reader)
    assert len(documents) > 50
    assert "Object for wrapping/filling text" in documents[-1].text
    assert "import re" not in documents[-1].text and ">>>" not in documents[-1].text
    code = next(iter(Reader(list_files(source(textwrap[0].path)).files, text_key="text", max_document_bytes=1_000_000, strict=True)))
    assert documents[-1].identity == code.identity


def warc(*records: tuple[str, str, bytes]) -> bytes:
    """A WARC file of (record type, content type, content)."""
    found = b""
    for kind, content_type, content in records:
        head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: http://x/\r\n"
        head += f"Content-Type: {content_type}\r\nContent-Length: {len(content)}\r\n\r\n"
        found += head.encode() + content + b"\r\n\r\n"
    return found


PAGE = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n<p>not text"
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nplain response"
RECORDS = (
    ("warcinfo", "application/warc-fields", b"software: x"),
    ("conversion", "text/plain", "Grüße\nzwei".encode()),
    ("response", "application/http; msgtype=response", PAGE),
    ("response", "application/http; msgtype=response", PLAIN),
    ("conversion", "text/plain", b"x" * 2000),
    ("conversion", "text/plain", b"last"),
)


@pytest.mark.parametrize("name", ["crawl.warc", "crawl.warc.wet.gz"])
def test_plain_text_of_warc_files_is_read_and_pages_are_counted(tmp_path: Path, name: str) -> None:
    members = [warc(record) for record in RECORDS]
    (tmp_path / name).write_bytes(b"".join(map(gzip.compress, members)) if name.endswith("gz") else b"".join(members))
    reader = reader_of(tmp_path)
    documents = list(reader)
    assert [d.text for d in documents] == ["Grüße\nzwei", "plain response", "last"]
    assert documents[-1].origin == f"{tmp_path / name}:record 6"
    assert reader.skips.counts == {"not_plain_text": 1, "over_long": 1}
    assert reader.skips.examples["not_plain_text"] == [f"{tmp_path / name} (records of pages: 1 of text/html)"]


@pytest.mark.parametrize("broken, reason", [
    (lambda raw: raw[:-10], "truncated"),
    (lambda raw: raw.replace(b"Content-Length: 2000", b"Content-Length: 1000"), "corrupt_file"),
    (lambda raw: b"no archive at all", "corrupt_file"),
    (lambda raw: b"WARC/1.0\r\nWARC-Type: warcinfo\r\nContent-Length: 99\r\n\r\nabc", "truncated"),
])  # fmt: skip
def test_a_damaged_warc_file_counts_once_and_keeps_what_was_before(tmp_path: Path, broken: Callable[[bytes], bytes], reason: str) -> None:
    (tmp_path / "x.warc").write_bytes(broken(warc(*RECORDS)))
    reader = reader_of(tmp_path)
    assert len(list(reader)) <= 4 and dict(reader.skips.counts)[reason] == 1


def test_links_that_lead_in_circles_do_not_trap_a_glob_and_hidden_files_stay_hidden(tmp_path: Path) -> None:
    (tmp_path / "a" / ".hidden").mkdir(parents=True)
    for name in ("a/x.md", "a/.hidden/y.md"):
        (tmp_path / name).write_text("text")
    (tmp_path / "a" / "up").symlink_to("..")
    (tmp_path / "a" / "here").symlink_to(".")
    for pattern in ("**/*.md", "**", "a/*"):
        assert [file.path for file in list_files(source(tmp_path / pattern)).files] == [str(tmp_path / "a" / "x.md")]
    assert len(list_files(source(tmp_path / "a/.hidden/*")).files) == 1


def test_a_folder_that_may_not_be_read_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "x.md").write_text("text")
    scan = os.scandir

    def scandir(path: str) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    reader = reader_of(tmp_path)
    assert len(list(reader)) == 1 and reader.skips.counts == {"unreadable": 1}
    assert "closed" in reader.skips.examples["unreadable"][0]


def test_a_parquet_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_BOMB_BYTES", 1 << 20)
    table = pa.table({"text": ["x" * 100_000 + str(i) for i in range(40)]})
    pq.write_table(table, tmp_path / "x.parquet", compression="zstd", use_dictionary=False)
    reader = reader_of(tmp_path)
    assert list(reader) == [] and reader.skips.counts == {"bomb": 1}
