"""The one exception that means "the user can mend this"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a recipe, a path or an argument; the command line prints its one line and exits with 2."""


def user_error(
    expected: str,
    *,
    source: str | None = None,
    key: str | None = None,
    value: object = None,
    nearest: str | None = None,
) -> UserError:
    """Build `source: key: value: expected; did you mean nearest?` from the parts that are known."""
    parts = [part for part in (source, key) if part]
    if value is not None:
        parts.append(shorten(value))
    message = ": ".join([*parts, expected])
    return UserError(f"{message}; did you mean {nearest}?" if nearest else message)


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """Return the one of `names` that `name` is most likely a misspelling of, if any is close."""
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return matches[0] if matches else None


def shorten(value: object, limit: int = 60) -> str:
    """Return `repr(value)` on one line, cut to `limit` characters."""
    text = repr(value).replace("\n", " ")
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
