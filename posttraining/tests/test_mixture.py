"""Mixtures of sources that store the same things in different types: each row stays what it is in its own file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import ANSWER, QUESTION, chat_rows, overrides, write_rows
from test_mistakes import error_of
from test_prefer import pairs

from posttraining import sft
from posttraining.datasets import DataSettings, SourceSettings, load_data
from posttraining.errors import Mistake
from posttraining.model_folder import load_tokenizer
from posttraining.rendering import render

USER = {"role": "user", "content": QUESTION}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"x": 2}}}]}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"x": {"type": "number"}}}}
CHATS: list[dict[str, Any]] = [
    {"messages": [USER, {"role": "assistant", "content": "5", "reasoning_content": "2+3=5"}]},
    {"messages": [USER, {"role": "assistant", "content": ANSWER}], "chat_template_kwargs": {"enable_thinking": False}},
    {"messages": [USER, CALL, {"role": "tool", "content": "5"}], "tools": [ADD]},
    {
        "messages": [USER, {"role": "assistant", "content": "5"}],
        "chat_template_kwargs": {"enable_thinking": None, "custom_instructions": "Be brief."},
        "tools": [],
    },
]


def sources(tmp_path: Path, rows: list[Any]) -> list[dict[str, str]]:
    """A source for each of `rows`."""
    return [{"path": str(write_rows(tmp_path / f"{number}.jsonl", [row]))} for number, row in enumerate(rows)]


def mixed(tmp_path: Path, kind: Any, rows: list[Any]) -> list[dict[str, Any]]:
    paths = [SourceSettings(path=source["path"]) for source in sources(tmp_path, rows)]
    return list(load_data(DataSettings(sources=paths), kind, "a.yaml"))


def test_thoughts_tools_and_template_arguments_are_rendered_as_in_their_own_files(taught: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(taught)
    expected = {tokenizer.decode(render(tokenizer, row).token_ids) for row in CHATS}
    found = [tokenizer.decode(render(tokenizer, row).token_ids) for row in mixed(tmp_path, "chats", CHATS)]
    assert set(found) == expected and len(found) == len(expected) == 4


def test_a_mixture_of_thoughts_and_plain_chats_trains(base: Path, tmp_path: Path) -> None:
    data = {"sources": [*sources(tmp_path, CHATS), {"path": str(write_rows(tmp_path / "more.jsonl", chat_rows(4)))}]}
    keys = {"model": str(base), "output_dir": str(tmp_path / "out"), "data": data, "early_at": None}
    sft.run("tiny", overrides(keys))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_answers_as_numbers_and_as_text_become_text(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": "x"}, {"prompt": "c", "answer": None}]
    assert {row["prompt"]: row["answer"] for row in mixed(tmp_path, "prompts", rows)} == {"a": "1", "b": "x", "c": None}


@pytest.mark.parametrize(
    ("kind", "rows", "said"),
    [
        (
            "prompts",
            [{"prompt": [USER]}, {"prompt": "a"}],
            "data.sources.1: its 'prompt' holds text, that of data.sources.0 lists of mappings; expected one form",
        ),
        (
            "prompts",
            [{"prompt": "a", "answer": "1"}, {"prompt": "b"}, {"prompt": "c", "answer": 0.5}],
            "data.sources.2: its 'answer' holds numbers, that of data.sources.0 text; expected one form",
        ),
        (
            "chats",
            [{**CHATS[2], "tools": [["add"]]}, CHATS[2]],
            "data.sources.1: its 'tools' holds lists of mappings, that of data.sources.0 List(List(Value('string')))",
        ),
    ],
)
def test_a_column_that_stays_of_two_forms_names_its_source(
    kind: Any, rows: list[Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(Mistake) as refused:
        mixed(tmp_path, kind, rows)
    assert str(refused.value).startswith("a.yaml: " + said)


def test_a_source_whose_rows_lack_the_column_is_refused_and_not_dropped(tmp_path: Path) -> None:
    other = {"conversations": CHATS[0]["messages"], "id": 1}
    for rows, number in (([CHATS[0], other], 1), ([other], 0)):
        with pytest.raises(Mistake) as refused:
            mixed(tmp_path, "chats", rows)
        said = f"a.yaml: data.sources.{number}: its rows have no 'messages' (they have conversations, id)"
        assert str(refused.value) == said


def test_a_share_of_no_row_is_refused(tmp_path: Path) -> None:
    paths = [str(write_rows(tmp_path / name, chat_rows(20))) for name in ("a.jsonl", "b.jsonl")]
    sources = [SourceSettings(path=paths[0]), SourceSettings(path=paths[1], weight=0.01)]
    with pytest.raises(Mistake, match=r"a.yaml: data.sources.1.weight: 0.01: keeps none of the source's 20 rows"):
        load_data(DataSettings(sources=sources), "chats", "a.yaml")
    sources[1].weight = 0.05
    assert len(load_data(DataSettings(sources=sources), "chats", "a.yaml")) == 21


def test_a_mixture_that_does_not_fit_is_one_line(
    taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_text = {"prompt": QUESTION, "chosen": "5", "rejected": "6"}
    keys = {"model": str(taught), "output_dir": str(tmp_path / "out"), "eval_strategy": "no", "eval_on_start": False}
    error = error_of("prefer", {**keys, "data": {"sources": sources(tmp_path, [pairs(1)[0], as_text])}}, capsys)
    assert "data.sources.1: its 'chosen' holds text" in error
