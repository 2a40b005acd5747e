"""One launch at a time trains a run.

The holder writes who it is into `holder.json` of the run's folder. That survives a kill -9, so whoever comes next
decides whether the holder is provably gone: on the same machine by process id, start time and boot; on another machine
never.
Takers exclude each other with a file lock that the kernel drops when its owner dies.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from nanotron_recipes.errors import UserError
from nanotron_recipes.files import write_atomic

HOLDER_FILE = "holder.json"
MUTEX_FILE = ".holder.lock"


class RunIsTrained(UserError):
    """Another launch, which cannot be shown to be gone, trains the run."""


def new_launch_id() -> str:
    """A name for one launch, the same for all its processes; sorts by time and is fit for a file name."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


@dataclass(frozen=True)
class Holder:
    """The process that trains a run, described so that its end can be shown later."""

    host: str
    """Host name."""
    pid: int
    """Process id on that host."""
    start_time: str
    """When the process started, in the kernel's own unit: tells it from a later process with the same id."""
    boot_id: str
    """Differs after the host was started again."""
    pid_namespace: str
    """Process ids can only be compared inside one of these (a container has its own)."""
    launch_id: str
    """The launch it belongs to."""
    since: str
    """UTC time of taking the run, for people."""

    @classmethod
    def this_process(cls, launch_id: str) -> "Holder":
        """The description of the calling process."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            start_time=_start_time(os.getpid()) or "",
            boot_id=_boot_id(),
            pid_namespace=_pid_namespace(),
            launch_id=launch_id,
            since=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def is_provably_gone(self) -> bool:
        """Whether the process certainly runs no more, as seen from the calling process's machine."""
        if self.host == socket.gethostname() and self.boot_id != _boot_id():
            return True
        if self.boot_id != _boot_id() or self.pid_namespace != _pid_namespace():
            return False
        return not _runs(self.pid, self.start_time)


def holder_of(folder: Path) -> Holder | None:
    """Who trains the run in `folder`: None when nobody does, or when the last one to do so is provably gone."""
    holder = _read_holder(folder)
    return None if holder is None or holder.is_provably_gone() else holder


class RunLock:
    """The right to train one run, from `acquire` to `release`."""

    def __init__(self, folder: Path, holder: Holder) -> None:
        self._folder = folder
        self.holder = holder

    @classmethod
    def acquire(cls, folder: Path, launch_id: str) -> "RunLock":
        """Take the run in `folder` (which exists) for the calling process.

        A holder of the same launch is replaced: the launcher takes the run, and its rank 0 takes it over.
        Raises RunIsTrained, naming the holder, when another launch has it.
        """
        mine = Holder.this_process(launch_id)
        with _mutex(folder):
            other = holder_of(folder)
            if other is not None and other.launch_id != launch_id:
                raise RunIsTrained(_refusal(folder, other))
            write_atomic(folder / HOLDER_FILE, json.dumps(dataclasses.asdict(mine), indent=1) + "\n")
        return cls(folder, mine)

    def release(self) -> None:
        """Give the run back. A process of the same launch that took it over, and still runs, keeps it."""
        with _mutex(self._folder):
            current = _read_holder(self._folder)
            if current is None or current.launch_id != self.holder.launch_id:
                return
            if current == self.holder or current.is_provably_gone():
                (self._folder / HOLDER_FILE).unlink(missing_ok=True)

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def _refusal(folder: Path, holder: Holder) -> str:
    message = f"{folder}: process {holder.pid} on {holder.host} trains this run since {holder.since}"
    if holder.host == socket.gethostname() and holder.pid_namespace == _pid_namespace():
        return f"{message}; wait for it, stop it, or choose another --run"
    return f"{message}, which cannot be checked from here; if it is gone, remove {folder / HOLDER_FILE}"


def _read_holder(folder: Path) -> Holder | None:
    try:
        return Holder(**json.loads((folder / HOLDER_FILE).read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / HOLDER_FILE}: not a holder's description; if nobody trains, remove it") from error


@contextlib.contextmanager
def _mutex(folder: Path) -> Iterator[None]:
    """Exclude other takers of the run while its holder is read and replaced."""
    descriptor = os.open(folder / MUTEX_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            # Some shared file systems are mounted without locks; the holder's file alone must do there.
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        yield
    finally:
        os.close(descriptor)


def _start_time(pid: int) -> str | None:
    """When process `pid` started; None when that cannot be seen, or only unreaped remains of it are left."""
    try:
        # The second field is the program's name in brackets and may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else str(process.create_time())
    except psutil.Error:
        return None


def _runs(pid: int, start_time: str) -> bool:
    """Whether the process of that id and start time runs; true where another user's processes are hidden."""
    seen = _start_time(pid)
    if seen is not None:
        return seen == start_time
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except ProcessLookupError:
        pass
    return False


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return str(psutil.boot_time())


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
