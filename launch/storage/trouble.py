"""Whether something has failed for so long that it is worth a word."""

import time

from launch.train.streams import say

TROUBLE_SECONDS = 4.0
"""Without one success in between. A single error is not worth a word."""


class Trouble:
    """What does not work; `note` and `well` may be called from any thread.

    Args:
        over: what is said when it works again.
    """

    def __init__(self, over: str) -> None:
        self._over = over
        self._reason, self._since, self._told = "", 0.0, ""

    def note(self, reason: str) -> None:
        """It has failed."""
        if not self._reason:
            self._since = time.monotonic()
        self._reason = reason

    def well(self) -> None:
        """It has worked, or is not needed any more."""
        self._reason = ""

    def told(self) -> str:
        """What there is to say of it, empty while it is well; a change is said."""
        reason = self._reason
        if not reason and self._told:
            say(self._over)
            self._told = ""
        elif reason and not self._told and time.monotonic() - self._since >= TROUBLE_SECONDS:
            say(f"problem: {reason}")
            self._told = reason
        return self._told
