"""No more than so many bytes a second, whoever sends them."""

import threading
import time
from collections.abc import Callable

from data.transfer import Stopped, Watch


class Throttle:
    """Lets bytes pass at a rate, over all threads together.

    Args:
        bytes_per_second: the rate.
    """

    def __init__(self, bytes_per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = bytes_per_second
        self._clock = clock
        self._lock = threading.Lock()
        self._free_at = clock()

    def take(self, count: int, watch: Watch) -> None:
        """Return when `count` more bytes may be sent. Raises Stopped."""
        with self._lock:
            begin = max(self._clock(), self._free_at)
            self._free_at = begin + count / self._rate
        if watch.stop.wait(max(0.0, begin - self._clock())):
            raise Stopped
