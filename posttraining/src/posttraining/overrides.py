"""`--set key.sub=value`: changes to a config's mapping, and which messages are about them."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from posttraining.errors import NO_VALUE, Mistake, mistake
from posttraining.yaml_text import MAX_DEPTH, parse_yaml

SOURCE = "--set"


def apply_override(mapping: dict[str, Any], override: str) -> None:
    """Change `mapping` as `key.sub=value` says: the value is YAML, a number in the key chooses of a list, its length
    adds to it; sections that are absent or null are made. Raises Mistake."""
    key, equals, text = override.partition("=")
    key = key.strip()
    *path, last = key.split(".")
    if not equals or not all((*path, last)):
        raise mistake(SOURCE, None, override, "expected key=value")
    if len(path) >= MAX_DEPTH:
        raise mistake(SOURCE, None, override, f"expected at most {MAX_DEPTH} levels")
    value = parse_yaml(text, f"{SOURCE}: {key}: the value")
    place: Any = mapping
    for position, part in enumerate(path):
        if isinstance(place, list):
            place = place[_index(place, part, key, len(place))]
        else:
            if place.get(part) is None:
                place[part] = {}
            place = place[part]
        if not isinstance(place, dict | list):
            raise mistake(SOURCE, key, NO_VALUE, f"{'.'.join(path[: position + 1])} is not a section")
    if isinstance(place, list):
        index = _index(place, last, key, len(place) + 1)
        place[index : index + 1] = [value]
    else:
        place[last] = value


def blame(
    error: Mistake,
    config: str,
    file: Path,
    overrides: Sequence[str],
    keys: Collection[str] = (),
    source: str = SOURCE,
) -> Mistake:
    """`error` with the place that the user has to mend in front: --set where it is about a key that one of `overrides`
    gives, else `file`. It is about a key where its message begins with the config's name (the path, or `config`, the
    command's word for it) or with one of `keys`, those of the config. `source`: in place of --set."""
    message = str(error)
    for name in (str(file), config):
        if message.startswith(f"{name}: "):
            message = message.removeprefix(f"{name}: ")
            break
    else:
        if re.split("[.:]", message)[0] not in keys:
            return error
    key = message.partition(": ")[0]
    given = [override.partition("=")[0].strip() for override in overrides]
    from_set = any(key == one or key.startswith(f"{one}.") for one in given)
    return Mistake(f"{source if from_set else file}: {message}")


def _index(entries: list[Any], part: str, key: str, limit: int) -> int:
    if part not in map(str, range(limit)):
        expected = f"expected an index from 0 to {limit - 1}" if limit else "the list is empty"
        raise mistake(SOURCE, key, part, expected)
    return int(part)
