"""A server that answers as the Hugging Face hub does for one data set at one revision, from a local folder."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from s3_server import http_server


@contextmanager
def hub_of(folder: Path, dataset: str, revision: str) -> Iterator[str]:
    """The address of the server, for HF_ENDPOINT."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if (rest := _behind(path, f"/api/datasets/{dataset}/revision/")) is not None:
                self._json({"id": dataset, "sha": "0" * 40, "siblings": []} if rest == revision else None)
            elif (rest := _behind(path, f"/api/datasets/{dataset}/tree/{revision}")) is not None:
                recursive = "recursive=true" in self.path.lower()
                self._json(_tree(folder, rest.strip("/"), recursive=recursive))
            elif (rest := _behind(path, f"/datasets/{dataset}/resolve/{revision}/")) is not None:
                self._content((folder / rest).read_bytes())
            else:
                self._json(None)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            paths = json.loads(body)["paths"] if body.startswith("{") else re.findall(r"paths=([^&]*)", body)
            entries = [_entry(folder, folder / unquote(path)) for path in paths if (folder / unquote(path)).exists()]
            self._json(entries)

        def _json(self, value: Any) -> None:
            content = json.dumps({"error": "Repository not found"} if value is None else value).encode()
            self.send_response(404 if value is None else 200)
            if value is None:
                known = f"/api/datasets/{dataset}/" in self.path
                reason = "EntryNotFound" if "/tree/" in self.path else "RevisionNotFound" if known else "RepoNotFound"
                self.send_header("X-Error-Code", reason)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _content(self, content: bytes) -> None:
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
            first, last = (int(wanted[1]), int(wanted[2])) if wanted else (0, len(content) - 1)
            part = content[first : last + 1]
            self.send_response(206 if wanted else 200)
            self.send_header("content-range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
            self.send_header("content-length", str(len(part)))
            self.end_headers()
            self.wfile.write(part)

        def log_message(self, *arguments: object) -> None:
            pass

    with http_server(Handler) as url:
        yield url


def _behind(path: str, beginning: str) -> str | None:
    return path.removeprefix(beginning) if path.startswith(beginning) else None


def _tree(folder: Path, below: str, *, recursive: bool) -> list[dict[str, Any]] | None:
    place = folder / below
    if not place.is_dir():
        return None
    found = place.rglob("*") if recursive else place.iterdir()
    return [_entry(folder, path) for path in sorted(found)]


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
    content = path.read_bytes()
    return {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": name}
