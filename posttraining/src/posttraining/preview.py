"""Samples of an sft config as the model sees them: what is learnt is marked, what the template leaves out is named, and
system prompts that do not survive are refused.

    posttraining preview tiny --samples 3

A processing step that drops system prompts shows in no evaluation (SmolLM3's first SFT had lost them all): here every
row is rendered, and a system message that is not in the text is an error.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttraining.chat import END_OF_THINK, THINK, marks_what_is_learnt, prepare_tokenizer
from posttraining.datasets import load_data
from posttraining.errors import mistake, shorten
from posttraining.model_folder import check_model_folder, load_tokenizer
from posttraining.settings import load
from posttraining.sft import STAGE, SftSettings

MODE_FLAGS = ("/no_think", "/think")
"""What the template takes out of a system message, since it chose the mode."""

_OPEN, _CLOSE = "⟦", "⟧"
"""Around what is learnt, where there are no colours."""


@dataclass(frozen=True)
class Rendered:
    """One conversation as tokens."""

    token_ids: list[int]
    learnt: list[bool]
    """Of each token, whether it is in the loss."""
    answers: list[bool]
    """Of each token, whether the template marks it as an assistant's; none is where it has no marks."""


def run(config: str, overrides: Sequence[str] = (), samples: int = 3) -> None:
    """Print `samples` rows of the config's data, what is learnt in colour or in brackets, and check all of them.

    Raises Mistake where a system prompt is not in what the model sees.
    """
    from rich.console import Console
    from rich.text import Text
    from trl import SFTConfig

    (settings, arguments), _ = load(config, STAGE, (SftSettings, SFTConfig), overrides)
    folder = check_model_folder(settings.model)
    tokenizer = load_tokenizer(folder)
    use_template(tokenizer, arguments.chat_template_path)
    data = load_data(settings.data, "chats", config)
    console, learnt, tokens, cut, lost = Console(), 0, 0, 0, Lost()
    colours = console.color_system is not None and not console.no_color
    for number, row in enumerate(data):
        rendered = render(tokenizer, row, learn_all=not arguments.assistant_only_loss)
        if settings.system_prompts:
            check_system_prompt(tokenizer, row, rendered, f"{config}: data: row {number}")
        learnt, tokens = learnt + sum(rendered.learnt), tokens + len(rendered.learnt)
        cut += arguments.max_length is not None and len(rendered.learnt) > arguments.max_length
        if number < samples:
            share = f"{sum(rendered.learnt):,} of {len(rendered.learnt):,} tokens are learnt"
            console.rule(f"row {number}: {share}{'' if colours else f', those in {_OPEN} {_CLOSE}'}", align="left")
            console.print(Text.assemble(*_marked(tokenizer, rendered, colours)), soft_wrap=True, highlight=False)
        lost.add(number, lost_texts(tokenizer, row, rendered), shown=number < samples)
    console.rule(align="left")
    kept = "; every system prompt is there" if settings.system_prompts else ""
    print(f"preview: {len(data):,} rows, {tokens:,} tokens, of which {learnt:,} are learnt{kept}")
    if lost.rows:
        print(f"preview: the template leaves out text of {lost.rows:,} rows, which is not learnt; first: {lost.first}")
    if cut:
        print(f"preview: {cut:,} rows are longer than max_length {arguments.max_length:,} and will be cut")
    print(f"next: {shlex.join(['posttraining', STAGE, config, *(w for word in overrides for w in ('--set', word))])}")


@dataclass
class Lost:
    """What the template leaves out of the rows."""

    rows: int = 0
    """How many rows lose something."""
    first: str = ""
    """The first of it: row, turn and text."""

    def add(self, number: int, texts: Sequence[tuple[int, str]], *, shown: bool) -> None:
        """Count a row with what `lost_texts` found in it, a note for each where the row is `shown`."""
        notes = [f"row {number}, turn {turn}: {shorten(text, 60)!r}" for turn, text in texts]
        self.rows += bool(notes)
        self.first = self.first or "".join(notes[:1])
        for note in notes if shown else ():
            print(f"note: {note} is left out by the template, and not learnt")


def use_template(tokenizer: Any, path: str | None) -> None:
    """Prepare a tokenizer as sft does; `path`: TRL's chat_template_path, where the recipe has one."""
    prepare_tokenizer(tokenizer)
    if path is not None and Path(path).is_file():
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")


def render(tokenizer: Any, row: Mapping[str, Any], *, learn_all: bool = False) -> Rendered:
    """A row's conversation with its template arguments and tools, and the loss mask that SFT uses.

    `learn_all`: every token is learnt (assistant_only_loss: false).
    """
    marked = marks_what_is_learnt(tokenizer)
    rendered = tokenizer.apply_chat_template(
        [{key: value for key, value in turn.items() if value is not None} for turn in row["messages"]],
        tools=json.loads(tools) if isinstance(tools := row.get("tools"), str) else tools,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=marked,
        **(row.get("chat_template_kwargs") or {}),
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
    runs = [_squeezed(tokenizer.decode(ids)) for ids, answer in _runs(rendered.token_ids, rendered.answers) if answer]
    turns = list(enumerate(row["messages"]))
    answering = [number for number, turn in turns if turn["role"] == "assistant"]
    # An assistant's turn is one run of marked tokens; a template that marks otherwise is searched whole.
    seen = dict(zip(answering, runs, strict=True)) if len(runs) == len(answering) else {}
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


def _marked(tokenizer: Any, rendered: Rendered, colours: bool) -> list[tuple[str, str]]:
    """Runs of masked and of learnt text with their styles; without `colours` what is learnt is in brackets."""
    parts = []
    for ids, learnt in _runs(rendered.token_ids, rendered.learnt):
        text = tokenizer.decode(ids)
        parts.append((text if colours or not learnt else _OPEN + text + _CLOSE, "bold green" if learnt else "dim"))
    return parts


def _runs(token_ids: Sequence[int], marks: Sequence[bool]) -> list[tuple[list[int], bool]]:
    """Stretches of tokens with the same mark."""
    runs: list[tuple[list[int], bool]] = []
    for token, mark in zip(token_ids, marks, strict=True):
        if not runs or runs[-1][1] != mark:
            runs.append(([], mark))
        runs[-1][0].append(token)
    return runs
