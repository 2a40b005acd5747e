"""A file on its way to its place: bytes that are hashed as they are written, and gone on with after an interruption."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from types import TracebackType

CHUNK = 1 << 22
"""Bytes that are read, hashed and written at once."""


class TransferFailed(RuntimeError):
    """A file could not be copied, for a reason that is not in the recipe; the message says all that is to be said."""


class Stopped(Exception):
    """Whoever asked for the transfer does not want it any more."""


@dataclass(frozen=True)
class Watch:
    """What a transfer tells, and how it is told to stop."""

    advance: Callable[[int], object] = lambda count: None
    """Is told the bytes that have come; fewer than 0 where some have to come again."""
    note: Callable[[str], object] = lambda line: None
    """Is told what went wrong and is tried again."""
    stop: Event = field(default_factory=Event)

    def check(self) -> None:
        """Raises Stopped where the transfer is to end."""
        if self.stop.is_set():
            raise Stopped


class PartialFile:
    """The beginning of a file of `size` bytes, under a name of its own, with the sha256 of what is in it."""

    def __init__(self, path: Path, size: int, watch: Watch) -> None:
        """Takes over what an earlier attempt left at `path`."""
        self.path, self.size, self._watch = path, size, watch
        # Through no link that somebody has put there.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        self._file = os.fdopen(descriptor, "a+b", buffering=0)
        self._digest = hashlib.sha256()
        self.length = 0
        """Bytes that are there."""
        self._file.seek(0)
        while chunk := self._file.read(CHUNK):
            watch.check()
            self._count(chunk)
        if self.length > size:
            self.restart()

    def write(self, chunk: bytes) -> None:
        """Appends to the file. Raises OSError where the disk is full, Stopped."""
        self._watch.check()
        rest = memoryview(chunk)
        while rest:
            written = self._file.write(rest)
            rest = rest[written:]
        self._count(chunk)

    def restart(self) -> None:
        """Forgets what is there."""
        self._file.truncate(0)
        self._watch.advance(-self.length)
        self._digest, self.length = hashlib.sha256(), 0

    def finish(self) -> str:
        """Makes the file durable; its sha256, hexadecimal."""
        os.fsync(self._file.fileno())
        return self._digest.hexdigest()

    def __enter__(self) -> "PartialFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _count(self, chunk: bytes) -> None:
        self._digest.update(chunk)
        self.length += len(chunk)
        self._watch.advance(len(chunk))
