"""Weights that are damaged, missing, of another shape or no numbers: one line that names them, exit code 2."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import chat_rows, write_rows
from safetensors.torch import load_file, save_file
from test_mistakes import error_of
from tiny_model import write_chat

from posttraining.model_folder import load_model

NORM = "model.norm.weight"


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    return write_chat(tmp_path / "chat")


def keys_of(command: str, model: Path, tmp_path: Path) -> dict[str, Any]:
    task = {"name": "greedy", "data": {"generated": "arithmetic", "examples": 2}, "max_new_tokens": 2}
    prompts = {"path": str(write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a"}]))}
    keys: dict[str, dict[str, Any]] = {
        "sft": {"model": str(model), "data": {"path": str(write_rows(tmp_path / "rows.jsonl", chat_rows()))}},
        "evaluate": {"models": {"mine": str(model)}, "tasks": [task]},
        "merge": {"models": [{"model": str(model)}] * 2, "method": "soup"},
        "pairs": {"model": str(model), "weak_model": str(model), "data": prompts, "held_out_prompts": 0},
    }
    return {**keys[command], "output_dir": str(tmp_path / "out")}


def change(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Put another tensor, or none, in its place, in a folder without lineage."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors[name]
    save_file({**tensors, **({} if tensor is None else {name: tensor})}, file, metadata={"format": "pt"})
    (folder / "training_lineage.json").unlink()


@pytest.mark.parametrize("command", ["sft", "evaluate", "merge", "pairs"])
@pytest.mark.parametrize("size", [0, 5, -3])
def test_a_file_that_is_cut_short_is_named(
    command: str, size: int, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = chat / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert f"{file}: is cut short or damaged" in error_of(command, keys_of(command, chat, tmp_path), capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["sft", "evaluate", "merge"])
def test_a_tensor_that_the_config_asks_for_is_named(
    command: str, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(chat, NORM, None)
    error = error_of(command, keys_of(command, chat, tmp_path), capsys)
    assert f"{chat}: {NORM}: is in none of the files, and config.json asks for it" in error


@pytest.mark.parametrize("command", ["sft", "evaluate", "merge"])
def test_a_tensor_of_another_shape_is_named(
    command: str, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(chat, NORM, torch.ones(3))
    error = error_of(command, keys_of(command, chat, tmp_path), capsys)
    assert f"{chat}: {NORM}: (3,): expected the shape (16,)" in error


@pytest.mark.parametrize("command", ["evaluate", "merge", "pairs"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(
    command: str, value: float, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(chat, NORM, torch.tensor([1.0] * 15 + [value]))
    error = error_of(command, keys_of(command, chat, tmp_path), capsys)
    assert f"model.safetensors: {NORM}: has values that are infinite or no numbers" in error


def test_a_tied_head_is_not_missing(chat: Path) -> None:
    assert "lm_head.weight" not in load_file(chat / "model.safetensors")
    assert load_model(chat).lm_head.weight is not None


def test_a_shard_that_is_not_there_is_named(chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = {"weight_map": {NORM: "model-2.safetensors"}}
    (chat / "model.safetensors.index.json").write_text(json.dumps(index))
    error = error_of("sft", keys_of("sft", chat, tmp_path), capsys)
    assert "model-2.safetensors: is not there, and model.safetensors.index.json names it" in error


def test_weights_that_are_not_the_lineages_are_not_merged(
    chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = bytearray((chat / "model.safetensors").read_bytes())
    content[-4] ^= 1
    (chat / "model.safetensors").write_bytes(content)
    assert "its weights are not those that" in error_of("merge", keys_of("merge", chat, tmp_path), capsys)


@pytest.mark.parametrize("weights", [[1.5, -0.5], [-1.0, 2.0]])
def test_shares_of_a_merge_are_from_0_to_1(
    weights: list[float], chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [{"model": str(chat), "weight": weight} for weight in weights]
    keys = {"models": models, "method": "linear", "output_dir": str(tmp_path / "out")}
    assert "models.weight" in error_of("merge", keys, capsys)


@pytest.mark.parametrize(
    ("command", "changes", "said"),
    [
        ("evaluate", {"batch_size": 0}, "batch_size: 0: expected 1 or more"),
        ("evaluate", {"temperature": -1.0}, "greedy: temperature: -1.0: expected a number from 0 on"),
        ("evaluate", {"max_new_tokens": 0}, "greedy: max_new_tokens: 0: expected 1 or more"),
        ("evaluate", {"models": ["mime"]}, "greedy: models: ['mime']: expected some of the models: mine; did you mean"),
        ("pairs", {"chosen": {"batch_size": 0}}, "batch_size: 0: expected 1 or more"),
        ("pairs", {"rejected": {"max_new_tokens": 0}}, "max_new_tokens: 0: expected 1 or more"),
        ("pairs", {"held_out_prompts": -1}, "held_out_prompts: -1: expected 0 or more"),
    ],
)
def test_figures_out_of_range(
    command: str, changes: dict[str, Any], said: str, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = keys_of(command, chat, tmp_path)
    place = keys["tasks"][0] if command == "evaluate" and "batch_size" not in changes else keys
    place |= changes
    assert said in error_of(command, keys, capsys)


@pytest.mark.parametrize("command", ["evaluate", "pairs"])
def test_prompts_that_leave_no_room_for_an_answer_are_counted(
    command: str, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": text, "answer": "1"} for text in ("a", "b" * 250, "c" * 260)]
    data = {"path": str(write_rows(tmp_path / "long.jsonl", rows))}
    keys = keys_of(command, chat, tmp_path)
    if command == "evaluate":
        keys["tasks"][0]["data"] = data
    else:
        keys["data"] = data
    error = error_of(command, keys, capsys)
    assert "2 of 3 prompts (the first is row 1, with" in error
    assert "in 256, the context of" in error
