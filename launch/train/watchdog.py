"""A rank that stands still says where, and ends."""

import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from launch.train.streams import say

LONGEST_GRACE_SECONDS = 10.0
"""How long a rank that has written its stacks waits for the others to write theirs: when one ends, all are ended."""


class Watchdog:
    """Between `__enter__` and `__exit__`, ends this process when something that is watched takes too long.

    A thread writes what took too long and the stacks of all threads to stderr, which is the rank's log, and ends the
    process with exit code 1. Where it cannot run (something holds the interpreter's lock), faulthandler, which needs
    no lock, does the same a little later.

    Args:
        seconds: that anything watched may take; None: for ever.
        rank: of the world, for the message.
    """

    def __init__(self, seconds: float | None, rank: int) -> None:
        self._seconds = seconds
        self._rank = rank
        self._watched: tuple[str, float] | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self._seconds is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    @contextmanager
    def watch(self, what: str) -> Iterator[None]:
        """Limit the time of the body; `what` names it in the message. Not to be nested."""
        if self._seconds is None:
            yield
            return
        self._watched = (what, time.monotonic() + self._seconds)
        faulthandler.dump_traceback_later(self._seconds + 2 * self._grace, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            self._watched = None

    @property
    def _grace(self) -> float:
        assert self._seconds is not None
        return min(self._seconds, LONGEST_GRACE_SECONDS)

    def _look(self) -> None:
        assert self._seconds is not None
        while not self._closed.wait(min(1.0, self._seconds / 4)):
            watched = self._watched
            if watched is not None and time.monotonic() > watched[1]:
                self._report(watched[0])
                time.sleep(self._grace)
                os._exit(1)

    def _report(self, what: str) -> None:
        say(
            f"error: rank {self._rank}: {what} took more than {self._seconds:g} s (guards.step_timeout_seconds); "
            "this is where each thread stands:",
            error=True,
        )
        faulthandler.dump_traceback()
