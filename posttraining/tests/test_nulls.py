"""Tool calls and tools from Parquet, where Arrow gives every mapping the keys of all: a row has its own alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import QUESTION, write_rows
from datasets import Dataset
from trl import SFTConfig

from posttraining import sft
from posttraining.datasets import DataSettings, SourceSettings, load_data, load_held_out
from posttraining.model_folder import load_tokenizer
from posttraining.rendering import render, use_template
from posttraining.settings import load

USER = {"role": "user", "content": QUESTION}
REPLY = {"role": "assistant", "content": "5"}


def call(name: str, **arguments: int) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": "Let me see.", "tool_calls": [{"type": "function", "function": function}]}


def tool(name: str, *parameters: str) -> dict[str, Any]:
    properties = {parameter: {"type": "number"} for parameter in parameters}
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


ROWS: list[dict[str, Any]] = [
    {
        "messages": [USER, call("add", x=2, y=3), {"role": "tool", "content": "5"}, REPLY],
        "tools": [tool("add", "x", "y")],
    },
    {"messages": [USER, call("half", n=10), REPLY], "tools": [tool("half", "n"), tool("add", "x", "y")]},
    {"messages": [USER, REPLY]},
]
PAIRS = [{"prompt": row["messages"][:1], "chosen": row["messages"][1:], "rejected": [REPLY]} for row in ROWS]


def as_json(rows: list[dict[str, Any]]) -> list[str]:
    return sorted(json.dumps(row, sort_keys=True) for row in rows)


def parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    Dataset.from_list(rows).to_parquet(path)
    return str(path)


def test_what_a_row_does_not_give_is_neither_shown_nor_learnt(base: Path, tmp_path: Path) -> None:
    files = [str(write_rows(tmp_path / "rows.jsonl", ROWS)), parquet(tmp_path / "rows.parquet", ROWS)]
    trained = []
    for file in files:
        words = [f"model={base}", f"output_dir={tmp_path / 'out'}", f"data={{path: {file}}}", "max_length=null"]
        (settings, arguments), _ = load("tiny", "sft", (sft.SftSettings, SFTConfig), words)
        data = load_data(settings.data, "chats")
        trainer, tokenizer = sft.build(settings, arguments, data)
        trained.append(list(trainer.train_dataset["input_ids"]))
        assert [render(tokenizer, row).token_ids for row in data] == trained[-1]
        assert "null" not in tokenizer.decode([token for ids in trained[-1] for token in ids])
    assert trained[0] == trained[1]


@pytest.mark.parametrize("kind", ["chats", "pairs"])
def test_rows_of_a_source_and_held_out_ones_are_those_that_were_written(kind: Any, tmp_path: Path) -> None:
    rows = ROWS if kind == "chats" else PAIRS
    path = parquet(tmp_path / "rows.parquet", rows)
    named = {"messages": "turns"} if kind == "chats" else {"chosen": "good"}
    other = parquet(tmp_path / "named.parquet", [{named.get(key, key): row[key] for key in row} for row in rows])
    more = str(write_rows(tmp_path / "more.jsonl", rows[:1]))
    mixed = DataSettings(sources=[SourceSettings(path=path), SourceSettings(path=more)])
    renamed = DataSettings(path=other, held_out_path=other, columns={new: old for old, new in named.items()})
    for data in (load_data(DataSettings(path=path), kind), load_data(renamed, kind), load_held_out(renamed, kind)):
        assert data is not None
        assert [{key: row[key] for key in row if row[key] is not None} for row in data] == rows
    found = [{key: row[key] for key in row if row[key] is not None} for row in load_data(mixed, kind)]
    assert as_json(found) == as_json([*rows, rows[0]])


def test_a_null_that_was_written_in_json_stays_an_argument(base: Path, tmp_path: Path) -> None:
    turns = [USER, {**REPLY, "tool_calls": [{"function": {"name": "half", "arguments": {"n": None}}}]}]
    data = load_data(DataSettings(path=str(write_rows(tmp_path / "rows.jsonl", [{"messages": turns}]))), "chats")
    assert data[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"n": None}
    tokenizer = load_tokenizer(base)
    use_template(tokenizer, None)
    assert '"arguments": {"n": null}' in tokenizer.decode(render(tokenizer, data[0]).token_ids)
