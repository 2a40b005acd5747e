"""A conversation as the model sees it, and what of it the model does not see.

A processing step that drops system prompts shows in no evaluation (SmolLM3's first SFT had lost them all).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttraining.chat import END_OF_THINK, THINK, apply_template, marks_what_is_learnt, prepare_tokenizer
from posttraining.errors import mistake, shorten

MODE_FLAGS = ("/no_think", "/think")
"""What the template takes out of a system message, since it chose the mode."""

SAMPLE = 1000
"""Rows that training looks at before it starts: a step that loses something loses it everywhere."""


@dataclass(frozen=True)
class Rendered:
    """One conversation as tokens."""

    token_ids: list[int]
    learnt: list[bool]
    """Of each token, whether it is in the loss."""
    answers: list[bool]
    """Of each token, whether the template marks it as an assistant's; none is where it has no marks."""


@dataclass
class Lost:
    """What the template leaves out of the rows."""

    rows: int = 0
    """How many rows lose something."""
    first: str = ""
    """The first of it: row, turn and text."""

    def add(self, number: int, texts: Sequence[tuple[int, str]]) -> list[str]:
        """Count a row with what `lost_texts` found in it. Returns a line for each of the texts."""
        notes = [f"row {number}, turn {turn}: {shorten(text, 60)!r}" for turn, text in texts]
        self.rows += bool(notes)
        self.first = self.first or "".join(notes[:1])
        return notes


def check_rows(tokenizer: Any, data: Any, where: str, *, system_prompts: bool) -> str | None:
    """Render up to SAMPLE rows spread over `data` and say in a line what the template leaves out of them, if anything.

    Raises Mistake where the template cannot render a row and, with `system_prompts`, where a system prompt is not in
    what the model sees.
    """
    numbers, lost = range(0, len(data), -(-len(data) // SAMPLE) or 1), Lost()
    for number in numbers:
        row, place = data[number], f"{where}: row {number}"
        rendered = render(tokenizer, row, place)
        if system_prompts:
            check_system_prompt(tokenizer, row, rendered, place)
        lost.add(number, lost_texts(tokenizer, row, rendered))
    if not lost.rows:
        return None
    return f"the template leaves out text of {lost.rows:,} of {len(numbers):,} rows looked at; first: {lost.first}"


def use_template(tokenizer: Any, path: str | None) -> None:
    """Prepare a tokenizer as sft does; `path`: TRL's chat_template_path, where the recipe has one, as a file."""
    prepare_tokenizer(tokenizer)
    if path is not None:
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")


def render(tokenizer: Any, row: Mapping[str, Any], where: str | None = None, *, learn_all: bool = False) -> Rendered:
    """A row's conversation with its template arguments and tools, and the loss mask that SFT uses.

    `learn_all`: every token is learnt (assistant_only_loss: false). `where` begins the Mistake that is raised where the
    template cannot render it.
    """
    marked = marks_what_is_learnt(tokenizer)
    rendered = apply_template(
        tokenizer,
        [{key: value for key, value in turn.items() if value is not None} for turn in row["messages"]],
        row.get("chat_template_kwargs"),
        where,
        tools=json.loads(tools) if isinstance(tools := row.get("tools"), str) else tools,
        return_assistant_tokens_mask=marked,
    )
    token_ids = list(rendered["input_ids"])
    answers = [bool(value) for value in rendered["assistant_masks"]] if marked else [False] * len(token_ids)
    return Rendered(token_ids, [True] * len(token_ids) if learn_all else answers, answers)


def check_system_prompt(tokenizer: Any, row: Mapping[str, Any], rendered: Rendered, where: str) -> None:
    """Raise Mistake where the text of a system message is not in what the model sees."""
    text = "".join(tokenizer.decode(rendered.token_ids).split())
    for turn in row["messages"]:
        if turn["role"] != "system":
            continue
        wanted = turn["content"]
        for flag in MODE_FLAGS:
            wanted = wanted.replace(flag, "")
        if "".join(tokenizer.decode(tokenizer.encode(wanted, add_special_tokens=False)).split()) not in text:
            raise mistake(where, None, wanted, "this system prompt is not in what the model sees")
    # A column of its own, as some data sets have it, that the template never gets to see.
    custom = (row.get("chat_template_kwargs") or {}).get("custom_instructions")
    if custom and "".join(str(custom).split()) not in text:
        raise mistake(where, "custom_instructions", custom, "these instructions are not in what the model sees")


def lost_texts(tokenizer: Any, row: Mapping[str, Any], rendered: Rendered) -> list[tuple[int, str]]:
    """The parts of a row that are not in what the model sees, each with the number of its turn: thoughts of a row that
    is rendered without any, and whatever else a template drops. System messages are `check_system_prompt`'s."""
    runs = stretches(rendered.token_ids, rendered.answers)
    answers = [_squeezed(tokenizer.decode(ids)) for ids, answer in runs if answer]
    turns = list(enumerate(row["messages"]))
    answering = [number for number, turn in turns if turn["role"] == "assistant"]
    # An assistant's turn is one run of marked tokens; a template that marks otherwise is searched whole.
    seen = dict(zip(answering, answers, strict=True)) if len(answers) == len(answering) else {}
    whole = _squeezed(tokenizer.decode(rendered.token_ids))
    lost = []
    for number, turn in turns:
        texts = [turn.get("reasoning_content") or "", *re.split(f"{THINK}|{END_OF_THINK}", turn.get("content") or "")]
        for text in texts if turn["role"] != "system" else ():
            wanted = _squeezed(tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)))
            if wanted not in seen.get(number, whole):
                lost.append((number, text.strip()))
    return lost


def _squeezed(text: str) -> str:
    return "".join(text.split())


def stretches(token_ids: Sequence[int], marks: Sequence[bool]) -> list[tuple[list[int], bool]]:
    """Cut tokens into stretches of the same mark, of which each token has one."""
    runs: list[tuple[list[int], bool]] = []
    for token, mark in zip(token_ids, marks, strict=True):
        if not runs or runs[-1][1] != mark:
            runs.append(([], mark))
        runs[-1][0].append(token)
    return runs
