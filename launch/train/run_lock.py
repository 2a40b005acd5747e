"""One launch at a time trains a run.

The holder writes who it is into `holder.json` of the run's folder, and touches that file again and again. Both survive
a kill -9, so whoever comes next decides whether the holder is provably gone (see `launch.train.holder`).
Takers exclude each other with a file lock that the kernel drops when its owner dies. A holder that was taken for gone
and was only asleep, or that shares a file system without such locks with a taker of the same moment, finds another's
name in the file at its next heartbeat, and ends.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from launch.train import holder as holders
from launch.train.holder import Holder
from launch.train.outage import Outage
from launch.train.streams import describe, say
from nanotron_recipes.errors import UserError
from nanotron_recipes.files import write_atomic

HOLDER_FILE = "holder.json"
MUTEX_FILE = ".holder.lock"
_JOB_LAUNCH = re.compile(r"slurm-([0-9_]+)\.([0-9]+)")


class RunIsTrained(UserError):
    """Another launch, which cannot be shown to be gone, trains the run."""


def new_launch_id() -> str:
    """A name for one launch, the same for all its processes; sorts by time and is fit for a file name."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def job_launch_id(job: str, restart: int) -> str:
    """The name of one start of a Slurm job."""
    return f"slurm-{job}.{restart}"


def is_earlier_start(other: str, launch_id: str) -> bool:
    """Whether `other` is an earlier start of the same Slurm job. Slurm has ended that before it started this one; where
    a node was only cut off, what still runs there has lost the run and ends at its next heartbeat."""
    names = [_JOB_LAUNCH.fullmatch(name) for name in (other, launch_id)]
    if names[0] is None or names[1] is None or names[0][1] != names[1][1]:
        return False
    return int(names[0][2]) < int(names[1][2])


def holder_of(folder: Path) -> Holder | None:
    """Who trains the run in `folder`: None when nobody does, or when the last one to do so is provably gone.

    Raises UserError where the holder's description is damaged.
    """
    found = _read_holder(folder)
    return None if found is None or _is_gone(folder, found) else found


class RunLock:
    """The right to train one run, from `acquire` to `release`."""

    def __init__(self, folder: Path, holder: Holder, launcher: Holder | None) -> None:
        self._folder = folder
        self.holder = holder
        self._launcher = launcher
        self._holds = True
        self._released = threading.Event()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    @classmethod
    def acquire(cls, folder: Path, launch_id: str) -> "RunLock":
        """Take the run in `folder` (which exists) for the calling process.

        A holder of the same launch is replaced: the launcher takes the run, its rank 0 takes it over, and gives it back
        to the launcher. So is one of an earlier start of the same Slurm job. A thread renews the heartbeat until
        `release`; where it finds that another launch has the run, it ends the process.
        Raises RunIsTrained, naming the holder, when another launch has it; UserError where that cannot be known.
        """
        mine = Holder.this_process(launch_id)
        with _mutex(folder):
            other = holder_of(folder)
            if other is not None and other.launch_id != launch_id and not is_earlier_start(other.launch_id, launch_id):
                raise RunIsTrained(_refusal(folder, other))
            _write_holder(folder, mine)
        return cls(folder, mine, None if other is None or other.is_same_process(mine) else other)

    def release(self) -> None:
        """Give the run back: to the launcher that had it before, where that still runs. A process of the same launch
        that took it over, and still runs, keeps it. Where that fails (a full disk) a line says so, and others will
        find this process gone."""
        self._released.set()
        try:
            self._give_back()
        except (OSError, UserError) as error:
            say(f"the run could not be given back: {describe(error)}", error=True)

    def _give_back(self) -> None:
        with _mutex(self._folder):
            current = _read_holder(self._folder)
            if current is None or current.launch_id != self.holder.launch_id:
                return
            if current != self.holder and not _is_gone(self._folder, current):
                return
            if self._launcher is not None and not _is_gone(self._folder, self._launcher):
                _write_holder(self._folder, self._launcher)
            else:
                (self._folder / HOLDER_FILE).unlink(missing_ok=True)

    def renew(self) -> None:
        """The heartbeat.

        Raises RunIsTrained where this process had the run and another launch has it now; OSError and ValueError where
        the holder's file cannot be read or touched.
        """
        current = _parse_holder(self._folder)
        if current is None:
            return
        if current.launch_id != self.holder.launch_id:
            if self._holds:
                raise RunIsTrained(f"{_whom(self._folder, current)}, and took it over from this process")
            return
        self._holds = current == self.holder
        if self._holds:
            os.utime(self._folder / HOLDER_FILE)

    def _beat(self) -> None:
        outage = Outage(
            f"heartbeat in {self._folder / HOLDER_FILE}",
            "training goes on while no other launch takes the run",
            "it beats again",
            lambda line: say(line, error=True),
        )
        while not self._released.wait(holders.HEARTBEAT_SECONDS):
            try:
                self.renew()
            except RunIsTrained as error:
                # At once, and without saving: the checkpoints are another's now.
                say(f"error: {error}", error=True)
                os._exit(1)
            except (OSError, ValueError, RecursionError) as error:
                if self._holds:
                    outage.failed(error)
            else:
                outage.succeeded()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def _whom(folder: Path, holder: Holder) -> str:
    return f"{folder}: process {holder.pid} on {holder.host} trains this run since {holder.since}"


def _refusal(folder: Path, holder: Holder) -> str:
    if holder.can_be_looked_for():
        return f"{_whom(folder, holder)}; wait for it, stop it, or choose another --run"
    return (
        f"{_whom(folder, holder)}; its last sign of life is {_silent_seconds(folder):.0f} s old, and after "
        f"{holders.GONE_AFTER_SECONDS:.0f} s it counts as gone; if it is gone already, remove {folder / HOLDER_FILE}"
    )


def _is_gone(folder: Path, holder: Holder) -> bool:
    return holder.is_provably_gone(0.0 if holder.can_be_looked_for() else _silent_seconds(folder))


def _silent_seconds(folder: Path) -> float:
    """Time since the holder's file was touched. Both times are the file system's: clocks of nodes may differ."""
    try:
        touched = (folder / HOLDER_FILE).stat().st_mtime
    except OSError:
        return 0.0
    try:
        os.utime(folder / MUTEX_FILE)
        now = (folder / MUTEX_FILE).stat().st_mtime
    except OSError:  # a folder that is only looked at
        now = time.time()
    return max(0.0, now - touched)


def _read_holder(folder: Path) -> Holder | None:
    path = folder / HOLDER_FILE
    try:
        return _parse_holder(folder)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); if nobody trains, remove it") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a holder's description; if nobody trains, remove it") from error


def _parse_holder(folder: Path) -> Holder | None:
    try:
        return Holder.from_json(json.loads((folder / HOLDER_FILE).read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _write_holder(folder: Path, holder: Holder) -> None:
    try:
        write_atomic(folder / HOLDER_FILE, json.dumps(dataclasses.asdict(holder), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{folder / HOLDER_FILE}: cannot be written ({error.strerror})") from error


@contextlib.contextmanager
def _mutex(folder: Path) -> Iterator[None]:
    """Exclude other takers of the run while its holder is read and replaced."""
    path = folder / MUTEX_FILE
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror})") from error
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
