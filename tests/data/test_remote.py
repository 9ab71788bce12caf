"""Sources in stores: servers on this machine that speak S3 (of moto), Google Storage and the Hugging Face Hub."""

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
from tests.data.stores import GoogleStorage, Hub, serving

INSTALL = "needs s3fs and moto: pip install -c constraints.txt 'moto[s3]' flask flask-cors s3fs"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A store with an empty bucket `crawl`, which s3:// finds by the environment."""
    pytest.importorskip("s3fs", reason=INSTALL)
    pytest.importorskip("moto", reason=INSTALL)
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


@pytest.mark.parametrize(
    "url, kind, package", [("gs://crawl", GoogleStorage, "gcsfs"), ("hf://datasets/quintet/crawl", Hub, "huggingface_hub")]
)
def test_a_source_on_google_storage_or_the_hub_is_prepared_and_read_again_where_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, url: str, kind: Any, package: str
) -> None:
    pytest.importorskip(package, reason=f"needs {package}: pip install -c constraints.txt 'quintet[{url[:2]}]'")
    protocol = url.partition(":")[0]
    files = {"a.jsonl": b'{"text": "one"}\n{"text": "two"}\n', "deep/b.txt": b"a whole file", "deep/c.png": b"x", "d.jsonl.gz": b"bad"}
    monkeypatch.setattr(fsspec.get_filesystem_class(protocol), "_cache", {})
    tokenizer.save(tmp_path / "t.json")
    data = Data(sources=(source(url),), directory=str(tmp_path / "p"), tokenizer=str(tmp_path / "t.json"))
    with serving(kind, files) as endpoint:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": endpoint})
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)
        assert [file.path for file in list_files(source(url)).files] == [
            f"{url}/{name}" for name in ("a.jsonl", "d.jsonl.gz", "deep/b.txt")
        ]
        assert len(list_files(source(f"{url}/deep/*.txt")).files) == 1
        statistics = prepare(data, vocab_size=400, seed=0).sources["code"].statistics
        assert statistics.read == 3 and statistics.skipped == {"not_text": 1, "corrupt_file": 1}
        assert prepare(data, vocab_size=400, seed=0).sources["code"].statistics.reused
        files["deep/b.txt"] = b"Another file."
        assert not prepare(data, vocab_size=400, seed=0, on_other="replace").sources["code"].statistics.reused
        with pytest.raises(DataError, match=r"nowhere.*(cannot be listed|holds no text)"):
            list_files(source(f"{url.rpartition('/')[0]}/nowhere"))


@pytest.mark.parametrize(
    "url, remedy", [("gs://crawl", r"'quintet\[gs\]'"), ("s3://crawl", r"'quintet\[s3\]'"), ("hf://datasets/a/b", r"'quintet\[hf\]'")]
)
def test_a_store_whose_package_is_missing_is_told_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, url: str, remedy: str
) -> None:
    def missing(url: str) -> Any:
        raise ImportError("Please install something")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(DataError, match=rf"{url}.*Please install something.*install it: pip install -c constraints.txt {remedy}"):
        list_files(source(url))


def test_a_protocol_that_nobody_knows_is_told() -> None:
    with pytest.raises(DataError, match=r"nope://x.*not known: nope; correct the URL"):
        list_files(source("nope://x"))
