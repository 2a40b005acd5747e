"""The one exception that means "the user can mend this"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a recipe, a path or an argument; the command line prints its one line and exits with 2."""

    key: str | None = None
    """The recipe's key that the message is about, where it is about one."""


def user_error(
    expected: str, *, source: str | None = None, key: str | None = None, value: object = "", nearest: str | None = None
) -> UserError:
    """Build `source: key: value: expected; did you mean nearest?` from the parts that are known ("" is no value)."""
    parts = [part for part in (source, key) if part]
    if value != "":
        parts.append(show_value(value))
    message = ": ".join([*parts, expected])
    error = UserError(f"{message}; did you mean {nearest}?" if nearest else message)
    error.key = key
    return error


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """Return the one of `names` that `name` is most likely a misspelling of, if any is close."""
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return matches[0] if matches else None


def show_value(value: object, limit: int = 60) -> str:
    """Return a value on one line as YAML has it (null, true, 'text'), cut to `limit` characters."""
    match value:
        case None:
            text = "null"
        case bool():
            text = str(value).lower()
        case _:
            text = repr(value)
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
