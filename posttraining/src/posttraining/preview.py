"""Samples of an sft config as the model sees them: what is learnt in colour, and a check that system prompts survive.

    posttraining preview tiny --samples 3

A processing step that drops system prompts shows in no evaluation (SmolLM3's first SFT had lost them all): here every
row is rendered, and a system message that is not in the text is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttraining.chat import marks_what_is_learnt, prepare_tokenizer
from posttraining.datasets import load_data
from posttraining.errors import mistake
from posttraining.model_folder import check_model_folder, load_tokenizer
from posttraining.settings import load
from posttraining.sft import STAGE, SftSettings

MODE_FLAGS = ("/no_think", "/think")
"""What the template takes out of a system message, since it chose the mode."""


@dataclass(frozen=True)
class Rendered:
    """One conversation as tokens."""

    token_ids: list[int]
    learnt: list[bool]
    """Of each token, whether it is in the loss."""


def run(config: str, overrides: Sequence[str] = (), samples: int = 3) -> None:
    """Print `samples` rows of the config's data in colour and check all of them. Raises Mistake."""
    from rich.console import Console
    from rich.text import Text
    from trl import SFTConfig

    (settings, arguments), _ = load(config, STAGE, (SftSettings, SFTConfig), overrides)
    folder = check_model_folder(settings.model)
    tokenizer = load_tokenizer(folder)
    use_template(tokenizer, arguments.chat_template_path)
    data = load_data(settings.data, "chats", config)
    console, learnt, tokens, cut = Console(), 0, 0, 0
    for number, row in enumerate(data):
        rendered = render(tokenizer, row, learn_all=not arguments.assistant_only_loss)
        if settings.system_prompts:
            check_system_prompt(tokenizer, row, rendered, f"{config}: data: row {number}")
        learnt, tokens = learnt + sum(rendered.learnt), tokens + len(rendered.learnt)
        cut += arguments.max_length is not None and len(rendered.learnt) > arguments.max_length
        if number < samples:
            share = f"{sum(rendered.learnt)} of {len(rendered.learnt)} tokens are learnt"
            console.rule(f"row {number}: {share}", align="left")
            console.print(Text.assemble(*_coloured(tokenizer, rendered)), soft_wrap=True, highlight=False)
    console.rule(align="left")
    print(f"preview: {len(data)} rows, {tokens} tokens, of which {learnt} are learnt; every system prompt is there")
    print(f"preview: {cut} rows are longer than max_length {arguments.max_length} and will be cut")
    print(f"Next: posttraining sft {config}")


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
    mask = [True] * len(token_ids) if learn_all else [bool(value) for value in rendered["assistant_masks"]]
    return Rendered(token_ids, mask)


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


def _coloured(tokenizer: Any, rendered: Rendered) -> list[tuple[str, str]]:
    """Runs of masked and of learnt text with their styles."""
    runs: list[tuple[list[int], bool]] = []
    for token, learnt in zip(rendered.token_ids, rendered.learnt, strict=True):
        if not runs or runs[-1][1] != learnt:
            runs.append(([], learnt))
        runs[-1][0].append(token)
    return [(tokenizer.decode(ids), "bold green" if learnt else "dim") for ids, learnt in runs]
