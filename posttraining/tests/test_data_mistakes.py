"""What can be wrong within data: one line on stderr that names the row, exit code 2, nothing written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import QUESTION, chat_rows, write_rows
from test_mistakes import error_of
from tiny_model import write_chat

from posttraining.datasets import DataSettings, as_conversations, load_data
from posttraining.errors import Mistake

USER = {"role": "user", "content": QUESTION}
REPLY = {"role": "assistant", "content": "5"}
PAIR: dict[str, Any] = {"prompt": [USER], "chosen": [REPLY], "rejected": [{**REPLY, "content": "6"}]}


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    return write_chat(tmp_path / "chat")


def load(tmp_path: Path, kind: Any, rows: list[dict[str, Any]]) -> Any:
    return load_data(DataSettings(path=str(write_rows(tmp_path / "rows.jsonl", rows))), kind, "a.yaml")


@pytest.mark.parametrize(
    ("kind", "row", "said"),
    [
        ("chats", {"messages": "hello"}, "messages: 'hello': expected a list of {role, content}"),
        ("chats", {"messages": ["hello"]}, "messages: 'hello': expected {role, content}"),
        ("chats", {"messages": [{"from": "human", "value": "a"}]}, "expected {role, content}"),
        ("chats", {"messages": [USER, {**REPLY, "role": "robot"}]}, "messages: role: 'robot': expected one of system"),
        ("chats", {"messages": [USER, {**REPLY, "content": 5}]}, "messages: content: 5: expected text"),
        ("chats", {"messages": [USER, {**REPLY, "content": None}]}, "messages: content: null: expected text"),
        (
            "chats",
            {"messages": [{**USER, "content": None, "tool_calls": [{"a": 1}]}, REPLY]},
            "messages: content: null: expected text",
        ),
        (
            "chats",
            {"messages": [USER, {**REPLY, "tool_calls": "call"}]},
            "tool_calls: 'call': expected a list of calls",
        ),
        ("chats", {"messages": [USER, {**REPLY, "tool_calls": ["a"]}]}, "tool_calls: ['a']: expected a list of calls"),
        ("chats", {"messages": [USER]}, "messages: expected an assistant's turn"),
        ("chats", {"messages": [USER, REPLY], "tools": "add"}, "tools: 'add': expected a list"),
        (
            "chats",
            {"messages": [USER, REPLY], "chat_template_kwargs": "x"},
            "kwargs: 'x': expected a map",
        ),
        ("prompts", {"prompt": 7}, "prompt: 7: expected text, or a list"),
        ("prompts", {"prompt": "a", "answer": 0.5}, "answer: 0.5: expected text or a whole number"),
        ("pairs", {**PAIR, "rejected": "6"}, "expected chosen and rejected in one form"),
        ("pairs", {**PAIR, "prompt": 3}, "prompt: 3: expected text, or a list"),
    ],
)
def test_a_row_with_something_else_in_it_is_named(kind: Any, row: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(Mistake) as refused:
        load(tmp_path, kind, [row])
    assert str(refused.value).startswith("a.yaml: data.path: row 0: ")
    assert said in str(refused.value)


def test_the_row_that_is_wrong_is_counted_from_the_first(tmp_path: Path) -> None:
    with pytest.raises(Mistake, match=r"data\.path: row 2: messages: expected an assistant's turn"):
        load(tmp_path, "chats", [*chat_rows(2), {"messages": [USER]}])


def test_pairs_that_never_differ_are_refused_and_one_equal_pair_is_not(tmp_path: Path) -> None:
    equal = {**PAIR, "rejected": PAIR["chosen"]}
    with pytest.raises(Mistake, match=r"a.yaml: data.path: chosen and rejected are equal in all rows"):
        load(tmp_path, "pairs", [equal, equal])
    assert len(load(tmp_path, "pairs", [equal, PAIR])) == 2


def test_a_turn_of_tool_calls_needs_no_content(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
    assert len(load(tmp_path, "chats", [{"messages": [USER, call]}])) == 1


def test_whole_numbers_are_answers_and_a_row_may_have_none(tmp_path: Path) -> None:
    data = load(tmp_path, "prompts", [{"prompt": "a", "answer": 5}, {"prompt": "b", "answer": None}])
    assert list(data["answer"]) == ["5", None]


def test_prompts_that_are_text_become_conversations_row_by_row(tmp_path: Path) -> None:
    expected = [[{"role": "user", "content": text}] for text in "abc"]
    for prompts in ("abc", ["a", *expected[1:]], [expected[0], "b", expected[2]]):
        data = as_conversations(load(tmp_path, "prompts", [{"prompt": prompt, "answer": "1"} for prompt in prompts]))
        assert list(data["prompt"]) == expected and list(data["answer"]) == ["1"] * 3


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_bytes_that_are_no_utf_8_are_one_line(
    name: str, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = json.dumps({"messages": [USER, {**REPLY, "content": "Grüße"}]}, ensure_ascii=False)
    (tmp_path / name).write_bytes(f"messages\n{text}\n".encode("latin-1") if "csv" in name else text.encode("latin-1"))
    keys = {"model": str(chat), "output_dir": str(tmp_path / "out"), "data": {"path": str(tmp_path / name)}}
    assert "cannot be read" in error_of("sft", keys, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_half_a_file_is_one_line(name: str, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_text(json.dumps(chat_rows(1)[0]) + '\n{"messages": [{"role"')
    keys = {"model": str(chat), "output_dir": str(tmp_path / "out"), "data": {"path": str(tmp_path / name)}}
    assert "cannot be read" in error_of("sft", keys, capsys)


def test_a_folder_and_another_ending_are_not_sought_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("a")
    with pytest.raises(Mistake, match=r"data.path: .*: is a folder; expected a file that ends in one of .jsonl"):
        load_data(DataSettings(path=str(tmp_path)), "chats", "a.yaml")
    with pytest.raises(Mistake, match=r"rows.txt': expected a file that ends in one of .jsonl"):
        load_data(DataSettings(path=str(tmp_path / "rows.txt")), "chats", "a.yaml")
