"""SIGTERM while a start of a job is being ended: Slurm sends it at the time limit, for a preemption, and where somebody
cancels the job."""

import signal
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


class _Asked(BaseException):
    """No Exception: what goes on whatever an export or a picture raises shall not go on then."""


class Termination:
    """A context in which SIGTERM is noted, and ends what `until_asked` runs."""

    def __init__(self) -> None:
        self.is_asked = False
        self._ends_something = False
        self._before: Any = None

    def __enter__(self) -> "Termination":
        self._before = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _on_signal(self, *_: object) -> None:
        self.is_asked = True
        if self._ends_something:
            raise _Asked

    def until_asked(self, function: Callable[..., Result], *arguments: object) -> Result | None:
        """What the function returns; None where the signal ends it, or came before."""
        try:
            self._ends_something = True
            return None if self.is_asked else function(*arguments)
        except _Asked:
            return None
        finally:
            self._ends_something = False

    def ends_all(self) -> None:
        """From here on the signal ends the process."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
