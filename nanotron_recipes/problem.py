"""What a check of a recipe yields."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Problem:
    """A key whose value does not fit the others, and what would."""

    key: str
    value: Any
    expected: str
    nearest: str | None = None
    """A name that was probably meant."""


def server_problems(key: str, url: str | None) -> Iterator[Problem]:
    """What is wrong with an endpoint. What may be a secret is not shown."""
    if url is None or "${" in url:
        return
    if re.match(r"[^/]*//[^/]*@|[^?#]*[?#]", url):
        expected = "expected no user, query or fragment in it: credentials are those of AWS's own configuration"
        yield Problem(key, "(hidden)", expected)
    elif not re.fullmatch(r"https?://[^/\s]+(/\S*)?", url) or not _has_port(url):
        yield Problem(key, url, "expected http:// or https://, a server, and perhaps a port up to 65535")


def _has_port(url: str) -> bool:
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False
