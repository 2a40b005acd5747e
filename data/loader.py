"""Reads batches ahead in a thread, so that a training step finds its batch ready."""

import queue
import threading
from collections.abc import Callable, Iterator
from types import TracebackType

from data.batch import StepBatch

_POLL_SECONDS = 0.05


class Prefetcher:
    """An iterator over the batches of steps `first_step` … `last_step`, made in order by one background thread.

    `make` gives the batch of a step; what it raises is raised where that step's batch is asked for. At most `depth`
    batches wait in memory. Close it, or use it as a context manager, to stop the thread early.
    """

    def __init__(self, make: Callable[[int], StepBatch], first_step: int, last_step: int, depth: int = 4) -> None:
        self._make = make
        self._steps = range(first_step, last_step + 1)
        self._ready: queue.Queue[StepBatch | BaseException | None] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._finished = False
        self._thread = threading.Thread(target=self._fill, name="data-prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        if self._finished or self._stopped.is_set():
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, StepBatch):
            return item
        self._finished = True
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """Stops the thread and waits for it; batches that are ready are dropped."""
        self._stopped.set()
        self._thread.join()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fill(self) -> None:
        try:
            for step in self._steps:
                if not self._put(self._make(step)):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: StepBatch | BaseException | None) -> bool:
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False
