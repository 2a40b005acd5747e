"""What was staged into a folder: of every copied file its sha256, and by what it can be told from one that was changed.

`_staged.jsonl` lies beside the copies, a line a file, appended when the file has its name; of two lines about a file
the later one counts, and a line that a crash has cut off is none. A start compares size, inode and times with what the
system says: the time of the last change of status (ctime) cannot be set back by whoever writes into a file.
"""

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType

from data.manifest import STAGED_NAME
from data.verification import ExpectedFile
from nanotron_recipes.errors import UserError

_SAID = {"size": "size", "inode": "inode", "mtime_ns": "time of change", "ctime_ns": "time of change of status"}


@dataclass(frozen=True, slots=True)
class StagedFile:
    """A file as it was when it had been staged."""

    name: str
    """Path relative to the source's folder."""
    size: int
    """Bytes."""
    sha256: str
    """Hexadecimal, computed over the bytes as they were copied."""
    inode: int
    """Number of the file in its file system."""
    mtime_ns: int
    """Time of the last change of its content."""
    ctime_ns: int
    """Time of the last change of its content, name or times."""


class NotStaged(UserError):
    """Files that a run reads are not on this machine yet."""


@dataclass(frozen=True)
class StagedFolder:
    """The copies in a folder, as far as their record goes."""

    folder: Path
    files: dict[str, StagedFile]

    def change_of(self, file: ExpectedFile) -> str | None:
        """What is different from when `file` was staged, or from what is expected of it; None where nothing is."""
        staged = self.files.get(file.name)
        if staged is None:
            return "not staged"
        if (staged.sha256, staged.size) != (file.sha256, file.size):
            return "staged from a source with another manifest"
        try:
            found = file_as_it_is(file, staged.sha256)
        except FileNotFoundError:
            return "staged, and now gone"
        if found == staged:
            return None
        differing = [said for key, said in _SAID.items() if getattr(found, key) != getattr(staged, key)]
        return f"changed since it was staged ({', '.join(differing)})"


def read_staged(folder: Path) -> StagedFolder | None:
    """The record in `folder`; None where nothing was ever staged there."""
    try:
        lines = (folder / STAGED_NAME).read_bytes().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return None
    files: dict[str, StagedFile] = {}
    for line in lines:
        try:
            staged = StagedFile(**json.loads(line))
        except (ValueError, TypeError):
            continue
        files[staged.name] = staged
    return StagedFolder(folder, files)


def file_as_it_is(file: ExpectedFile, sha256: str) -> StagedFile:
    """The record of a file that has been found to hold `sha256`. Raises OSError."""
    found = os.stat(file.path)
    return StagedFile(
        name=file.name,
        size=found.st_size,
        sha256=sha256,
        inode=found.st_ino,
        mtime_ns=found.st_mtime_ns,
        ctime_ns=found.st_ctime_ns,
    )


class StagedLog:
    """The record, open for one stager at a time."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder where it is missing. UserError where another process stages into it."""
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / STAGED_NAME).open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise UserError(f"{folder}: another process is staging into it") from None
        self._lock = Lock()
        self._file.write(b"\n")  # ends a line that a crash has cut off
        self._file.flush()

    def add(self, file: StagedFile) -> None:
        """Writes a line that survives a crash."""
        with self._lock:
            self._file.write(json.dumps(asdict(file)).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> "StagedLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
