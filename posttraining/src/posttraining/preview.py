"""Samples of an sft config as the model sees them: what is learnt is marked, what the template leaves out is named, and
system prompts that do not survive are refused.

    posttraining preview tiny --samples 3

Every row is rendered; training looks at a sample of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posttraining.datasets import load_data
from posttraining.model_folder import check_model_folder, load_tokenizer
from posttraining.next_line import same_config
from posttraining.rendering import Lost, Rendered, check_system_prompt, lost_texts, render, stretches, use_template
from posttraining.settings import load
from posttraining.sft import STAGE, SftSettings

_OPEN, _CLOSE = "⟦", "⟧"
"""Around what is learnt, where there are no colours."""


def run(config: str, overrides: Sequence[str] = (), samples: int = 3) -> str:
    """Print `samples` rows of the config's data, what is learnt in colour or in brackets, and check all of them.

    Returns what to call next. Raises Mistake where the template cannot render a row, or a system prompt is not in what
    the model sees.
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
        where = f"{config}: data: row {number}"
        rendered = render(tokenizer, row, where, learn_all=not arguments.assistant_only_loss)
        if settings.system_prompts:
            check_system_prompt(tokenizer, row, rendered, where)
        learnt, tokens = learnt + sum(rendered.learnt), tokens + len(rendered.learnt)
        cut += arguments.max_length is not None and len(rendered.learnt) > arguments.max_length
        if number < samples:
            share = f"{sum(rendered.learnt):,} of {len(rendered.learnt):,} tokens are learnt"
            console.rule(f"row {number}: {share}{'' if colours else f', those in {_OPEN} {_CLOSE}'}", align="left")
            console.print(Text.assemble(*_marked(tokenizer, rendered, colours)), soft_wrap=True, highlight=False)
        notes = lost.add(number, lost_texts(tokenizer, row, rendered))
        for note in notes if number < samples else ():
            print(f"note: {note} is left out by the template, and not learnt")
    console.rule(align="left")
    kept = "; every system prompt is there" if settings.system_prompts else ""
    print(f"preview: {len(data):,} rows, {tokens:,} tokens, of which {learnt:,} are learnt{kept}")
    if lost.rows:
        print(f"preview: the template leaves out text of {lost.rows:,} rows, which is not learnt; first: {lost.first}")
    if cut:
        print(f"preview: {cut:,} rows are longer than max_length {arguments.max_length:,} and will be cut")
    return same_config(STAGE, config, overrides)


def _marked(tokenizer: Any, rendered: Rendered, colours: bool) -> list[tuple[str, str]]:
    """Runs of masked and of learnt text with their styles; without `colours` what is learnt is in brackets."""
    parts = []
    for ids, learnt in stretches(rendered.token_ids, rendered.learnt):
        text = tokenizer.decode(ids)
        parts.append((text if colours or not learnt else _OPEN + text + _CLOSE, "bold green" if learnt else "dim"))
    return parts
