"""Stores on this machine that speak as much of Google Storage's and the Hugging Face Hub's HTTP as reading needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit


class _Store(BaseHTTPRequestHandler):
    """Answers `found` as JSON or bytes, and 404 where there is nothing."""

    files: ClassVar[dict[str, bytes]]

    def found(self, path: str, query: Mapping[str, str]) -> object:
        """Bytes, something that becomes JSON, or None."""
        raise NotImplementedError

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        found = self.found(unquote(url.path), {name: values[0] for name, values in parse_qs(url.query).items()})
        body = found if isinstance(found, bytes) else json.dumps(found).encode()
        status, size = 404 if found is None else 200, len(body)
        if found is not None and (wanted := self.headers.get("Range")):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            status, body = 206, body[int(first) : int(last) + 1]
            self.send_response(status)
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(body) - 1}/{size}")
        else:
            self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class GoogleStorage(_Store):
    """One bucket, `crawl`."""

    def found(self, path: str, query: Mapping[str, str]) -> object:
        bucket, _, name = path.partition("/b/crawl/o")
        name = name.removeprefix("/")
        if not bucket.endswith("/storage/v1") or (name and name not in self.files):
            return None
        if not name:
            return {"items": [self._told(each) for each in self.files if each.startswith(query.get("prefix", ""))]}
        return self.files[name] if query.get("alt") == "media" else self._told(name)

    def _told(self, name: str) -> dict[str, str]:
        content = self.files[name]
        return {"name": name, "bucket": "crawl", "size": str(len(content)), "md5Hash": hashlib.md5(content).hexdigest()}


class Hub(_Store):
    """One data set, `quintet/crawl`."""

    def found(self, path: str, query: Mapping[str, str]) -> object:
        if (name := path.removeprefix("/datasets/quintet/crawl/resolve/main/")) in self.files:
            return self.files[name]
        if path == "/api/datasets/quintet/crawl":
            return {"id": "quintet/crawl", "siblings": [], "tags": []}
        inside, _, top = path.removeprefix("/api/datasets/quintet/crawl").partition("/tree/main")
        top = f"{top}/".removeprefix("/")
        names = [name.removeprefix(top) for name in self.files if name.startswith(top)]
        if inside or not names:
            return None
        folders = sorted({name.partition("/")[0] for name in names if "/" in name})
        told = [{"type": "directory", "path": top + folder, "oid": "0"} for folder in folders]
        return told + [self._told(top + name) for name in names if query.get("recursive") == "true" or "/" not in name]

    def _told(self, name: str) -> dict[str, object]:
        content = self.files[name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@contextmanager
def serving(kind: type[_Store], files: dict[str, bytes]) -> Iterator[str]:
    """The URL of a server of `files`, which may change meanwhile."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type(kind.__name__, (kind,), {"files": files}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
