"""Keys of TRL that only its trainers stumble over, or that they understand otherwise: one line, before any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import chat_rows, overrides, write_rows
from test_grpo import config, refused
from test_mistakes import error_of, rows_for
from tiny_model import write_chat

from posttraining import sft


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat(tmp_path_factory.mktemp("model") / "chat")


@pytest.mark.parametrize("command", ["sft", "preview"])
@pytest.mark.parametrize("name", ["absent.jinja", "template.txt", "folder", "folder.j2", "Qwen/Qwen3-0.6B"])
def test_a_template_that_is_no_file_of_one(
    command: str, name: str, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "template.txt").write_text("{{ messages }}")
    for folder in ("folder", "folder.j2"):
        (tmp_path / folder).mkdir()
    path = name if name.startswith("Qwen") else str(tmp_path / name)
    keys = {**rows_for(command, tmp_path), "model": str(chat), "chat_template_path": path}
    error = error_of(command, keys, capsys)
    assert error.startswith("error: --set: chat_template_path: ")
    assert error.endswith(": expected a file that ends in .jinja or .j2\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["packing", "eval_packing"])
def test_packing_into_rows_of_no_length(
    key: str, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {**rows_for("sft", tmp_path), "model": str(chat), key: True, "max_length": None}
    assert "max_length: null: expected a number; packing fills rows of that many tokens" in error_of(
        "sft", keys, capsys
    )


NO_ROWS = "there are no rows to evaluate on; sft and prefer read them from data.held_out_path"
STRATEGIES: list[tuple[dict[str, Any], str]] = [
    ({"eval_strategy": "steps", "eval_on_start": False}, "eval_strategy: 'steps'"),
    ({"eval_strategy": "no", "eval_on_start": True}, "eval_on_start: true"),
]


@pytest.mark.parametrize("command", ["sft", "prefer"])
@pytest.mark.parametrize(("evaluation", "said"), STRATEGIES, ids=str)
def test_an_evaluation_without_rows(
    command: str,
    evaluation: dict[str, Any],
    said: str,
    chat: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys = {**rows_for(command, tmp_path), "model": str(chat), **evaluation}
    keys["data"] = {"path": keys["data"]["path"]}
    assert f"error: --set: {said}: {NO_ROWS}" in error_of(command, keys, capsys)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(("evaluation", "said"), STRATEGIES, ids=str)
def test_an_evaluation_of_grpo(
    evaluation: dict[str, Any], said: str, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"{said}: {NO_ROWS}" in refused(capsys, config(tmp_path, chat, **evaluation))


def test_sft_evaluates_on_held_out_rows(chat: Path, tmp_path: Path) -> None:
    path = str(write_rows(tmp_path / "rows.jsonl", chat_rows(4)))
    keys = {"model": str(chat), "output_dir": str(tmp_path / "out"), "data": {"path": path, "held_out_path": path}}
    sft.run("tiny", overrides({**keys, "eval_strategy": "epoch", "early_at": None}))
    assert '"eval_loss"' in (tmp_path / "out" / "metrics.jsonl").read_text()
