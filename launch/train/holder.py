"""Who trains a run, described so that others can tell whether it still does: from this machine and from any other.

Where process ids can be compared (same boot, same pid namespace) the process itself is looked for. Everywhere else,
on another node or in another container, what counts is a heartbeat: a holder renews its file every HEARTBEAT_SECONDS,
and is gone when it has not done so for GONE_AFTER_SECONDS.
"""

import dataclasses
import os
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

HEARTBEAT_SECONDS = 20.0
"""How often a holder renews its file."""

GONE_AFTER_SECONDS = 300.0
"""So long without a heartbeat, and a holder that cannot be looked for is gone. Long beside what a shared file system
may keep to itself (a minute), short beside what a requeued job waits for."""


@dataclass(frozen=True)
class Holder:
    """The process that trains a run."""

    host: str
    """Host name."""
    pid: int
    """Process id on that host."""
    start_time: str
    """When the process started, in the kernel's own unit: tells it from a later process with the same id."""
    boot_id: str
    """Of the machine's kernel: another machine, or the same one after it was started again, has another."""
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

    @classmethod
    def from_json(cls, content: object) -> "Holder":
        """Raises ValueError where `content` is not what `dataclasses.asdict` made of one."""
        if not isinstance(content, dict) or content.keys() != {field.name for field in dataclasses.fields(cls)}:
            raise ValueError("other keys")
        for key, value in content.items():
            if not isinstance(value, int if key == "pid" else str) or isinstance(value, bool):
                raise ValueError(f"{key}: {value!r}")
        return cls(**content)

    def can_be_looked_for(self) -> bool:
        """Whether the calling process would see this one among the processes of its machine."""
        return self.boot_id == _boot_id() and self.pid_namespace == _pid_namespace()

    def is_provably_gone(self, silent_seconds: float) -> bool:
        """Whether the process certainly trains no more; `silent_seconds`: since its last heartbeat."""
        if self.can_be_looked_for():
            return not _runs(self.pid, self.start_time)
        return silent_seconds > GONE_AFTER_SECONDS

    def is_same_process(self, other: "Holder") -> bool:
        """Whether both describe one process."""
        return dataclasses.replace(self, launch_id="", since="") == dataclasses.replace(other, launch_id="", since="")


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
