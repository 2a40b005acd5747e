"""What a run writes beside its training may fail for a while: a full disk, a server that does not answer."""

import time
from collections.abc import Callable

from launch.train.streams import describe

QUIET_SECONDS = 60.0
"""After an outage that was told, shorter ones are not: a disk may be full now and then."""


class Outage:
    """Says once that something fails, and once that it is well again.

    Args:
        what: a path or a name.
        meanwhile: what happens as long as it fails.
        afterwards: what can be said of it then.
        say: takes a line.
    """

    def __init__(
        self,
        what: str,
        meanwhile: str,
        afterwards: str,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what = what
        self._meanwhile = meanwhile
        self._afterwards = afterwards
        self._say = say
        self._clock = clock
        self._is_said = False
        self._quiet_until = clock()

    def failed(self, error: Exception) -> None:
        """Note that it failed."""
        if not self._is_said and self._clock() >= self._quiet_until:
            self._is_said = True
            self._say(f"{self._what}: {reason(error)}; {self._meanwhile}")

    def succeeded(self) -> None:
        """Note that it went well."""
        if self._is_said:
            self._is_said = False
            self._quiet_until = self._clock() + QUIET_SECONDS
            self._say(f"{self._what}: {self._afterwards}")


def reason(error: Exception) -> str:
    """What an exception says, in one line, without the file that it names."""
    return error.strerror if isinstance(error, OSError) and error.strerror else describe(error)
