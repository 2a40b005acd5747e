"""Files and folders that are whole or absent, and their hashes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

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
    """Yield an empty folder beside `path`; when the block ends it is `publish`ed as `path`.

    Nothing is at `path` when the block raises or the process dies; what a killed process left beside it is removed by
    the next one. Raises Mistake where `path` is taken, cannot be made, or is being written by another process.
    """
    with own_work_folder(path, {}) as work:
        part = work / "part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            yield part
            publish(part, path)
        finally:
            shutil.rmtree(part, ignore_errors=True)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise Mistake, which names the file or else `path`, where the block finds one gone, barred or damaged."""
    try:
        yield
    except (OSError, SafetensorError, UnicodeDecodeError, json.JSONDecodeError) as error:
        file, reason = (error.filename, error.strerror) if isinstance(error, OSError) else (None, None)
        raise mistake(file or path, None, NO_VALUE, f"cannot be read: {reason or error}") from error


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
    (folder, _), identity = _made(output), _identity(content)
    file = folder / _IDENTITY
    if not file.is_file():
        write_whole(file, identity)
    if file.read_text(encoding="utf-8") != identity:
        expected = "holds unfinished work with other settings; move it away or choose another output_dir"
        raise mistake(folder, None, NO_VALUE, expected)
    return folder


@contextmanager
def own_work_folder(output: Path, content: Mapping[str, Any], shard: int | None = None) -> Iterator[Path]:
    """`work_folder` for one process alone: locked until the block ends. Raises Mistake where another process has it.

    Other content does not matter while nothing is in the folder that a stage could go on from, and a folder with
    nothing in it is removed when the block ends, with those above it that were made for it.

    `shard`: which one of several processes that have the folder in common; each number is locked for itself.
    """
    folder, parents = _made(output)
    alone = shard is None
    with (
        _locked(folder / _LOCK, output, fcntl.LOCK_EX if alone else fcntl.LOCK_SH) as lock,
        nullcontext() if alone else _locked(folder / f"{_LOCK}-{shard}", output, fcntl.LOCK_EX),
    ):
        try:
            if alone and not _holds_results(folder):
                (folder / _IDENTITY).unlink(missing_ok=True)
            yield work_folder(output, content)
        finally:
            if not _holds_results(folder) and (alone or _try_lock(lock, fcntl.LOCK_EX)):
                shutil.rmtree(folder, ignore_errors=True)
                _remove_empty(parents)


def check_apart(output: Path, model: Path) -> None:
    """Raise Mistake where `output` would be in the folder of the `model` that a stage starts from."""
    if output.resolve().is_relative_to(model.resolve()):
        raise mistake(None, "output_dir", str(output), f"is in the folder of the model, {model}; choose another")


@contextmanager
def _locked(file: Path, output: Path, kind: int) -> Iterator[int]:
    """A descriptor of `file`, made where it is not there, with a lock of this kind; Mistake where it cannot be had."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise _unusable(output, error) from error
    try:
        # Where the process that had the lock removed the file as it ended, this would be a lock on nothing.
        if not _try_lock(descriptor, kind) or not _is_at(descriptor, file):
            raise mistake(output, None, NO_VALUE, "is being written by another process")
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, kind: int) -> bool:
    """Whether no other process bars the lock; a file system without locks bars none."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _remove_empty(folders: Sequence[Path]) -> None:
    with suppress(OSError):  # the first in which something is
        for folder in folders:
            folder.rmdir()


def _made(output: Path) -> tuple[Path, list[Path]]:
    """The work folder of `output`, and the folders above it that were made with it, from the innermost."""
    try:
        check_absent(output)
        parents = [parent for parent in output.parents if not parent.exists()]
        folder = output.with_name(f".{output.name}.work")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        if isinstance(error, Mistake):
            raise
        raise _unusable(output, error) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise mistake(None, "output_dir", str(output), f"cannot be written: no permission to write in {folder}")
    return folder, parents


def _unusable(output: Path, error: Exception) -> Mistake:
    reason = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else str(error)
    return mistake(None, "output_dir", str(output), f"no folder can be made there: {reason}")


def _identity(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _holds_results(folder: Path) -> bool:
    # os.walk passes over what another process removes meanwhile.
    names = (name for _, _, files in os.walk(folder) for name in files)
    return any(name != _IDENTITY and not name.startswith(_LOCK) for name in names)


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
