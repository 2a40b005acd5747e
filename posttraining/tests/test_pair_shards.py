"""Shards of `pairs` that end at the same time: one writes the pairs, and all end well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import overrides, write_rows
from tiny_model import write_chat

from posttraining.generation import Answer, Generator
from posttraining.pairs import stage


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model says another word at each call."""
    said: list[int] = []

    def answer(_: Generator, prompts: list[Any], **__: Any) -> list[Answer]:
        said.append(len(said))
        return [Answer(f"word {said[-1]}", 4, stopped=True) for _ in prompts]

    monkeypatch.setattr(Generator, "__call__", answer)


@pytest.mark.usefixtures("answered")
@pytest.mark.parametrize("place", ["is_complete", "read_answers", "data_fingerprint", "publish"])
def test_the_slower_of_two_shards_that_write_at_once_ends_well(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(write_chat(tmp_path / "chat"))
    prompts = [{"prompt": f"{number}?", "answer": "1"} for number in range(4)]
    keys: dict[str, Any] = {
        "model": model,
        "weak_model": model,
        "output_dir": str(tmp_path / "pairs"),
        "data": {"path": str(write_rows(tmp_path / "prompts.jsonl", prompts))},
        "held_out_prompts": 1,
        "filters": {"check": "none"},
        "chunk": 1,
        "shards": 2,
    }
    shards = [overrides({**keys, "shard": number}) for number in range(2)]
    assert stage.run("tiny", shards[1]) is None, "the answers of the other are missing"
    slower = getattr(stage, place)
    faster: list[str | None] = []

    def overtaken(*arguments: Any) -> Any:
        if not faster:
            faster.append(None)
            faster[0] = stage.run("tiny", shards[1])
        return slower(*arguments)

    monkeypatch.setattr(stage, place, overtaken)
    said = stage.run("tiny", shards[0])
    assert said == (None if place == "is_complete" else faster[0])
    assert len((tmp_path / "pairs" / stage.TRAIN).read_text().splitlines()) == 3
    assert not list(tmp_path.glob(".*")), "the work folder is gone"
