"""Exceptions that end a command with one line: what the user can mend, and what went wrong."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from pathlib import Path

NO_VALUE = object()
"""For `mistake`: the message is not about a value."""

_LONGEST_VALUE = 80

_NO_ROOM = (
    "No space left on device",
    "Disk quota exceeded",
    "PytorchStreamWriter failed writing file",
    "unexpected pos ",
)
"""What safetensors and torch, which raise no OSError, say of a full disk."""


class Mistake(ValueError):
    """A mistake in a config, a folder or an argument; the command line prints its one line and exits with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class StageFailed(RuntimeError):
    """A stage went wrong and its log says why; the command line prints one line and exits with `exit_code`."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code


def mistake(
    file: str | Path | None, key: str | None, value: object, expected: str, nearest: str | None = None
) -> Mistake:
    """Build `file: key: value: expected; did you mean nearest?` from the parts that are known (None: left out).

    `value` is `NO_VALUE` where the message is not about one (None is a value: null).
    """
    parts = [str(part) for part in (file, key) if part is not None]
    if value is not NO_VALUE:
        parts.append(_shown(value))
    message = ": ".join([*parts, expected])
    return Mistake(f"{message}; did you mean {nearest}?" if nearest else message)


def is_full_disk(error: BaseException) -> bool:
    """Whether `error`, or what it was raised from, says that there is no room left to write to."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    before = error.__cause__ or error.__context__
    return any(text in str(error) for text in _NO_ROOM) or (before is not None and is_full_disk(before))


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """Return the one of `names` that `name` is most likely a misspelling of, if any is close."""
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return matches[0] if matches else None


def _shown(value: object) -> str:
    """The value on one line as YAML has it (null, true, 'text'), cut where it is long."""
    match value:
        case None:
            text = "null"
        case bool():
            text = str(value).lower()
        case _:
            text = repr(value)
    return shorten(text, _LONGEST_VALUE)


def shorten(text: str, longest: int) -> str:
    """`text`, cut to `longest` characters."""
    return text if len(text) <= longest else text[: longest - 1] + "…"
