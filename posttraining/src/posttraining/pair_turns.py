"""The rows of pairs as conversations, whatever of them is text, and where the tokens of their answers end."""

from __future__ import annotations

from collections.abc import Collection, Mapping
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


def to_end_of_turn(
    row: Mapping[str, list[int]], tokenizer: Any, ends: Collection[int], columns: tuple[str, ...]
) -> dict[str, list[int]]:
    """The tokens in `columns` to the last of the tokens `ends`: a template may go on with a line break, which no model
    is taught to write. They stay as they are where none of `ends` is in them, and where more than space follows it."""
    cut = {}
    for column in columns:
        tokens = row[column]
        length = next((place for place in range(len(tokens), 0, -1) if tokens[place - 1] in ends), len(tokens))
        cut[column] = tokens if tokenizer.decode(tokens[length:]).strip() else tokens[:length]
    return cut
