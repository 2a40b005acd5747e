"""Being asked to stop: the request is noted, and the training loop ends after the step at hand.

Imports nothing heavy, so that a process can listen before it imports torch.
"""

import signal
import time
from collections.abc import Callable
from types import FrameType

_Handler = Callable[[int, FrameType | None], object] | int | None
_REPEATED_DELIVERY_SECONDS = 0.1


class StopRequest:
    """Notes SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (a job script, before a time limit) between `__enter__` and
    `__exit__`, in the main thread.

    The flag is this process's own: ranks hear signals at different moments and agree in the loop, by a collective.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._noted_at = 0.0
        self._previous: dict[signal.Signals, _Handler] = {}

    @property
    def is_set(self) -> bool:
        """Whether this process was asked to stop."""
        return self._signal is not None

    @property
    def reason(self) -> str:
        """The signal's name, such as `SIGTERM`; empty when there was none."""
        return self._signal.name if self._signal else ""

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal; a second Ctrl-C means that the user will not wait."""
        is_again = self._signal is not None and number == signal.SIGINT
        # One Ctrl-C may arrive twice: from the terminal and through a parent that forwards it.
        if is_again and time.monotonic() - self._noted_at > _REPEATED_DELIVERY_SECONDS:
            raise KeyboardInterrupt
        if self._signal is None:
            self._signal = signal.Signals(number)
            self._noted_at = time.monotonic()
