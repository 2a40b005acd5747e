"""Whether the rows of a data set hold what a stage reads, checked before anything is computed from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttraining.errors import NO_VALUE, mistake
from posttraining.pair_turns import pair_turns

ROLES = ("system", "user", "assistant", "tool")


def check_rows(data: Any, kind: str, file: str | Path | None, key: str) -> None:
    """Raise Mistake at the first row whose contents are not those of `kind` (chats, prompts or pairs).

    `key` is the config's, for the message `file: key: row N: column: …`.
    """
    for number, row in enumerate(data):
        where = f"{key}: row {number}"
        if kind == "chats":
            _check_messages(row["messages"], file, f"{where}: messages")
            if not any(turn["role"] == "assistant" for turn in row["messages"]):
                raise mistake(file, f"{where}: messages", NO_VALUE, "expected an assistant's turn, from which to learn")
        elif kind == "prompts":
            _check_text_or_messages(row["prompt"], file, f"{where}: prompt")
        else:
            _check_pair(row, file, where)
        _check_optional(row, file, where)
    if kind == "pairs" and all(row["chosen"] == row["rejected"] for row in data):
        raise mistake(file, key, NO_VALUE, "chosen and rejected are equal in all rows; there is nothing to prefer")


def _check_pair(row: Mapping[str, Any], file: str | Path | None, where: str) -> None:
    for name in ("chosen", "rejected"):
        _check_text_or_messages(row[name], file, f"{where}: {name}")
    if isinstance(row["chosen"], str) != isinstance(row["rejected"], str):
        raise mistake(file, where, NO_VALUE, "expected chosen and rejected in one form, both text or both messages")
    given = row.get("prompt") or None
    if given is not None:
        _check_text_or_messages(given, file, f"{where}: prompt")
    prompt = pair_turns(row)["prompt"]
    if prompt != given and all(turn["role"] == "system" for turn in prompt):
        expected = "expected a prompt, or chosen and rejected as messages that begin with the same user's turn"
        raise mistake(file, where, NO_VALUE, expected)


def _check_text_or_messages(value: Any, file: str | Path | None, key: str) -> None:
    if not isinstance(value, str | list):
        raise mistake(file, key, value, "expected text, or a list of {role, content}")
    if isinstance(value, list):
        _check_messages(value, file, key)


def _check_messages(value: Any, file: str | Path | None, key: str) -> None:
    if not isinstance(value, list):
        raise mistake(file, key, value, "expected a list of {role, content}")
    for turn in value:
        if not isinstance(turn, Mapping) or "role" not in turn or not {"content", "tool_calls"} & set(turn):
            raise mistake(file, key, turn, "expected {role, content}")
        if turn["role"] not in ROLES:
            raise mistake(file, f"{key}: role", turn["role"], f"expected one of {', '.join(ROLES)}")
        content = turn.get("content")
        calls = turn.get("tool_calls")
        if not isinstance(content, str) and not (content is None and calls and turn["role"] == "assistant"):
            raise mistake(file, f"{key}: content", content, "expected text")
        if calls is not None and not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
            raise mistake(file, f"{key}: tool_calls", calls, "expected a list of calls")


def _check_optional(row: Mapping[str, Any], file: str | Path | None, where: str) -> None:
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list) and not _is_json_list(tools):
        raise mistake(file, f"{where}: tools", tools, "expected a list of tools")
    template = row.get("chat_template_kwargs")
    if template is not None and not isinstance(template, Mapping):
        raise mistake(file, f"{where}: chat_template_kwargs", template, "expected a mapping, {enable_thinking: false}")
    answer = row.get("answer")
    # A column of whole numbers and fractions comes as fractions, so 1 would be the text 1.0.
    if answer is not None and (isinstance(answer, bool) or not isinstance(answer, str | int)):
        raise mistake(file, f"{where}: answer", answer, "expected text or a whole number")


def _is_json_list(value: Any) -> bool:
    """Whether a value is a list written as JSON, which the trainer reads too."""
    try:
        return isinstance(value, str) and isinstance(json.loads(value), list)
    except ValueError:
        return False
