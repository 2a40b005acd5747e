"""How far a transfer of many bytes is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nanotron_recipes.numbers import short_number

EVERY_SECONDS = 30.0
"""Between two lines where nobody watches a terminal."""


@contextmanager
def transfer_progress(total: int) -> Iterator[Callable[[int], object]]:
    """Show on stderr how much of `total` bytes is done, bytes a second, and the time left; yields what is told the
    bytes that were done, from any thread."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("", total=total)
            yield lambda count: progress.advance(task, count)
        return
    lines = _Lines(total)
    thread = threading.Thread(target=lines.run, name="transfer-progress", daemon=True)
    thread.start()
    try:
        yield lines.advance
    finally:
        lines.ended.set()
        thread.join()


def progress_line(done: int, total: int, seconds: float) -> str:
    """`1.20T of 24.0T bytes (5 %), 2.21G bytes/s, 2:51:30 left`, as far as it is known after so many seconds."""
    line = f"{short_number(done)} of {short_number(total)} bytes ({100 * done // max(1, total)} %)"
    if done <= 0 or seconds <= 0:
        return line
    left = round((total - done) * seconds / done)
    return f"{line}, {short_number(done / seconds)} bytes/s, {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"


class _Lines:
    def __init__(self, total: int) -> None:
        self._total = total
        self._begun = time.monotonic()
        self._lock = threading.Lock()
        self._done = 0
        self.ended = threading.Event()

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count

    def run(self) -> None:
        while not self.ended.wait(EVERY_SECONDS):
            print(progress_line(self._done, self._total, time.monotonic() - self._begun), file=sys.stderr, flush=True)
