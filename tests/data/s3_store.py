"""A real HTTP S3 store on loopback, and a proxy before it that fails as stores do."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest

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
        return boto3.session.Session().client("s3", endpoint_url=self.url)

    def put(self, key: str, body: bytes) -> None:
        """Makes an object, for everybody to read."""
        self.client.put_object(Bucket=BUCKET, Key=key, Body=body, ACL="public-read")

    def upload(self, folder: Path, prefix: str) -> str:
        """Every file below `folder` under a prefix; returns its URL."""
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.put(f"{prefix}/{file.relative_to(folder)}", file.read_bytes())
        return f"s3://{BUCKET}/{prefix}"


@contextmanager
def running_store() -> Iterator[Store]:
    """A store that is empty but for its bucket."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        store = Store(server.get_host_and_port()[1])
        store.client.create_bucket(Bucket=BUCKET)
        yield store
    finally:
        server.stop()


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

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

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

        def answer(self, status: int, headers: dict[str, str], body: bytes, cut: int | None = None) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "connection", "transfer-encoding", "date", "server"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:cut])
            if cut is not None:
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    """One that runs for all tests of a file. Any credentials do; nothing of this machine's own configuration counts."""
    with pytest.MonkeyPatch.context() as patch:
        set_credentials(patch)
        with running_store() as running:
            yield running


def set_credentials(patch: pytest.MonkeyPatch) -> None:
    """In the environment."""
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
        ("AWS_CONFIG_FILE", "/nonexistent"),
    ):
        patch.setenv(name, value)
