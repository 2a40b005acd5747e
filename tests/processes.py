"""Processes by what they run, although any of them may end while it is looked at."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

import psutil


def running(processes: Iterable[psutil.Process], name: str) -> list[psutil.Process]:
    """Those that have not ended and run a program or a Python module of this name."""
    return [process for process in processes if name in _first_arguments(process)]


def kill_all(processes: Iterable[psutil.Process]) -> None:
    """End each at once; some may have ended by themselves or with the ones before them."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _first_arguments(process: psutil.Process) -> list[str]:
    """Nothing of one that has ended, also where nobody has waited for it yet; not what a launcher passes on."""
    try:
        return [Path(argument).name for argument in process.cmdline()[:5]]
    except psutil.NoSuchProcess:  # of which psutil's ZombieProcess is one
        return []
