"""Files and folders that are whole or absent, and their hashes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttraining.errors import NO_VALUE, Mistake, mistake


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


_IDENTITY, _LOCK = "identity", "lock"


def work_folder(output: Path, content: Mapping[str, Any]) -> Path:
    """`.<name>.work` beside `output`, where a stage keeps what it has so far; made where it is not there.

    `content` (what JSON can hold) is what the stage computes from. Raises Mistake where `output` is taken or no folder
    can be made there, or where the folder belongs to other content.
    """
    folder, identity = _made(output), _identity(content)
    file = folder / _IDENTITY
    if not file.is_file():
        write_whole(file, identity)
    if file.read_text(encoding="utf-8") != identity:
        expected = "holds unfinished work with other settings; move it away or choose another output_dir"
        raise mistake(folder, None, NO_VALUE, expected)
    return folder


@contextmanager
def own_work_folder(output: Path, content: Mapping[str, Any]) -> Iterator[Path]:
    """`work_folder` for one process alone: locked until the block ends. Raises Mistake where another process has it.

    Other content does not matter while nothing is in the folder that a stage could go on from, and a folder with
    nothing in it is removed when the block ends.
    """
    folder = _made(output)
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise _unusable(output, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise mistake(output, None, NO_VALUE, "is being written by another process") from error
        except OSError:
            pass  # a file system without locks
        try:
            if not _holds_results(folder):
                (folder / _IDENTITY).unlink(missing_ok=True)
            yield work_folder(output, content)
        finally:
            if not _holds_results(folder):
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


def check_apart(output: Path, model: Path) -> None:
    """Raise Mistake where `output` would be in the folder of the `model` that a stage starts from."""
    if output.resolve().is_relative_to(model.resolve()):
        raise mistake(None, "output_dir", str(output), f"is in the folder of the model, {model}; choose another")


def _made(output: Path) -> Path:
    try:
        check_absent(output)
        folder = output.with_name(f".{output.name}.work")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        if isinstance(error, Mistake):
            raise
        raise _unusable(output, error) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise mistake(None, "output_dir", str(output), f"cannot be written: no permission to write in {folder}")
    return folder


def _unusable(output: Path, error: Exception) -> Mistake:
    reason = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else str(error)
    return mistake(None, "output_dir", str(output), f"no folder can be made there: {reason}")


def _identity(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _holds_results(folder: Path) -> bool:
    return any(path.is_file() and path.name not in (_IDENTITY, _LOCK) for path in folder.rglob("*"))


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
