"""A real HTTP S3 store on loopback, and a proxy before it that fails as stores do."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from s3_server import ProxyHandler, client_of, http_server, s3_server, set_credentials

BUCKET = "shards"


@dataclass
class Store:
    """A store with one bucket."""

    port: int

    @property
    def url(self) -> str:
        """Its endpoint."""
        return f"http://127.0.0.1:{self.port}"

    @cached_property
    def client(self) -> Any:
        """Of the store itself."""
        return client_of(self.port)

    def put(self, key: str, body: bytes) -> None:
        """Makes an object, for everybody to read."""
        self.client.put_object(Bucket=BUCKET, Key=key, Body=body, ACL="public-read")

    def upload(self, folder: Path, prefix: str) -> str:
        """Every file below `folder` under a prefix; returns its URL."""
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.put(f"{prefix}/{file.relative_to(folder)}", file.read_bytes())
        return f"s3://{BUCKET}/{prefix}"


@dataclass
class Faults:
    """What the proxy does to the next GETs of objects whose key ends in `of`."""

    of: str = ".ds"
    errors: int = 0
    """So many get a status of 500 (or `status`) first."""
    status: int = 500
    cuts: list[int] = field(default_factory=list)
    """Then each of these is the number of bytes of the body after which the connection ends."""
    seen: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and Range of every GET."""


@contextmanager
def faulty_proxy(store: Store, faults: Faults) -> Iterator[str]:
    """The endpoint of a proxy that passes GETs on to the store, but for `faults`."""
    lock = threading.Lock()

    class Handler(ProxyHandler):
        def do_GET(self) -> None:
            with lock:
                faults.seen.append((self.path, self.headers["Range"]))
                mine = self.path.partition("?")[0].endswith(faults.of)
                fails = mine and faults.errors > 0
                faults.errors -= fails
                cut = faults.cuts.pop(0) if mine and not fails and faults.cuts else None
            if fails:
                return self.answer(faults.status, {}, b"<Error><Code>SlowDown</Code><Message>!</Message></Error>")
            connection = HTTPConnection("127.0.0.1", store.port)
            connection.request("GET", self.path, headers=dict(self.headers))
            response = connection.getresponse()
            return self.answer(response.status, dict(response.getheaders()), response.read(), cut)

    with http_server(Handler) as url:
        yield url


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    """One that runs for all tests of a file. Any credentials do; nothing of this machine's own configuration counts."""
    with pytest.MonkeyPatch.context() as patch:
        set_credentials(patch)
        with s3_server(BUCKET) as port:
            yield Store(port)
