"""The one exception that means "the user can mend this"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

NO_VALUE = object()
"""For `user_error`: the message is not about a value."""

_LONGEST_KEY = 120
_LONGEST_SOURCE = 300


class UserError(ValueError):
    """A mistake in a recipe, a path or an argument; the command line prints its one line and exits with 2."""

    key: str | None = None
    """The recipe's key that the message is about, where it is about one."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def user_error(
    expected: str,
    *,
    source: str | None = None,
    key: str | None = None,
    value: object = NO_VALUE,
    nearest: str | None = None,
) -> UserError:
    """Build `source: key: value: expected; did you mean nearest?` from the parts that are known."""
    limited = ((source, _LONGEST_SOURCE), (key, _LONGEST_KEY))
    parts = [shorten(visible(part), limit) for part, limit in limited if part]
    if value is not NO_VALUE:
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
    return shorten(" ".join(text.split()), limit)


def one_line(text: str) -> str:
    """Return the text with its lines joined by spaces, and what a terminal would act on instead of showing escaped."""
    return visible(" ".join(filter(None, map(str.strip, text.splitlines()))))


def visible(text: str) -> str:
    r"""Return the text with its line ends and control characters as Python writes them: \n, \x1b."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def shorten(text: str, limit: int) -> str:
    """Return the text cut to `limit` characters, the last of which then is an ellipsis."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
