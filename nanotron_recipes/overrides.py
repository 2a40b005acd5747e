"""`--set key.sub=value`: changes to the raw mapping, before it is validated."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from nanotron_recipes.errors import shorten, show_value, user_error, visible
from nanotron_recipes.yaml_text import MAX_DEPTH, parse_yaml

SOURCE = "--set"


def apply_overrides(mapping: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return a copy of `mapping` with each `key.sub=value` (value in YAML, numbers index lists), and the keys set.

    Sections that are absent or null are made; the entry after a list's last is appended. Raises UserError.
    """
    result = copy.deepcopy(mapping)
    keys = []
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            raise user_error("expected key.sub=value", source=shown_override(override))
        if key.count(".") >= MAX_DEPTH:
            raise user_error(f"expected at most {MAX_DEPTH} levels", source=shown_override(override))
        # A star begins a glob: of YAML's it would be an alias, and there is nothing that it could stand for.
        _assign(result, key, text if text.startswith("*") else parse_yaml(text, shown_override(override)))
        keys.append(key)
    return result, keys


def shown_override(override: str) -> str:
    """Return `--set key.sub=value` as a message shows it."""
    return f"{SOURCE} {shorten(visible(override), 80)}"


def keep_batch(raw: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Keep the batch of a file in nanotron's manner, dp · micro_batch_size · accumulation, where an override changes dp
    or the micro-batch: a topology does not change what is learnt."""
    keys = {override.partition("=")[0].strip() for override in overrides}
    tokens, parallelism = raw.get("tokens"), raw.get("parallelism")
    if not keys & {"parallelism.dp", "tokens.micro_batch_size"} or not isinstance(tokens, dict):
        return raw, []
    if keys & {"tokens.batch_accumulation_per_replica", "tokens.global_batch_size"}:
        return raw, []
    dp = parallelism.get("dp") if isinstance(parallelism, dict) else None
    micro_batch, accumulation = tokens.get("micro_batch_size"), tokens.get("batch_accumulation_per_replica")
    if not (isinstance(dp, int) and isinstance(micro_batch, int) and isinstance(accumulation, int)):
        return raw, []
    batch = tokens.get("global_batch_size") or dp * micro_batch * accumulation
    fixed = {**tokens, "global_batch_size": batch, "batch_accumulation_per_replica": None}
    return {**raw, "tokens": fixed}, [
        f"tokens.global_batch_size: {batch}, from the file's own dp {dp} × micro_batch_size {micro_batch} × "
        f"batch_accumulation_per_replica {accumulation}; --set changes the topology, not the batch"
    ]


def _assign(mapping: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    place: Any = mapping
    for position, part in enumerate(path):
        if isinstance(place, list):
            place = place[_index(place, part, key, allow_next=False)]
        else:
            if place.get(part) is None:
                place[part] = {}
            place = place[part]
        if not isinstance(place, dict | list):
            where = ".".join(path[: position + 1])
            raise user_error(f"expected a section, not {show_value(place)}", source=SOURCE, key=f"{key} ({where})")
    if isinstance(place, list):
        index = _index(place, last, key, allow_next=True)
        place[index : index + 1] = [value]
    else:
        place[last] = value


def _index(entries: list[Any], part: str, key: str, *, allow_next: bool) -> int:
    limit = len(entries) + allow_next
    if part not in map(str, range(limit)):
        expected = f"expected an index from 0 to {limit - 1}" if limit else "the list is empty"
        raise user_error(expected, source=SOURCE, key=key, value=part)
    return int(part)
