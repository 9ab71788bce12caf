"""Sources in a store that speaks S3: a server of moto on this machine."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quintet.data.prepare import prepare
from quintet.data.sources import list_files
from quintet.data.tokenizer import Tokenizer
from quintet.errors import DataError
from quintet.spec.run import Data
from tests.data.corpus import source

INSTALL = "needs s3fs and moto: pip install -c constraints.txt 'moto[s3]' flask flask-cors s3fs"
pytest.importorskip("s3fs", reason=INSTALL)
pytest.importorskip("moto", reason=INSTALL)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A store with an empty bucket `crawl`, which s3:// finds by the environment."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**environment, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
        monkeypatch.setenv(name, value)
    system = fsspec.filesystem("s3", skip_instance_cache=True)
    monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "_cache", {})
    system.makedirs("crawl", exist_ok=True)
    yield system
    server.stop()


def test_a_source_on_s3_is_prepared_and_only_what_changed_there_is_redone(tmp_path: Path, store: Any, tokenizer: Tokenizer) -> None:
    table = io.BytesIO()
    pq.write_table(pa.table({"text": ["from parquet", "and another"]}), table)
    store.pipe("crawl/a.jsonl.gz", gzip.compress(b"".join(json.dumps({"text": f"line {i}"}).encode() + b"\n" for i in range(5))))
    store.pipe("crawl/deep/b.parquet", table.getvalue())
    store.pipe("crawl/deep/c.txt", b"a whole file")
    store.pipe("crawl/deep/bad.jsonl.gz", b"\x1f\x8b broken")
    store.pipe("crawl/picture.png", b"x")
    listing = list_files(source("s3://crawl"))
    names = ["s3://crawl/a.jsonl.gz", "s3://crawl/deep/b.parquet", "s3://crawl/deep/bad.jsonl.gz", "s3://crawl/deep/c.txt"]
    assert [file.path for file in listing.files] == names and listing.num_not_text == 1
    assert len(list_files(source("s3://crawl/deep/*.txt")).files) == 1
    tokenizer.save(tmp_path / "t.json")
    data = Data(sources=(source("s3://crawl"),), directory=str(tmp_path / "p"), tokenizer=str(tmp_path / "t.json"))
    statistics = prepare(data, vocab_size=400, seed=0).sources["code"].statistics
    assert statistics.read == 8 and statistics.skipped == {"not_text": 1, "corrupt_file": 1}
    assert prepare(data, vocab_size=400, seed=0).sources["code"].statistics.reused
    store.pipe("crawl/deep/c.txt", b"Another file.")
    again = prepare(data, vocab_size=400, seed=0, on_other="replace").sources["code"].statistics
    assert not again.reused and again.read == 8


def test_a_bucket_that_is_not_there_is_told(store: Any) -> None:
    with pytest.raises(DataError, match=r"s3://nowhere.*(cannot be listed|holds no text)"):
        list_files(source("s3://nowhere/x"))
