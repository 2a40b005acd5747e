"""Disks that are full or cannot be written, to show what a training does about them."""

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = "No space left on device"


def fill(disk: Path) -> Path:
    """Leave no space on a disk; the file that takes it."""
    filler = disk / "filler"
    descriptor = os.open(filler, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        while shutil.disk_usage(disk).free:
            os.write(descriptor, bytes(4096))
    except OSError as error:  # somebody else took the last page
        assert error.errno == errno.ENOSPC
    finally:
        os.close(descriptor)
    return filler


@contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """Nothing can be written to a disk that is mounted there; no file may be open for it."""
    remount = ["mount", "-o", "remount,ro", str(disk)]
    wait_until(lambda: subprocess.run(remount, capture_output=True).returncode == 0)  # not in the middle of a write
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)


def wait_until(is_so: Callable[[], bool]) -> None:
    """Return as soon as something is so, which takes no longer than 20 seconds."""
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)
