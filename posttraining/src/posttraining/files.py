"""Files and folders that are whole or absent, and their hashes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttraining.errors import NO_VALUE, mistake


def write_whole(path: Path, content: str | bytes) -> None:
    """Write `content` (text as UTF-8) to `path`: written beside, flushed to disk, renamed. Missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with beside.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield the empty folder `.<name>.part` beside `path`; when the block ends it is `publish`ed as `path`.

    Nothing is at `path` when the block raises or the process dies; what a killed process left in the part folder is
    removed by the next one. Raises Mistake where something is at `path` already.
    """
    check_absent(path)
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        publish(part, path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def publish(folder: Path, path: Path) -> None:
    """Make a folder and all that is in it durable and rename it to `path`, where nothing or an empty folder is."""
    for entry in sorted(folder.rglob("*")):
        sync(entry)
    sync(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(path)
    sync(path.parent)


def work_folder(output: Path, content: Mapping[str, Any]) -> Path:
    """`.<name>.work` beside `output`, where a stage keeps what it has so far; made where it is not there.

    `content` (what JSON can hold) is what the stage computes from. Raises Mistake where `output` is taken, or where
    the folder belongs to other content.
    """
    check_absent(output)
    folder = output.with_name(f".{output.name}.work")
    identity = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    file = folder / "identity"
    if not file.is_file():
        write_whole(file, identity)
    if file.read_text(encoding="utf-8") != identity:
        expected = "holds unfinished work with other settings; move it away or choose another output_dir"
        raise mistake(folder, None, NO_VALUE, expected)
    return folder


def check_absent(path: Path) -> None:
    """Raise Mistake where `path`, in which a stage is about to write, is there and not an empty folder."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise mistake(path, None, NO_VALUE, "is there already; move it away or choose another output_dir")


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Make durable what a file holds, or which names a folder holds."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
