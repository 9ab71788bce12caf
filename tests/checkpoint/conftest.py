"""A store that speaks S3, on this machine, started once for the tests that need one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from quintet.checkpoint.place import Remote

_NUMBERS = itertools.count()
_ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The URL of a server of moto, in a thread."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Remote:
    """A folder in a new bucket of it, which s3fs finds by the environment."""
    for name, value in {**_ENVIRONMENT, "AWS_ENDPOINT_URL": s3_server}.items():
        monkeypatch.setenv(name, value)
    url = f"s3://bucket-{next(_NUMBERS)}"
    system, _ = Remote(f"{url}/x").system()
    system.mkdir(url)
    return Remote(f"{url}/runs")
