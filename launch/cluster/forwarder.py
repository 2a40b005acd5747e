"""The launcher beside its agents: signals are passed on to the ranks, and what the agents' ends mean is said."""

import math
import signal
import subprocess
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import psutil

from launch.cluster.agent import TERMINATED, USER_ERROR
from launch.train.streams import say

FAILURE_GRACE_SECONDS = 15
"""How long the other ranks may go on after one has failed. A stop that was asked for has no limit: saves take time."""
_REPEATED_DELIVERY_SECONDS = 0.1
"""A wrapper may pass on a Ctrl-C that the terminal has delivered already; nobody types two so fast."""
_POLL_SECONDS = 0.05


class Forwarder:
    """Passes signals on to the ranks that torchrun started."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._asked_at: float | None = None
        self._asked_by = ""
        self._stopped_before_ranks = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Forwarder":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            # nohup ignores SIGHUP on purpose; a job script ignores SIGUSR1 for torchrun's sake alone.
            if number == signal.SIGUSR1 or signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def wait(self, processes: list[subprocess.Popen[bytes]]) -> int:
        self._processes = processes
        if self._asked_at is not None:
            self._pass_on()
        process = min(_as_they_end(processes), key=_says_little)
        code = process.returncode
        if self._stopped_before_ranks or (code == TERMINATED and self._asked_at is not None):
            say("Stopped before training began.", error=True)
            return 0
        if code == TERMINATED:
            say("Training failed: a rank was ended by SIGTERM before it could listen.", error=True)
        elif code < 0:
            say(
                f"Training failed: process {process.pid}, which started the ranks, was ended by {_signal_name(-code)}; "
                "what still runs of them saves and ends.",
                error=True,
            )
        return code if code in (0, USER_ERROR) else 1

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            self._asked_by = signal.Signals(number).name
            self._pass_on()
        elif number == signal.SIGINT and now - self._asked_at > _REPEATED_DELIVERY_SECONDS:
            self._kill()

    def _pass_on(self) -> None:
        """Ask every rank to stop. Before there are ranks nothing is trained, and torchrun may just end."""
        if not self._processes:
            return
        ranks = self._ranks()
        for rank in ranks:
            _send(rank, signal.SIGTERM)
        if ranks:
            at_once = " Ctrl-C again ends at once, without." if self._asked_by == "SIGINT" else ""
            say(f"Stopping ({self._asked_by}): the state after the step at hand is saved.{at_once}")
        else:
            self._stopped_before_ranks = True
            for process in self._processes:
                process.kill()

    def _kill(self) -> None:
        say("Ended at once, as asked; the run goes on from its newest checkpoint.", error=True)
        for rank in self._ranks():
            _send(rank, signal.SIGKILL)

    def _ranks(self) -> list[psutil.Process]:
        return [rank for process in self._processes for rank in _children(process.pid)]


def _as_they_end(processes: list[subprocess.Popen[bytes]]) -> Iterator[subprocess.Popen[bytes]]:
    """The processes as they end. When one has failed, the others are given a while and then ended as well."""
    left, failed_at = list(processes), math.inf
    while left:
        ended = [process for process in left if process.poll() is not None]
        left = [process for process in left if process not in ended]
        yield from ended
        if any(process.returncode for process in ended):
            failed_at = min(failed_at, time.monotonic())
        if time.monotonic() - failed_at > FAILURE_GRACE_SECONDS:
            failed_at = math.inf
            for process in left:
                process.terminate()
        if left:
            time.sleep(_POLL_SECONDS)


def _says_little(process: subprocess.Popen[bytes]) -> tuple[bool, bool, bool]:
    """Orders ended processes by what their exit codes say: a user's mistake first, then any failure but an end by
    SIGTERM, then that."""
    code = process.returncode
    return code != USER_ERROR, code in (0, TERMINATED), code == 0


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children()
    except psutil.NoSuchProcess:
        return []


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one of the real-time signals
        return f"signal {number}"


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
