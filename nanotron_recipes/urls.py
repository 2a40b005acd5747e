"""What tells a URL from a path of this machine; apart from `paths`, so that workers need not import all of a recipe."""

from __future__ import annotations

import re

HUB_PREFIX = "hf://datasets/"
"""How a data set of the Hugging Face hub is named, before its owner and name."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_url(path: str) -> bool:
    """Return whether a path begins with a scheme, like s3://."""
    return _URL.match(path) is not None
