"""Keys of TRL that only its trainers stumble over, or that they understand otherwise: one line, before any training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import chat_rows, overrides, write_rows
from test_grpo import config, refused
from test_mistakes import error_of, rows_for
from tiny_model import write_chat

from posttraining import sft
from posttraining.model_folder import load_model, load_tokenizer
from posttraining.rendering import render
from posttraining.report import held_out_table, write_report


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


@pytest.mark.parametrize(
    ("evaluation", "steps"),
    [
        ({}, [5]),
        ({"eval_on_start": True}, [0, 5]),
        ({"eval_strategy": "steps", "eval_steps": 2}, [2, 4, 5]),
        ({"eval_strategy": "epoch"}, [5]),
    ],
    ids=str,
)
def test_sft_evaluates_on_held_out_rows(
    evaluation: dict[str, Any], steps: list[int], chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, held_out = (str(write_rows(tmp_path / f"{count}.jsonl", chat_rows(count))) for count in (10, 3))
    keys = {"model": str(chat), "output_dir": str(tmp_path / "out"), "early_at": None, "per_device_train_batch_size": 2}
    sft.run("tiny", overrides({**keys, "data": {"path": path, "held_out_path": held_out}, **evaluation}))
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}
    assert list(losses) == steps and len(losses) == sum("eval_loss" in record for record in records)
    out = capsys.readouterr().out
    assert f"held-out loss {losses[5]:.3f}, in " in out
    assert f"sft: step 5/5  eval_loss {losses[5]:.4g}" in out
    before = f"{losses[0]:.3f}" if 0 in losses else "–"
    table = write_report(tmp_path / "report", {"sft": ("sft", tmp_path / "out")}, {"sft": 1.0})
    assert table.endswith(f"| sft | {before} | {losses[5]:.3f} |")
    assert losses[5] == pytest.approx(loss_of(tmp_path / "out", chat_rows(1)[0]), abs=1e-4)


def loss_of(folder: Path, row: dict[str, Any]) -> float:
    """The mean loss of the tokens that are learnt of a row, from the logits."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    shown = render(tokenizer, row)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([shown.token_ids])).logits[0].double().log_softmax(-1)
    places = [place for place, learnt in enumerate(shown.learnt) if learnt]
    return -sum(logits[place - 1, shown.token_ids[place]].item() for place in places) / len(places)


def test_without_held_out_rows_sft_measures_and_shows_no_loss_of_them(
    chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {**rows_for("sft", tmp_path), "model": str(chat), "early_at": None, "max_steps": 1}
    sft.run("tiny", overrides(keys))
    assert "held-out" not in capsys.readouterr().out
    assert held_out_table({"sft": tmp_path / "out"}) == ""


def test_held_out_rows_with_nothing_to_learn_are_one_line(
    chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": "user", "content": "2" * 60}, {"role": "assistant", "content": "5"}]
    held_out = str(write_rows(tmp_path / "held_out.jsonl", [{"messages": turns}]))
    keys = {**rows_for("sft", tmp_path), "model": str(chat), "max_length": 60}
    keys["data"] = {**keys["data"], "held_out_path": held_out}
    said = "chat: data.held_out_path: no row has anything to learn in its first max_length 60 tokens"
    assert said in error_of("sft", keys, capsys)
