"""The rows of pairs as conversations, whatever of them is text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_COLUMNS = ("prompt", "chosen", "rejected")


def as_turns(value: str | list[Any], role: str) -> list[Any]:
    """A conversation as it is; text as one turn of `role`."""
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def pair_turns(row: Mapping[str, Any]) -> dict[str, list[Any]]:
    """`prompt`, `chosen` and `rejected` of a row as turns: text is what a user asks and an assistant answers.

    Without a prompt, or with one that is text beside answers that are whole conversations, which repeat it, the prompt
    is what both have in common at their beginning, and so possibly none; an answer is always left.
    """
    chosen, rejected = (as_turns(row[side], "assistant") for side in ("chosen", "rejected"))
    prompt = row.get("prompt")
    if prompt and not (isinstance(prompt, str) and chosen[0]["role"] != "assistant"):
        return {"prompt": as_turns(prompt, "user"), "chosen": chosen, "rejected": rejected}
    common, most = 0, min(len(chosen), len(rejected)) - 1
    while common < most and chosen[common] == rejected[common]:
        common += 1
    return {"prompt": chosen[:common], "chosen": chosen[common:], "rejected": rejected[common:]}


def pairs_as_conversations(data: Any) -> Any:
    """Rows of pairs with the columns that `pair_turns` makes of them; as they are where all have these already."""
    from datasets import Features, Json, List

    sides = (data[name] if name in data.column_names else () for name in _COLUMNS)
    if all(len(values) > 0 and all(isinstance(value, list) and value for value in values) for values in sides):
        return data
    types = {name: List(Json()) for name in _COLUMNS}
    return data.map(pair_turns, features=Features({**data.features, **types}))
