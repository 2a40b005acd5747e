"""A real S3 store on loopback that keeps checkpoints, behind a proxy that fails as stores do."""

import hashlib
import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Literal

from s3_server import ProxyHandler, client_of, http_server, s3_server

from parallel.checkpoint_files import read_manifest

BUCKET = "checkpoints"
Fault = Literal["500", "503", "cut"]


@dataclass
class Faults:
    """What the proxy does to requests."""

    share: float = 0.0
    """Of all requests, so many fail."""
    kinds: tuple[Fault, ...] = ("500", "503", "cut")
    next: list[Fault] = field(default_factory=list)
    """What the next PUTs meet, whatever `share` is."""
    is_out: bool = False
    """Every connection ends at once."""
    corrupts: int = 0
    """So many PUTs arrive with a bit flipped."""
    seconds_per_put: float = 0.0
    seen: list[str] = field(default_factory=list)
    """Method and path of every request."""
    failed: list[Fault] = field(default_factory=list)
    """What was done."""
    generator: random.Random = field(default_factory=lambda: random.Random(5))

    def of(self, method: str) -> Fault | None:
        """What happens to a request."""
        fault: Fault | None = None
        if method == "PUT" and self.next:
            fault = self.next.pop(0)
        elif self.generator.random() < self.share:
            fault = self.generator.choice(self.kinds)
        if fault is not None:
            self.failed.append(fault)
        return fault


@dataclass
class CheckpointStore:
    """A store with one bucket; `url` is that of the proxy."""

    port: int
    faults: Faults
    url: str = ""

    @cached_property
    def client(self) -> Any:
        """Of the store itself, past the proxy."""
        return client_of(self.port)

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """Everything below a prefix."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return {key: self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}

    def whole_steps(self, run: str, scratch: Path) -> list[int]:
        """The steps of a run with a manifest; every file that one names must be there, byte by byte."""
        found = []
        objects = self.objects(f"team/{run}/")
        for key, body in objects.items():
            if key.endswith("/manifest.json"):
                folder = key.rpartition("/")[0]
                (scratch / "manifest.json").write_bytes(body)
                manifest = read_manifest(scratch)
                for entry in manifest.files:
                    content = objects[f"{folder}/{entry.name}"]
                    assert hashlib.sha256(content).hexdigest() == entry.sha256, key
                assert folder.split("/")[-2] == str(manifest.step)
                found.append(manifest.step)
        return sorted(found)

    def uploads_left(self) -> list[str]:
        """Uploads in parts that nobody has ended."""
        return [one["Key"] for one in self.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])]


@contextmanager
def checkpoint_store(address: str = "127.0.0.1") -> Iterator[CheckpointStore]:
    """One that is empty but for its bucket; its proxy listens on an address of this machine."""
    with s3_server(BUCKET) as port:
        store = CheckpointStore(port, Faults())
        with http_server(_proxy(store), address) as store.url:
            yield store


def _proxy(store: CheckpointStore) -> type[ProxyHandler]:
    lock = threading.Lock()
    faults = store.faults

    class Handler(ProxyHandler):
        def pass_on(self) -> None:
            with lock:
                faults.seen.append(f"{self.command} {self.path}")
                fault = faults.of(self.command)
                flips = self.command == "PUT" and faults.corrupts > 0
                faults.corrupts -= flips
            length = int(self.headers.get("Content-Length", 0))
            if faults.is_out:
                return self.hang_up()
            if fault == "cut" and self.command == "PUT":
                self.rfile.read(length // 2)
                return self.hang_up()
            body = self.rfile.read(length)
            if self.command == "PUT":
                threading.Event().wait(faults.seconds_per_put)
            if fault in ("500", "503"):
                code = "InternalError" if fault == "500" else "SlowDown"
                return self.answer(int(fault), {}, f"<Error><Code>{code}</Code><Message>!</Message></Error>".encode())
            if flips and body:
                body = bytes([body[0] ^ 1]) + body[1:]
            connection = HTTPConnection("127.0.0.1", store.port)
            try:
                connection.request(self.command, self.path, body, dict(self.headers))
                response = connection.getresponse()
                content = response.read()
            except (OSError, HTTPException):
                return self.hang_up()
            sent = len(content) // 2 if fault == "cut" else None
            self.answer(response.status, dict(response.getheaders()), content, sent)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = pass_on

    return Handler


def uploading(store: CheckpointStore, **more: Any) -> list[str]:
    """`--set` for a run that uploads there."""
    values = {"upload_s3_path": f"s3://{BUCKET}/team", "endpoint_url": store.url, **more}
    return [word for key, value in values.items() for word in ("--set", f"s3_upload.{key}={json.dumps(value)}")]
