"""Whether prompts leave room for an answer in a model's context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttraining.chat import apply_template, require_template
from posttraining.errors import NO_VALUE, mistake
from posttraining.model_folder import read_config


def check_prompts(
    folder: Path,
    tokenizer: Any,
    prompts: Sequence[Any],
    max_new_tokens: int,
    where: str,
    template: Mapping[str, Any] | None = None,
) -> None:
    """Raise Mistake where prompts, text or conversations, and `max_new_tokens` are more than the model's context, and
    where there is no chat template for conversations, or one that cannot render them.

    `template`: further arguments of the chat template. `where` begins the message, which counts the rows.
    """
    if not all(isinstance(prompt, str) for prompt in prompts):
        require_template(tokenizer, folder)
    lengths = [_length(tokenizer, prompt, template, f"{where}: row {number}") for number, prompt in enumerate(prompts)]
    context = read_config(folder).get("max_position_embeddings")
    if not isinstance(context, int):
        return
    long = [number for number, length in enumerate(lengths) if length + max_new_tokens > context]
    if long:
        found = f"{len(long)} of {len(prompts)} prompts (the first is row {long[0]}, with {lengths[long[0]]} tokens)"
        room = f"leave no room for {max_new_tokens} tokens of answer in {context}, the context of {folder}"
        raise mistake(where, None, NO_VALUE, f"{found} {room}")


def _length(tokenizer: Any, prompt: Any, template: Mapping[str, Any] | None, where: str) -> int:
    if isinstance(prompt, str):
        return len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    return len(apply_template(tokenizer, prompt, template, where, add_generation_prompt=True)["input_ids"])
