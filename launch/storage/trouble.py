"""Whether a store has failed for so long that it is worth a word."""

import time

from launch.train.streams import say

TROUBLE_SECONDS = 4.0
"""Without one good answer in between. A single error is not worth a word."""


class Trouble:
    """What a store does not do; `note` and `well` may be called from any thread."""

    def __init__(self) -> None:
        self._reason, self._since, self._told = "", 0.0, ""

    def note(self, reason: str) -> None:
        """A request has failed."""
        if not self._reason:
            self._since = time.monotonic()
        self._reason = reason

    def well(self) -> None:
        """A request was answered as it should be."""
        self._reason = ""

    def told(self) -> str:
        """What there is to say of the store, empty while it is well; a change is said."""
        reason = self._reason
        if not reason and self._told:
            say("the store answers again")
            self._told = ""
        elif reason and not self._told and time.monotonic() - self._since >= TROUBLE_SECONDS:
            say(f"problem: {reason}")
            self._told = reason
        return self._told
