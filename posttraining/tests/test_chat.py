"""The chat template: what each kind of conversation looks like, and what of it is learnt, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows
from tiny_model import write_base
from trl import SFTConfig
from trl.chat_template_utils import (
    has_generation_markers,
    is_chat_template_prefix_preserving,
    is_chat_template_stop_token_trained,
    supports_tool_calling,
)

from posttraining import sft
from posttraining.chat import END_OF_TURN, prepare_tokenizer
from posttraining.datasets import load_data
from posttraining.errors import Mistake
from posttraining.model_folder import load_model, load_tokenizer
from posttraining.rendering import check_system_prompt, render
from posttraining.settings import load

USER, REPLY = {"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "<think>\n2+3\n</think>\nIt is 5."}
AGAIN, SHORT = {"role": "user", "content": "And 1+1?"}, {"role": "assistant", "content": "It is 2."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}],
}
RESULT = {"role": "tool", "name": "add", "content": "5"}
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
CALLED = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'

CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "think": ({"messages": [USER, REPLY]}, ["<think>\n2+3\n</think>\nIt is 5.<|im_end|>"]),
    "no_think": (
        {"messages": [USER, REPLY], "chat_template_kwargs": {"enable_thinking": False}},
        ["It is 5.<|im_end|>"],
    ),
    "no_think by the system message": (
        {"messages": [{"role": "system", "content": "Be kind. /no_think"}, USER, SHORT]},
        ["It is 2.<|im_end|>"],
    ),
    "system": (
        {"messages": [{"role": "system", "content": "You are a pirate."}, USER, REPLY]},
        ["<think>\n2+3\n</think>\nIt is 5.<|im_end|>"],
    ),
    "multi-turn": (
        {"messages": [USER, REPLY, AGAIN, SHORT]},
        ["<think>\n2+3\n</think>\nIt is 5.<|im_end|>", "It is 2.<|im_end|>"],
    ),
    "tools": (
        {"messages": [USER, CALL, RESULT, SHORT], "tools": [TOOL]},
        [f"{CALLED}<|im_end|>", "It is 2.<|im_end|>"],
    ),
}
"""A row, and the stretches of text that are learnt."""


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    tokenizer = load_tokenizer(base)
    prepare_tokenizer(tokenizer)
    return tokenizer


def stretches(tokenizer: Any, token_ids: list[int], learnt: list[bool]) -> list[str]:
    """The text of each run of learnt tokens, decoded token by token."""
    found: list[list[int]] = []
    for place, (token, counts) in enumerate(zip(token_ids, learnt, strict=True)):
        if counts and (place == 0 or not learnt[place - 1]):
            found.append([])
        if counts:
            found[-1].append(token)
    return [tokenizer.decode(tokens) for tokens in found]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_labels_of_the_trainer_are_the_assistants_turns(
    case: tuple[dict[str, Any], list[str]], base: Path, tmp_path: Path
) -> None:
    row, expected = case
    file = write_rows(tmp_path / "rows.jsonl", [row])
    words = [f"model={base}", f"output_dir={tmp_path / 'out'}", f"data={{path: {file}}}", "max_length=null"]
    (settings, arguments), _ = load("tiny", "sft", (sft.SftSettings, SFTConfig), words)
    trainer, tokenizer = sft.build(settings, arguments, load_data(settings.data, "chats"))
    batch = trainer.data_collator([trainer.train_dataset[0]])
    token_ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert all(label in (token, -100) for token, label in zip(token_ids, labels, strict=True))
    assert stretches(tokenizer, token_ids, [label != -100 for label in labels]) == expected


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_preview_shows_the_same_mask(case: tuple[dict[str, Any], list[str]], tokenizer: Any) -> None:
    row, expected = case
    rendered = render(tokenizer, row)
    assert stretches(tokenizer, rendered.token_ids, rendered.learnt) == expected
    check_system_prompt(tokenizer, row, rendered, "here")


def test_every_part_of_a_conversation_is_in_the_text(tokenizer: Any) -> None:
    system = {"role": "system", "content": "You are a pirate. /no_think"}
    text = tokenizer.apply_chat_template([system, USER, CALL, RESULT, SHORT], tools=[TOOL], tokenize=False)
    for part in ("You are a pirate.", "2+3?", '"description": "Adds."', CALLED, "<tool_response>\n5\n</tool_response>"):
        assert part in text
    assert "/no_think" not in text
    assert text.count(END_OF_TURN) == 5
    assert text.count("<think>\n\n</think>") == 2, "each of the assistant's turns opens with the empty thought"


def test_system_text_and_tools_that_a_data_set_gives_beside_the_messages_are_in_the_text(tokenizer: Any) -> None:
    beside = {
        "custom_instructions": "You are a pirate.",
        "xml_tools": ['{"name": "add"}'],
        "python_tools": ["def halve(n: int) -> float: ..."],
        "enable_thinking": None,
    }
    row = {"messages": [USER, REPLY], "chat_template_kwargs": beside}
    rendered = render(tokenizer, row)
    text = tokenizer.decode(rendered.token_ids)
    assert text.startswith("<|im_start|>system\nYou are a pirate.\n\nTools")
    for part in ('<tools>\n{"name": "add"}\n</tools>', "def halve(n: int) -> float: ...", "2+3\n</think>"):
        assert part in text
    check_system_prompt(tokenizer, row, rendered, "here")


def test_rows_without_template_arguments_beside_rows_with_them_are_rendered_by_default(
    base: Path, tmp_path: Path
) -> None:
    plain: dict[str, Any] = {"messages": [USER, REPLY]}
    rows = [{**plain, "chat_template_kwargs": {"enable_thinking": False}}, plain]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    words = [f"model={base}", f"output_dir={tmp_path / 'out'}", f"data={{path: {file}}}"]
    (settings, arguments), _ = load("tiny", "sft", (sft.SftSettings, SFTConfig), words)
    trainer, tokenizer = sft.build(settings, arguments, load_data(settings.data, "chats"))
    texts = [tokenizer.decode(row["input_ids"]) for row in trainer.train_dataset]
    assert ["<think>\n\n</think>" in text for text in texts] == [True, False]
    assert "<think>\n2+3\n</think>" in texts[1]


def test_a_system_prompt_that_a_template_drops_is_refused(tokenizer: Any, base: Path) -> None:
    deaf = load_tokenizer(base)
    prepare_tokenizer(deaf)
    deaf.chat_template = deaf.chat_template.replace("mode.system = messages[0].content", "mode.system = ''")
    deaf.chat_template = deaf.chat_template.replace("or custom_instructions", "")
    row = {"messages": [{"role": "system", "content": "You are a pirate."}, USER, REPLY]}
    with pytest.raises(Mistake, match=r"row 7: 'You are a pirate\.': this system prompt is not in what the model sees"):
        check_system_prompt(deaf, row, render(deaf, row), "row 7")
    lost = {"messages": [USER, REPLY], "chat_template_kwargs": {"custom_instructions": "Speak like a pirate."}}
    with pytest.raises(Mistake, match="these instructions are not in what the model sees"):
        check_system_prompt(deaf, lost, render(deaf, lost), "row 7")


@pytest.mark.parametrize("thinking", [True, False])
def test_the_prompt_of_an_answer_is_the_beginning_of_prompt_and_answer(tokenizer: Any, thinking: bool) -> None:
    for turns in ([USER], [USER, REPLY, AGAIN], [{"role": "system", "content": "S"}, USER]):
        kwargs = {"enable_thinking": thinking, "tokenize": False}
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, **kwargs)
        assert tokenizer.apply_chat_template([*turns, REPLY], **kwargs).startswith(prompt)


def test_trl_finds_the_template_fit_for_training(tokenizer: Any) -> None:
    assert has_generation_markers(tokenizer.chat_template)
    assert is_chat_template_stop_token_trained(tokenizer)
    assert is_chat_template_prefix_preserving(tokenizer)
    assert supports_tool_calling(tokenizer)


def test_a_base_without_chat_tokens_gets_them_and_rows_of_the_embedding(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base", chat_tokens=False)
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    before = len(tokenizer)
    assert prepare_tokenizer(tokenizer, model) == 5
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == before + 5
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|pad|>")
    eos = model.generation_config.eos_token_id
    assert eos == [tokenizer.eos_token_id, 0], "generation still stops at the token that ended a document"
    assert tokenizer.pad_token_id not in eos
    text = "<think>\na\n</think>\nb"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert prepare_tokenizer(tokenizer, model) == 0, "a second time nothing changes"
