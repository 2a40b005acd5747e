"""What sources are called in tables and pictures."""

from __future__ import annotations

from collections.abc import Iterable


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Return for each name (often a path) as many of its last parts as tell it from all others."""
    parts = {name: name.rstrip("/").split("/") for name in names}
    return {name: _shortest(parts[name], [other for key, other in parts.items() if key != name]) for name in parts}


def _shortest(mine: list[str], others: list[list[str]]) -> str:
    for count in range(1, len(mine)):
        if not any(other[-count:] == mine[-count:] for other in others):
            return "/".join(mine[-count:])
    return "/".join(mine)
