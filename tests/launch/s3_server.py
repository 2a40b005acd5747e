"""A real S3 server over HTTP on loopback, and what is needed to put a failing proxy before it."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import boto3
import pytest


@contextmanager
def s3_server(bucket: str) -> Iterator[int]:
    """The port of one that is empty but for a bucket."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        port = server.get_host_and_port()[1]
        connection = HTTPConnection("127.0.0.1", port)
        connection.request("POST", "/moto-api/reset")  # servers of one process share what they hold
        assert connection.getresponse().status == 200
        client_of(port).create_bucket(Bucket=bucket)
        yield port
    finally:
        server.stop()


def client_of(port: int) -> Any:
    """A client of a server on this machine; any credentials do."""
    session = boto3.session.Session("test", "test", region_name="us-east-1")
    return session.client("s3", endpoint_url=f"http://127.0.0.1:{port}")


def set_credentials(patch: pytest.MonkeyPatch) -> None:
    """In the environment; nothing of this machine's own configuration counts."""
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
        ("AWS_CONFIG_FILE", "/nonexistent"),
        ("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent"),
    ):
        patch.setenv(name, value)


class ProxyHandler(BaseHTTPRequestHandler):
    """What answers a request at a proxy."""

    protocol_version = "HTTP/1.1"

    def answer(self, status: int, headers: dict[str, str], body: bytes, sent: int | None = None) -> None:
        """Answer; where `sent` is given, with so many bytes of the body, and then end the connection."""
        self.send_response(status)
        left_out = {"connection", "transfer-encoding", "date", "server"}
        if self.command != "HEAD":  # there it is the size of what the answer is about
            left_out.add("content-length")
            self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            if name.lower() not in left_out:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:sent])
        if sent is not None:
            self.wfile.flush()
            self.hang_up()

    def hang_up(self) -> None:
        """End the connection at once."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@contextmanager
def http_server(handler: type[BaseHTTPRequestHandler], address: str = "127.0.0.1") -> Iterator[str]:
    """The URL of a server on a free port."""
    server = ThreadingHTTPServer((address, 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://{address}:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
