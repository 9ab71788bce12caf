"""Read the documents of a source one at a time, with bounded memory, and count everything that is skipped with its reason.

A source names files, folders, globs, or the running interpreter's own library. Folders are walked in a fixed order without
following links, leaving out hidden names and `__pycache__`; what is neither text by its name nor a known container is counted
as `not_text`. Containers are .jsonl, .jsonl.gz, .jsonl.zst, .parquet and .warc, .warc.gz, .warc.wet, .warc.wet.gz; every other file is
one document.
"""

from __future__ import annotations

import ast
import glob
import inspect
import io
import itertools
import os
import re
import stat
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Protocol, get_args

import fsspec
import msgspec
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from blake3 import blake3

from quintet.errors import DataError, did_you_mean, install_line, remedy_to_reach
from quintet.spec.run import Source

Reason = Literal[
    "empty", "over_long", "nul_bytes", "invalid_utf8", "corrupt_json", "missing_text", "not_a_string", "truncated", "corrupt_file",
    "unreadable", "bomb", "not_python", "not_plain_text", "not_text",
]  # fmt: skip
Kind = Literal["text", "jsonl", "parquet", "warc", "docstrings", "topics"]

REMEDIES: Mapping[str, str] = {
    "empty": "there is no text in it; remove it",
    "over_long": "raise data.max_document_bytes or split the document",
    "nul_bytes": "it holds NUL bytes, so it is probably not text; remove it or clean it",
    "invalid_utf8": "it is not UTF-8; convert it, for example with iconv -t utf-8",
    "corrupt_json": "the line is not a JSON object; repair or remove the line",
    "missing_text": "there is no text under the source's text_key; correct text_key or the record",
    "not_a_string": "the value under the source's text_key is not a string; correct text_key or the record",
    "truncated": "the compressed file ends early; fetch or compress it again",
    "corrupt_file": "the file cannot be decoded to its end; fetch or write it again",
    "unreadable": "the file cannot be opened; check that it exists and may be read",
    "bomb": "it expands to more than 250 times its size, which text does not; write the file again",
    "not_python": "the file does not parse as Python",
    "not_plain_text": "the archive holds pages and not their text; take the text out of them first, or use the crawl's WET files",
    "not_text": "the name is not that of a text file; name the file itself to read it all the same",
}
"""What each reason means and what can be done about it."""

TEXT_SUFFIXES = frozenset(
    ".adoc .asm .bash .bat .bib .c .cc .cfg .cjs .clj .cmake .conf .cpp .cs .css .cu .cuh .cxx .d .dart .el .erl .ex .exs .f .f90 .fs .go "
    ".gradle .graphql .groovy .h .hh .hpp .hs .htm .html .hxx .ini .java .jl .js .json .jsx .kt .kts .less .lisp .lua .m .make .md .mdx "
    ".mjs .mk .ml .mli .mm .nim .nix .org .pas .php .pl .pm .proto .ps1 .py .pyi .pyx .r .rb .rkt .rs .rst .s .sass .scala .scm .scss .sh "
    ".sol .sql .sv .svelte .swift .tcl .tex .text .toml .ts .tsx .txt .v .vhd .vim .vue .xml .yaml .yml .zig .zsh".split()
)
TEXT_NAMES = frozenset("AUTHORS CHANGELOG CONTRIBUTING COPYING Dockerfile INSTALL LICENSE Makefile NEWS NOTICE README TODO".split())
_CONTAINERS: dict[str, Kind] = {".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".jsonl.zst": "jsonl", ".parquet": "parquet"}
_CONTAINERS |= {".warc": "warc", ".warc.gz": "warc", ".warc.wet": "warc", ".warc.wet.gz": "warc"}
_PAGES = frozenset(["conversion", "resource", "response"])
"""Types of WARC records that hold a page or its text; the others tell about those."""

# Generated tables, and files that are there to be wrong: in no text is anything learnt from them.
_STDLIB_WITHOUT = frozenset("site-packages dist-packages __pycache__ encodings pydoc_data encoded_modules tokenizedata".split())
_STDLIB_BAD_FILES = frozenset(["test_source_encoding.py"])
_DOCS_WITHOUT = _STDLIB_WITHOUT | frozenset("test tests idle_test".split())
_SPECIAL = ("python:stdlib", "python:docs")

_CHUNK = 1 << 20
_BOMB_BYTES, _BOMB_RATIO = 1 << 28, 250
_PARQUET_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class File:
    """One file of a source, as it was when it was listed."""

    path: str
    """Path as the source spells it."""
    kind: Kind
    """How documents are read from it."""
    num_bytes: int
    """Size in bytes."""
    mtime_ns: int
    """Time of last change, in nanoseconds; 0 for a file that no local disk holds."""

    @property
    def is_remote(self) -> bool:
        """Whether the path is a URL."""
        return "://" in self.path

    def open(self) -> IO[bytes]:
        """Open for reading. Raises OSError."""
        return fsspec.open(self.path, "rb").open() if self.is_remote else open(self.path, "rb")


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The files of a source in reading order."""

    files: tuple[File, ...]
    """Files that are read."""
    num_not_text: int
    """Files in its folders that are left out by name."""

    @property
    def num_bytes(self) -> int:
        """Size of all files together."""
        return sum(file.num_bytes for file in self.files)


class Document(msgspec.Struct, frozen=True, gc=False):
    """One piece of text; a Struct, because there are very many."""

    text: str
    """Not empty, and without NUL."""
    raw: bytes
    """Its UTF-8."""
    origin: str
    """`file`, `file:line` or `file:row n`, for messages."""
    identity: bytes
    """16 bytes that decide between training and held-out: the hash of the text. A module's docstrings carry the hash of the whole
    file, so that they are held out together with its code."""


@dataclass(kw_only=True)
class Skips:
    """What was left out, by reason."""

    strict: bool
    """Raise DataError instead of counting."""
    counts: Counter[Reason] = field(default_factory=Counter)
    """Documents left out; a file that breaks off counts once."""
    examples: dict[Reason, list[str]] = field(default_factory=dict)
    """The first three origins of each reason."""
    quarantine: list[tuple[str, Reason, str]] = field(default_factory=list)
    """Origin, reason and detail of all that was left out, but for files left out by name."""

    def add(self, reason: Reason, origin: str, detail: str = "", *, count: int = 1) -> None:
        """Count `count` documents, or raise DataError if `strict`; files left out by name never raise."""
        if self.strict and reason != "not_text":
            raise DataError(
                f"{origin}: {reason}{f' ({detail})' if detail else ''}: {REMEDIES[reason]}; or leave data.strict off to skip and count "
                "such documents"
            )
        self.counts[reason] += count
        if reason != "not_text":
            self.quarantine.append((origin, reason, detail))
        examples = self.examples.setdefault(reason, [])
        if len(examples) < 3:
            examples.append(f"{origin} ({detail})" if detail else origin)


class _Broken(Exception):
    """A file cannot be read further."""

    def __init__(self, reason: Reason, detail: object) -> None:
        super().__init__(detail)
        self.reason = reason


def list_files(source: Source) -> Listing:
    """Every file of `source`, each once, in an order that depends on names alone.

    Raises DataError if a path does not exist, a glob matches nothing, or no readable file is found.
    """
    files: dict[str, File] = {}
    num_not_text = 0
    for path in source.paths:
        if path.startswith("python:"):
            found, ignored = _special_files(path, source), 0
        elif "://" in path:
            found, ignored = _remote_files(path, source)
        else:
            found, ignored = _path_files(os.path.expanduser(path), source)
        if not found:
            raise DataError(
                f"source {source.name!r}: {path!r} holds no text or data file{f' ({ignored} files of other kinds)' if ignored else ''}; "
                "put text, .jsonl, .jsonl.gz, .jsonl.zst or .parquet files there, or correct paths"
            )
        for file in found:
            files.setdefault(file.path, file)
        num_not_text += ignored
    return Listing(files=tuple(files.values()), num_not_text=num_not_text)


def _path_files(path: str, source: Source) -> tuple[list[File], int]:
    tops = [path] if os.path.lexists(path) else _glob(path)
    if not tops:
        word = "glob matches nothing" if glob.has_magic(path) else "file or folder does not exist"
        raise DataError(f"source {source.name!r}: {path!r}: {word} (working folder {os.getcwd()}); correct data.sources.paths")
    files: list[File] = []
    num_not_text = 0
    for top in tops:
        if os.path.isdir(top):
            closed: list[OSError] = []
            for name in _walk(top, without=frozenset(["__pycache__"]), on_error=closed.append):
                file = _regular(name) if _is_text_or_container(name) else None
                files += [file] if file else []
                num_not_text += file is None
            # Opening such a folder fails when its turn comes, which counts it as unreadable.
            files += [File(path=str(error.filename), kind="text", num_bytes=0, mtime_ns=0) for error in closed]
        elif file := _regular(top):
            files.append(file)
        elif len(tops) == 1:
            raise DataError(f"source {source.name!r}: {path!r} is not a regular file that can be read; correct data.sources.paths")
    return files, num_not_text


def _glob(pattern: str) -> list[str]:
    """What a glob matches, without hidden names and without going through links to folders, which may lead in circles."""
    parts = Path(pattern).parts
    plain = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    rest = [*parts[plain:], *(["*"] if parts[-1] == "**" else [])]
    top = Path(*parts[:plain])
    found = top.glob("/".join(rest)) if rest else ()
    show_hidden = any(part.startswith(".") for part in rest)

    def is_meant(path: Path) -> bool:
        is_hidden = any(part.startswith(".") for part in path.relative_to(top).parts)
        return (show_hidden or not is_hidden) and not (path.is_symlink() and path.is_dir())

    return sorted(str(path) for path in found if is_meant(path))


def _remote_files(path: str, source: Source) -> tuple[list[File], int]:
    """The files at a URL: one file, all below a folder, or a glob's."""
    try:
        system, inner = fsspec.core.url_to_fs(path)
        system.invalidate_cache()  # what this process saw there before may have changed
        infos = system.glob(inner, detail=True) if glob.has_magic(inner) else system.find(inner, detail=True)
    except ImportError as error:
        missing = f"source {source.name!r}: {path!r} needs a package that is missing ({error})"
        raise DataError(f"{missing}; {remedy_to_reach(path)}") from None
    except ValueError as error:
        raise DataError(f"source {source.name!r}: {path!r} cannot be reached: {error}; correct the URL") from None
    except Exception as error:  # every store has errors of its own
        raise DataError(f"source {source.name!r}: {path!r} cannot be listed: {error}; check the URL and the credentials") from None
    found = [info for name, info in sorted(infos.items()) if info["type"] == "file"]
    texts = [info for info in found if len(found) == 1 or _is_text_or_container(info["name"])]
    files = [_remote_file(system.unstrip_protocol(info["name"]), int(info["size"] or 0)) for info in texts]
    return files, len(found) - len(texts)


def _remote_file(url: str, num_bytes: int) -> File:
    return File(path=url, kind=_container(url) or "text", num_bytes=num_bytes, mtime_ns=0)


def remote_digest(file: File) -> str:
    """What the store of a remote file says that changes with its content."""
    system, inner = fsspec.core.url_to_fs(file.path)
    info = system.info(inner)
    told = next((info[key] for key in ("ETag", "etag", "md5Hash", "sha256", "blob_id", "oid", "created", "mtime") if info.get(key)), "")
    return f"{told}:{info['size']}"


def _walk(top: str, *, without: frozenset[str], on_error: Callable[[OSError], None] | None = None) -> Iterator[str]:
    for folder, folders, names in os.walk(top, onerror=on_error):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in without)
        yield from (os.path.join(folder, name) for name in sorted(names) if not name.startswith("."))


def _regular(path: str, kind: Kind | None = None) -> File | None:
    """The file if it is a regular one, also behind a link; devices, pipes and broken links are None."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return File(path=path, kind=kind or _container(path) or "text", num_bytes=status.st_size, mtime_ns=status.st_mtime_ns)


def _container(path: str) -> Kind | None:
    return next((found for suffix, found in _CONTAINERS.items() if path.endswith(suffix)), None)


def _is_text_or_container(path: str) -> bool:
    name = Path(path)
    return name.suffix.lower() in TEXT_SUFFIXES or name.stem in TEXT_NAMES or path.endswith(tuple(_CONTAINERS))


def _special_files(path: str, source: Source) -> list[File]:
    if path not in _SPECIAL:
        near = did_you_mean(path, _SPECIAL)
        raise DataError(f"source {source.name!r}: unknown path {path!r}{near}; special paths are {', '.join(_SPECIAL)}")
    top = sysconfig.get_path("stdlib")
    if not os.path.isdir(top):
        raise DataError(
            f"source {source.name!r}: the interpreter's library {top!r} is no folder; name a folder of text instead of {path!r}"
        )
    if path == "python:stdlib":
        names = [name for name in _walk(top, without=_STDLIB_WITHOUT) if os.path.basename(name) not in _STDLIB_BAD_FILES]
        found = [_regular(name) for name in names if name.endswith(".py")]
    else:
        names = [name for name in _walk(top, without=_DOCS_WITHOUT) if name.endswith(".py")]
        found = [_regular(os.path.join(top, "pydoc_data", "topics.py"), "topics"), *(_regular(name, "docstrings") for name in names)]
    return [file for file in found if file and file.num_bytes]  # An empty __init__.py is no defect.


class Reader:
    """Iterates the documents of `files`; `skips` and `bytes_read` (of the files, as stored) grow meanwhile.

    Memory stays within a few times `max_document_bytes` (a parquet row group also passes as a whole). With `strict`, what would
    be skipped raises DataError naming the place and the remedy.
    """

    def __init__(self, files: Iterable[File], *, text_key: str, max_document_bytes: int, strict: bool) -> None:
        self.files = files
        self.text_key = text_key
        self.max_document_bytes = max_document_bytes
        self.skips = Skips(strict=strict)
        self.bytes_read = 0

    def __iter__(self) -> Iterator[Document]:
        readers: dict[Kind, Callable[[File], Iterator[Document]]] = {
            "text": self._text,
            "jsonl": self._jsonl,
            "parquet": self._parquet,
            "warc": self._warc,
            "docstrings": self._docstrings,
            "topics": self._topics,
        }
        assert set(readers) == set(get_args(Kind))
        done = 0
        for file in self.files:
            try:
                yield from readers[file.kind](file)
            except _Broken as broken:
                self.skips.add(broken.reason, _shown(file.path), str(broken))
            except DataError:
                raise
            except OSError as error:
                self.skips.add("unreadable", _shown(file.path), error.strerror or str(error))
            except Exception as error:  # every store of remote files has errors of its own
                if not file.is_remote:
                    raise
                self.skips.add("unreadable", file.path, f"{type(error).__name__}: {error}")
            done += file.num_bytes
            self.bytes_read = done

    def _accept(self, origin: str, raw: bytes, text: str | None = None, *, identity: bytes | None = None) -> Document | None:
        """The document in `raw` (UTF-8; `text` if already decoded), or None, counted."""
        if len(raw) > self.max_document_bytes:
            self.skips.add("over_long", origin, f"{len(raw)} bytes, at most {self.max_document_bytes}")
        elif not raw or raw.isspace():
            self.skips.add("empty", origin)
        elif b"\0" in raw:
            self.skips.add("nul_bytes", origin, f"at byte {raw.index(0)}")
        else:
            try:
                text = raw.decode() if text is None else text
            except UnicodeDecodeError as error:
                self.skips.add("invalid_utf8", origin, f"at byte {error.start}")
            else:
                return Document(text, raw, origin, identity or blake3(raw).digest(16))
        return None

    def _whole(self, file: File) -> bytes | None:
        """The file's bytes without byte-order mark; None, counted, if there are too many."""
        with file.open() as stream:
            raw = stream.read(self.max_document_bytes + 4)
        self.bytes_read += file.num_bytes
        raw = raw.removeprefix(b"\xef\xbb\xbf")
        if len(raw) > self.max_document_bytes:
            self.skips.add("over_long", _shown(file.path), f"{file.num_bytes} bytes, at most {self.max_document_bytes}")
            return None
        return raw

    def _text(self, file: File) -> Iterator[Document]:
        raw = self._whole(file)
        if raw is not None and (document := self._accept(_shown(file.path), raw)):
            yield document

    def _jsonl(self, file: File) -> Iterator[Document]:
        # In JSON a byte of text takes at most six ("\u0000"); two more such lengths are left for other fields.
        limit = 8 * self.max_document_bytes + _CHUNK
        shown = _shown(file.path)
        for number, line in enumerate(_lines(self._chunks(file), limit), start=1):
            origin = f"{shown}:{number}"
            if line is None:
                self.skips.add("over_long", origin, f"a line of more than {limit} bytes")
                continue
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line and not line.isspace() and (document := self._record(origin, line)):
                yield document

    def _record(self, origin: str, line: bytes) -> Document | None:
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            try:
                line.decode()
                self.skips.add("corrupt_json", origin, str(error))
            except UnicodeDecodeError as utf8:
                self.skips.add("invalid_utf8", origin, f"at byte {utf8.start} of the line")
            return None
        if not isinstance(record, dict):
            self.skips.add("corrupt_json", origin, f"a {type(record).__name__}, not an object")
        elif record.get(self.text_key) is None:
            found = "null" if self.text_key in record else f"no {self.text_key!r}{did_you_mean(self.text_key, record)}"
            self.skips.add("missing_text", origin, found)
        elif not isinstance(text := record[self.text_key], str):
            self.skips.add("not_a_string", origin, f"{self.text_key!r} is of type {type(text).__name__}")
        else:
            return self._accept(origin, text.encode(), text)
        return None

    def _chunks(self, file: File) -> Iterator[bytes]:
        """The file's content, decompressed by its suffix; raises _Broken where it cannot be read further."""
        start = self.bytes_read
        with file.open() as stream:
            if file.path.endswith(".gz"):
                chunks = _decompress(stream, lambda: zlib.decompressobj(wbits=31), 1 << 14)
            elif file.path.endswith(".zst"):
                chunks = _decompress(stream, zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj, 1 << 12)
            else:
                chunks = iter(lambda: stream.read(_CHUNK), b"")
            for chunk in chunks:
                self.bytes_read = start + stream.tell()
                yield chunk

    def _parquet(self, file: File) -> Iterator[Document]:
        start, row, origin = self.bytes_read, 0, _shown(file.path)
        try:
            with file.open() as stream, pq.ParquetFile(stream, pre_buffer=False) as table:
                num_rows = table.metadata.num_rows
                _refuse_bomb(file.num_bytes, _expanded_bytes(table.metadata))
                if self.text_key not in table.schema_arrow.names:
                    near = did_you_mean(self.text_key, table.schema_arrow.names)
                    self.skips.add("missing_text", origin, f"no column {self.text_key!r}{near}", count=num_rows)
                    return
                for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[self.text_key]):
                    column = batch.column(0)
                    if pa.types.is_dictionary(column.type):
                        column = column.dictionary_decode()
                    if not _is_stringlike(column.type):
                        self.skips.add("not_a_string", origin, f"column {self.text_key!r} is of type {column.type}", count=num_rows)
                        return
                    for value in column.cast(pa.large_binary()):
                        if document := self._cell(f"{origin}:row {row}", value):
                            yield document
                        row += 1
                    self.bytes_read = start + file.num_bytes * row // num_rows
        except (pa.ArrowException, OSError) as error:
            raise _Broken("corrupt_file", f"after {row} rows: {str(error).splitlines()[0]}") from None

    def _warc(self, file: File) -> Iterator[Document]:
        """The records whose content is plain text; others that hold pages are counted."""
        shown, others = _shown(file.path), Counter[str]()
        try:
            for number, record in enumerate(_warc_records(self._chunks(file)), start=1):
                if record.rec_type not in _PAGES:
                    continue
                headers = record.http_headers or record.rec_headers
                content_type = (headers.get_header("Content-Type") or "").partition(";")[0].strip().lower()
                if content_type != "text/plain":
                    others[content_type or "no type"] += 1
                    continue
                raw, ended = _read(record.content_stream(), self.max_document_bytes + 1)
                if ended and record.raw_stream.limit > 0:
                    continue  # to find that nothing comes behind it
                if document := self._accept(f"{shown}:record {number}", raw):
                    yield document
        finally:
            if others:
                kinds = ", ".join(f"{count} of {kind}" for kind, count in others.most_common(3))
                self.skips.add("not_plain_text", shown, f"records of pages: {kinds}", count=others.total())

    def _cell(self, origin: str, value: pa.LargeBinaryScalar) -> Document | None:
        buffer = value.as_buffer()
        if buffer is None:
            self.skips.add("missing_text", origin, "null")
        elif buffer.size > self.max_document_bytes:
            self.skips.add("over_long", origin, f"{buffer.size} bytes, at most {self.max_document_bytes}")
        else:
            return self._accept(origin, buffer.to_pybytes())
        return None

    def _parsed(self, file: File) -> tuple[ast.Module, bytes] | None:
        raw = self._whole(file)
        if raw is None:
            return None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Invalid escapes in someone else's file.
                return ast.parse(raw), blake3(raw).digest(16)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            self.skips.add("not_python", _shown(file.path), str(error))
            return None

    def _docstrings(self, file: File) -> Iterator[Document]:
        if parsed := self._parsed(file):
            module, identity = parsed
            text = "\n\n".join(_prose(module))
            if text and (document := self._accept(_shown(file.path), text.encode(errors="replace"), identity=identity)):
                yield document

    def _topics(self, file: File) -> Iterator[Document]:
        if parsed := self._parsed(file):
            for node in parsed[0].body:
                if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
                    for name, text in ast.literal_eval(node.value).items():
                        if document := self._accept(f"{_shown(file.path)}:{name}", text.strip().encode()):
                            yield document


def _prose(node: ast.AST) -> Iterator[str]:
    """The docstrings in `node` in reading order, without examples; the very short ones are left out."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
        text = re.sub(r"^[ \t]*>>> .*(?:\n(?![ \t]*$).*)*\n*", "", text, flags=re.MULTILINE).strip()
        if len(text) >= 40:
            yield text
    for block in ("body", "handlers", "cases", "orelse", "finalbody"):  # Statements alone: expressions hold no docstring.
        children = getattr(node, block, None)
        for child in children if isinstance(children, list) else []:
            yield from _prose(child)


def _is_stringlike(type_: pa.DataType) -> bool:
    t = pa.types
    return any(test(type_) for test in (t.is_string, t.is_large_string, t.is_string_view, t.is_binary, t.is_large_binary))


class _Stream(io.RawIOBase):
    """Chunks of bytes as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._left = b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, and none at the end only."""
        while not self._left and (chunk := next(self._chunks, None)) is not None:
            self._left = chunk
        found, self._left = (self._left, b"") if size < 0 else (self._left[:size], self._left[size:])
        return found


def _warc_records(chunks: Iterator[bytes]) -> Iterator[Any]:
    """The records of a WARC file that is decompressed already; raises _Broken where it cannot be read further."""
    try:
        from warcio.archiveiterator import ArchiveIterator
    except ImportError as error:
        raise DataError(f"WARC files need warcio ({error}); install it: {install_line('warc')}") from None
    records = ArchiveIterator(_Stream(chunks))
    record, number = None, 0
    while True:
        try:
            with redirect_stderr(io.StringIO()):  # what is wrong is told below
                last, record = record, next(records, None)
        except _Broken:
            raise
        except Exception as error:  # on bad records it raises what it happens to meet
            raise _Broken("corrupt_file", f"after {number} records: {' '.join(str(error).split())[:200]}") from None
        if records.err_count:
            raise _Broken("corrupt_file", f"after {number} records: a record is not as long as it says")
        if record is None:
            if last is not None and last.raw_stream.limit > 0:
                raise _Broken("truncated", f"record {number} ends early")
            return
        number += 1
        yield record


def _read(stream: IO[bytes], size: int) -> tuple[bytes, bool]:
    """At most `size` bytes, and whether there are no more."""
    parts: list[bytes] = []
    while size > 0 and (part := stream.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts), size > 0


def _refuse_bomb(stored: int, expanded: int) -> None:
    if expanded > _BOMB_BYTES and expanded > _BOMB_RATIO * stored:
        raise _Broken("bomb", f"{stored} bytes become {expanded}")


def _expanded_bytes(metadata: pq.FileMetaData) -> int:
    """What the file says its columns are once they are decompressed, in bytes."""
    return sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))


class _Decoder(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def _decompress(stream: IO[bytes], new_decoder: Callable[[], _Decoder], chunk_size: int) -> Iterator[bytes]:
    """The content of concatenated compressed members. `chunk_size` is small because one chunk may expand thousands of times."""
    decoder = new_decoder()
    stored = content_size = 0
    try:
        while chunk := stream.read(chunk_size):
            stored += len(chunk)
            while chunk:
                if decoder.eof:
                    if not chunk.strip(b"\0"):
                        break  # Padding between or after members.
                    decoder = new_decoder()
                if content := decoder.decompress(chunk):
                    content_size += len(content)
                    _refuse_bomb(stored, content_size)
                    yield content
                chunk = decoder.unused_data
    except (zlib.error, zstandard.ZstdError) as error:
        raise _Broken("corrupt_file", error) from None
    if not decoder.eof:
        raise _Broken("truncated", "it ends inside compressed data")


def _lines(chunks: Iterable[bytes], limit: int) -> Iterator[bytes | None]:
    """Lines without line feed; None stands for a line longer than `limit` bytes, whose content is dropped as it comes."""
    parts: list[bytes] = []
    held = 0
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        held += len(first)
        parts.append(first)
        if rest:
            yield b"".join(parts) if held <= limit else None
            for line in itertools.islice(rest, len(rest) - 1):
                yield line if len(line) <= limit else None
            parts, held = [rest[-1]], len(rest[-1])
        if held > limit:
            parts.clear()
    if held:
        yield b"".join(parts) if held <= limit else None


def _shown(path: str) -> str:
    """The path as text that any terminal can print."""
    return os.fsencode(path).decode("utf-8", "replace")
