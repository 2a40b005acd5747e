"""What preview says of rows: what is learnt, what the template leaves out, and the command that trains on them."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows
from trl import SFTConfig

from posttraining import preview, rendering, sft
from posttraining.chat import prepare_tokenizer
from posttraining.datasets import load_data
from posttraining.errors import Mistake
from posttraining.model_folder import load_tokenizer
from posttraining.settings import load

USER = {"role": "user", "content": "Hi"}


def reply(content: str, **more: str) -> dict[str, str]:
    return {"role": "assistant", "content": content, **more}


NO_THINK = {"enable_thinking": False}
THINK = {"enable_thinking": True}


@pytest.mark.parametrize(
    ("turns", "mode", "lost"),
    [
        ([USER, reply("<think>hm</think>Me")], NO_THINK, [(1, "hm")]),
        ([USER, reply("<think>hm</think>Me")], THINK, []),
        ([USER, reply("Me")], NO_THINK, []),
        ([USER, reply("Me", reasoning_content="hm")], NO_THINK, [(1, "hm")]),
        ([USER, reply("Me", reasoning_content="hm")], THINK, []),
        ([USER, reply("<think>b</think>Me", reasoning_content="hm")], THINK, [(1, "b")]),
        ([USER, reply("Before <think>hm</think>Me")], THINK, [(1, "Before")]),
        ([USER, reply("<think>a</think>bb<think>cc</think>dd")], THINK, [(1, "bb"), (1, "cc")]),
        # What is lost stands elsewhere in the conversation.
        ([USER, reply("<think>hm</think>Me"), USER, reply("hm")], NO_THINK, [(1, "hm")]),
        ([{"role": "system", "content": "Be kind. /no_think"}, USER, reply("<think>hm</think>Me")], {}, [(2, "hm")]),
    ],
)
def test_what_the_template_leaves_out_is_what_training_does_not_see(
    turns: list[dict[str, str]],
    mode: dict[str, Any],
    lost: list[tuple[int, str]],
    base: Path,
    tmp_path: Path,
) -> None:
    tokenizer = load_tokenizer(base)
    prepare_tokenizer(tokenizer)
    row = {"messages": turns, "chat_template_kwargs": mode}
    rendered = rendering.render(tokenizer, row)
    assert rendering.lost_texts(tokenizer, row, rendered) == lost
    file = write_rows(tmp_path / "rows.jsonl", [row])
    words = [f"model={base}", f"output_dir={tmp_path / 'out'}", f"data={{path: {file}}}"]
    (settings, arguments), _ = load("tiny", "sft", (sft.SftSettings, SFTConfig), words)
    trainer, _ = sft.build(settings, arguments, load_data(settings.data, "chats"))
    assert trainer.train_dataset[0]["input_ids"] == rendered.token_ids


def shown(words: list[str], capsys: pytest.CaptureFixture[str], samples: int = 3) -> list[str]:
    preview.run("tiny", words, samples)
    return capsys.readouterr().out.splitlines()


def test_in_a_pipe_brackets_mark_what_is_learnt_and_the_last_line_can_be_pasted(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"messages": [USER, reply("<think>hm</think>Me")], "chat_template_kwargs": NO_THINK}] * 1001
    file = write_rows(tmp_path / "my rows.jsonl", rows)
    words = [f"model={base}", "data.generated=null", f"data.path={file}"]
    command = preview.run("tiny", words, 1)
    lines = capsys.readouterr().out.splitlines()
    assert "⟦Me<|im_end|>⟧" in lines
    assert "those in ⟦ ⟧" in lines[0]
    assert "note: row 0, turn 1: 'hm' is left out by the template, and not learnt" in lines
    assert not any("row 1," in line for line in lines)
    assert any(line.startswith("preview: 1,001 rows, ") for line in lines)
    assert any(line.startswith("preview: the template leaves out text of 1,001 rows") for line in lines)
    assert not any("will be cut" in line for line in lines)
    called = ["sft", "tiny", *(word for text in words for word in ("--set", text))]
    assert shlex.split(command)[-len(called) :] == called


def test_rows_that_lose_nothing_have_no_note_and_those_that_are_cut_are_counted(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"messages": [USER, reply("<think>hm</think>Me")]}])
    words = [f"model={base}", "data.generated=null", f"data.path={file}", "max_length=8"]
    lines = shown(words, capsys)
    assert not any("left out" in line or "leaves out" in line for line in lines)
    assert "preview: 1 rows are longer than max_length 8 and will be cut" in lines


def test_on_a_terminal_what_is_learnt_is_coloured(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = write_rows(tmp_path / "rows.jsonl", [{"messages": [USER, reply("Me")]}])
    text = os.linesep.join(shown([f"model={base}", "data.generated=null", f"data.path={file}"], capsys))
    assert "\x1b[1;32mMe" in text
    assert "⟦" not in text


def training_words(base: Path, tmp_path: Path, rows: list[dict[str, Any]], *more: str) -> list[str]:
    file = write_rows(tmp_path / "rows.jsonl", rows)
    words = [f"model={base}", f"output_dir={tmp_path / 'out'}", "data.generated=null", f"data.path={file}"]
    return [*words, "data.held_out_path=null", "eval_strategy='no'", "max_steps=1", "early_at=null", *more]


def test_training_refuses_data_whose_system_prompts_its_template_drops(base: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(base)
    prepare_tokenizer(tokenizer)
    deaf = tmp_path / "deaf.jinja"
    deaf.write_text(tokenizer.chat_template.replace("mode.system = messages[0].content", "mode.system = ''"))
    rows = [{"messages": [{"role": "system", "content": "You are a pirate."}, USER, reply("Me")]}] * 4
    words = training_words(base, tmp_path, rows, f"chat_template_path={deaf}")
    with pytest.raises(Mistake, match=r"row 0: 'You are a pirate\.': this system prompt is not in what the model sees"):
        sft.run("tiny", words)
    sft.run("tiny", [*words, "system_prompts=false"])


def test_training_notes_in_a_line_what_the_template_leaves_out_of_the_rows_that_it_looks_at(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"messages": [USER, reply("<think>hm</think>Me")], "chat_template_kwargs": NO_THINK}] * 1500
    sft.run("tiny", training_words(base, tmp_path, rows))
    notes = [line for line in capsys.readouterr().out.splitlines() if "note: the template" in line]
    assert notes == [
        "sft: note: the template leaves out text of 750 of 750 rows looked at; first: row 0, turn 1: 'hm'; "
        "`posttraining preview` with the same words shows more"
    ]
