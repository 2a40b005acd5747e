"""The chat template, and the special tokens it needs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttraining.errors import NO_VALUE, Mistake, mistake

START_OF_TURN = "<|im_start|>"
END_OF_TURN = "<|im_end|>"
THINK, END_OF_THINK = "<think>", "</think>"
PAD_TOKENS = ("<|pad|>", "<|finetune_right_pad_id|>")
"""Tokens that pad, by preference; the first is added where the tokenizer has neither."""

TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def prepare_tokenizer(tokenizer: Any, model: Any | None = None) -> int:
    """Give a base model's tokenizer what chats need: turn and thought tokens, the template, an end-of-turn eos, a pad.

    Tokens it has keep their ids, others are added; `model`'s embeddings then grow to hold them, and its configs name
    the same eos and pad. A template with generation marks is kept. Returns how many tokens were added.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in (START_OF_TURN, END_OF_TURN, THINK, END_OF_THINK) if token not in vocabulary]
    pad = next((token for token in PAD_TOKENS if token in vocabulary), PAD_TOKENS[0])
    # Thoughts are part of an answer's text, which skip_special_tokens must leave whole.
    added = tokenizer.add_tokens([token for token in missing if token in (THINK, END_OF_THINK)], special_tokens=False)
    added += tokenizer.add_tokens(
        [token for token in [*missing, pad] if token not in tokenizer.get_vocab()], special_tokens=True
    )
    tokenizer.eos_token, tokenizer.pad_token = END_OF_TURN, pad
    tokenizer.padding_side = "right"
    if not marks_what_is_learnt(tokenizer):
        tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8").rstrip("\n")
    if model is not None:
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
        name_special_tokens(model, tokenizer)
    return added


def name_special_tokens(model: Any, tokenizer: Any) -> None:
    """Make a model's two configs name the tokenizer's eos and pad; generation also stops at an eos it had before."""
    before = model.generation_config.eos_token_id
    others = [] if before is None else [before] if isinstance(before, int) else list(before)
    model.generation_config.eos_token_id = [
        tokenizer.eos_token_id,
        *(token for token in others if token not in (tokenizer.eos_token_id, tokenizer.pad_token_id)),
    ]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id


def end_tokens(config: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer: the tokenizer's eos and those of the model's generation config, but no pad."""
    named = config.eos_token_id
    others = [named] if isinstance(named, int) else named or []
    return {tokenizer.eos_token_id, *(token for token in others if token != tokenizer.pad_token_id)}


def marks_what_is_learnt(tokenizer: Any) -> bool:
    """Whether a tokenizer has a chat template with {% generation %} marks, which a loss on answers alone needs."""
    template = tokenizer.chat_template
    return isinstance(template, str) and re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def apply_template(
    tokenizer: Any, turns: Sequence[Any], template: Mapping[str, Any] | None, where: str | None, **arguments: Any
) -> Any:
    """The tokens of a conversation: a mapping with `input_ids`. `template`: what its row or the config gives the chat
    template; `arguments`: further ones of the tokenizer.

    Raises Mistake, which `where` begins, with what the template says of a conversation that it cannot render.
    """
    try:
        return tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, **arguments, **(template or {}))
    except Exception as error:  # templates raise whatever they like
        raise _not_rendered(where, error) from error


@contextmanager
def template_mistakes(where: str) -> Iterator[None]:
    """Make a Mistake, which `where` begins, of what a chat template raises while a trainer renders its rows."""
    from jinja2 import TemplateError

    try:
        yield
    except TemplateError as error:
        raise _not_rendered(where, error) from error


def _not_rendered(where: str | None, error: Exception) -> Mistake:
    return mistake(where, None, NO_VALUE, f"the chat template cannot render it ({type(error).__name__}: {error})")


def require_template(tokenizer: Any, folder: Path) -> None:
    """Raise Mistake where a tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise mistake(folder, None, NO_VALUE, "its tokenizer has no chat template; run `posttraining sft` on it first")
