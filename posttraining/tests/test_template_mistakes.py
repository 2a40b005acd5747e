"""What a chat template raises is one line with the row, in every stage that renders conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import QUESTION, write_rows
from test_grpo import config
from test_mistakes import error_of
from tiny_model import write_chat

from posttraining import grpo, rendering
from posttraining.errors import Mistake
from posttraining.generation import generate
from posttraining.model_folder import load_model, load_tokenizer
from posttraining.pair_turns import pair_turns

USER = {"role": "user", "content": QUESTION}
REPLY = {"role": "assistant", "content": "5"}
SYSTEM = {"role": "system", "content": "Be brief."}
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
RAISED = {
    REFUSES: "TemplateError: System role not supported",
    "{% if messages[0].role == 'system' %}{{ messages[9].content }}{% endif %}": "UndefinedError: ",
    "{% if messages[0].role == 'system' %}{{ 'a' + 1 }}{% endif %}": "TypeError: can only concatenate",
}


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    return write_chat(tmp_path / "chat")


def prepend(chat: Path, text: str) -> None:
    template = chat / "chat_template.jinja"
    template.write_text(text + template.read_text())


@pytest.mark.parametrize(("text", "said"), RAISED.items())
@pytest.mark.parametrize("command", ["sft", "preview", "pairs"])
def test_what_a_template_raises_names_the_row(
    command: str, text: str, said: str, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepend(chat, text)
    turns = [[USER], [SYSTEM, USER]]
    rows = [{"prompt": prompt} if command == "pairs" else {"messages": [*prompt, REPLY]} for prompt in turns]
    file = str(write_rows(tmp_path / "rows.jsonl", rows))
    keys: dict[str, Any] = {"model": str(chat), "output_dir": str(tmp_path / "out"), "data": {"path": file}}
    if command == "pairs":
        keys |= {"weak_model": str(chat), "held_out_prompts": 0}
    error = error_of(command, keys, capsys)
    assert f": row 1: the chat template cannot render it ({said}" in error
    assert not (tmp_path / "out").exists()


def test_grpo_names_the_row_and_a_model_without_a_known_context_is_no_exception(chat: Path, tmp_path: Path) -> None:
    prepend(chat, REFUSES)
    settings = chat / "config.json"
    settings.write_text(settings.read_text().replace("max_position_embeddings", "positions"))
    rows = str(write_rows(tmp_path / "rows.jsonl", [{"prompt": [SYSTEM, USER], "answer": "5"}]))
    with pytest.raises(Mistake, match=r"data: row 0: the chat template cannot render it \(TemplateError: System role"):
        grpo.run(config(tmp_path, chat, data={"path": rows}))


def test_a_template_that_is_none_is_one_line(chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepend(chat, "{% if %}")
    file = str(write_rows(tmp_path / "rows.jsonl", [{"messages": [USER, REPLY]}]))
    keys = {"model": str(chat), "output_dir": str(tmp_path / "out"), "data": {"path": file}}
    assert "row 0: the chat template cannot render it (TemplateSyntaxError: " in error_of("preview", keys, capsys)


def test_arguments_of_the_template_that_are_the_tokenizers_are_one_line(
    chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"messages": [USER, REPLY], "chat_template_kwargs": {"tools": []}}
    file = str(write_rows(tmp_path / "rows.jsonl", [row]))
    keys = {"model": str(chat), "output_dir": str(tmp_path / "out"), "data": {"path": file}}
    for command in ("sft", "preview"):
        error = error_of(command, keys, capsys)
        assert "row 0: the chat template cannot render it (TypeError: " in error and "'tools'" in error


@pytest.mark.parametrize("command", ["sft", "prefer"])
def test_a_row_that_only_the_trainer_renders_is_one_line_too(
    command: str, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "SAMPLE", 1)
    prepend(chat, REFUSES)
    rows = [{"messages": [*prompt, REPLY]} for prompt in ([USER], [SYSTEM, USER])]
    if command == "prefer":
        rows = [pair_turns({"chosen": row["messages"], "rejected": [*row["messages"][:-1], USER]}) for row in rows]
    file = str(write_rows(tmp_path / "rows.jsonl", rows))
    keys = {"model": str(chat), "output_dir": str(tmp_path / "out"), "data": {"path": file}}
    error = error_of(command, {**keys, "eval_strategy": "no", "eval_on_start": False}, capsys)
    assert "chat: data: the chat template cannot render it (TemplateError: System role not supported)" in error


def test_a_prompt_that_nobody_looked_at_before_is_one_line_too(chat: Path) -> None:
    prepend(chat, REFUSES)
    with pytest.raises(Mistake, match="the chat template cannot render it"):
        generate(load_model(chat), load_tokenizer(chat), [[SYSTEM, USER]], max_new_tokens=1, temperature=0, seed=0)
