"""What a user can get wrong: one line on stderr, exit code 2, nothing written."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import chat_rows, overrides, write_rows
from test_prefer import pairs
from tiny_model import write_chat

from posttraining.cli import main
from posttraining.errors import Mistake
from posttraining.files import own_work_folder


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    return write_chat(tmp_path / "chat")


def error_of(command: str, keys: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that is refused says."""
    arguments = [command, "tiny", *(word for text in overrides(keys) for word in ("--set", text))]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def rows_for(command: str, tmp_path: Path) -> dict[str, Any]:
    rows = {
        "sft": chat_rows(),
        "preview": chat_rows(),
        "pairs": [{"prompt": "a", "answer": "1"}],
        "prefer": pairs(4),
        "compare": pairs(4),
    }
    file = str(write_rows(tmp_path / "rows.jsonl", rows[command]))
    data = {"path": file, "held_out_path": file} if command in ("prefer", "compare") else {"path": file}
    return {"data": data, "output_dir": str(tmp_path / "out")}


COMMANDS = ("sft", "preview", "pairs", "prefer", "compare")


@pytest.mark.parametrize("command", COMMANDS)
def test_not_a_hugging_face_folder(
    command: str, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = rows_for(command, tmp_path)
    assert "nowhere: no such folder" in error_of(command, {**keys, "model": str(tmp_path / "nowhere")}, capsys)
    (tmp_path / "empty").mkdir()
    assert "empty: no config.json" in error_of(command, {**keys, "model": str(tmp_path / "empty")}, capsys)
    for name, said in (
        ("model.safetensors", "no *.safetensors file"),
        ("tokenizer.json", "no tokenizer"),
        ("config.json", "no config.json"),
    ):
        folder = tmp_path / f"without-{name}"
        shutil.copytree(chat, folder)
        (folder / name).unlink()
        assert said in error_of(command, {**keys, "model": str(folder)}, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["pairs", "prefer"])
def test_no_chat_template(command: str, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (chat / "chat_template.jinja").unlink()
    keys = {**rows_for(command, tmp_path), "model": str(chat), "weak_model": str(chat)}
    if command == "prefer":
        del keys["weak_model"]
    assert "its tokenizer has no chat template" in error_of(command, keys, capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_rows(command: str, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {**rows_for(command, tmp_path), "model": str(chat)}
    if command == "pairs":
        keys["weak_model"] = str(chat)
    (tmp_path / "rows.jsonl").write_text("")
    assert "holds no rows" in error_of(command, keys, capsys)
    data = keys["data"]
    keys["data"] = {**data, "path": str(tmp_path / "absent.jsonl")}
    assert "no such file" in error_of(command, keys, capsys)
    (tmp_path / "rows.jsonl").write_text('{"messages": [')
    keys["data"] = data
    assert "cannot be read: JSON parse error" in error_of(command, keys, capsys)


@pytest.mark.parametrize("command", ["prefer", "compare"])
def test_pairs_without_rejected(command: str, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {**rows_for(command, tmp_path), "model": str(chat)}
    rows = [{name: row[name] for name in ("prompt", "chosen")} for row in pairs(4)]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert "its rows have no 'rejected' (they have prompt, chosen)" in error_of(command, keys, capsys)
    write_rows(tmp_path / "rows.jsonl", [{**row, "rejected": []} for row in pairs(4)])
    assert "row 0 has an empty 'rejected'" in error_of(command, keys, capsys)


@pytest.mark.parametrize(
    ("command", "key"), [("sft", "max_length"), ("prefer", "max_length"), ("compare", "max_length")]
)
def test_a_context_longer_than_the_models(
    command: str, key: str, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {**rows_for(command, tmp_path), "model": str(chat), key: 257}
    assert f"{key}: 257: expected at most 256, the context of {chat}" in error_of(command, keys, capsys)


def test_answers_longer_than_the_models_context(chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {**rows_for("pairs", tmp_path), "model": str(chat), "weak_model": str(chat)}
    keys["rejected"] = {"max_new_tokens": 300}
    assert "rejected.max_new_tokens: 300: expected at most 256" in error_of("pairs", keys, capsys)


def test_an_output_that_is_there_already(chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("sft", "prefer"):
        keys = {**rows_for(command, tmp_path), "model": str(chat)}
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "mine").write_text("mine")
        assert "is there already" in error_of(command, keys, capsys)
    assert (tmp_path / "out" / "mine").read_text() == "mine"


def test_damaged_files(chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {**rows_for("sft", tmp_path), "model": str(chat)}
    (chat / "config.json").write_text("{")
    assert "config.json: not JSON" in error_of("sft", keys, capsys)
    (chat / "config.json").write_text(json.dumps({"hidden_size": 3}))
    assert "names no model_type" in error_of("sft", keys, capsys)
    (chat / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    assert "transformers cannot read the model" in error_of("sft", keys, capsys)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"generated": "arithmetic"}, "data.examples: null: expected how many problems"),
        ({"generated": "algebra", "examples": 3}, "data.generated: 'algebra': expected arithmetic or null"),
        ({}, "expected one of data.path, data.sources and data.generated, not none"),
        ({"path": "a.jsonl", "generated": "arithmetic"}, "not data.generated and data.path; add data.generated=null"),
        ({"sources": [{"path": "a.jsonl", "weight": 0}]}, "weight: 0.0: expected 0 < weight"),
    ],
)
def test_data_that_are_not_one_thing(
    data: dict[str, Any], said: str, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"model": str(chat), "output_dir": str(tmp_path / "out"), "data": data}
    assert said in error_of("sft", keys, capsys)


@pytest.mark.parametrize(
    ("command", "key", "value", "said"),
    [
        ("sft", "learning_rate", -1.0, "expected a number above 0, at most 1"),
        ("prefer", "learning_rate", 0, "learning_rate: 0: expected a number above 0, at most 1"),
        ("grpo", "learning_rate", 1e30, "learning_rate: 1e+30: expected a number above 0, at most 1"),
        ("compare", "runs", {"a": {"learning_rate": 100}}, "runs.a: learning_rate: 100.0: expected a number above 0"),
        ("sft", "weight_decay", -0.1, "expected a finite number, at least 0"),
        ("sft", "max_grad_norm", -1, "expected a finite number, at least 0"),
        ("sft", "adam_epsilon", -1e-8, "expected a finite number, at least 0"),
        ("sft", "adam_beta1", 1.0, "expected a number from 0 to below 1"),
        ("sft", "adam_beta2", 1.5, "expected a number from 0 to below 1"),
        ("sft", "learning_rate", float("nan"), "expected a number"),
        ("sft", "per_device_train_batch_size", 0, "expected at least 1"),
        ("prefer", "per_device_eval_batch_size", 0, "expected at least 1"),
        ("sft", "gradient_accumulation_steps", 0, "expected at least 1"),
        ("sft", "cpu_threads", 0, "expected at least 1"),
        ("sft", "seed", -1, "expected a whole number from 0 to 2**32 - 1"),
        ("sft", "save_steps", 0, "expected a number above 0"),
        ("sft", "logging_steps", -1, "expected a number above 0"),
        ("sft", "max_steps", 0, "expected at least 1, or -1"),
        ("sft", "num_train_epochs", 0, "expected a number above 0"),
        ("sft", "max_length", 0, "expected at least 1"),
        ("sft", "eval_strategy", False, '"no"'),
        ("sft", "loss_type", "nl", "did you mean nll?"),
        ("prefer", "beta", 0, "expected a number above 0"),
        ("prefer", "loss_type", [], "expected one of sigmoid"),
        (
            "compare",
            "runs",
            {"a": {"loss_type": ["apo_zer"]}},
            "runs.a: loss_type: ['apo_zer']: expected one of",
        ),
        ("grpo", "num_generations", 0, "expected at least 2"),
        ("grpo", "max_completion_length", 0, "expected at least 1"),
        ("grpo", "temperature", 0, "expected a number above 0"),
        ("grpo", "alarms.window", 0, "expected at least 1"),
    ],
)
def test_a_value_out_of_its_limits(
    command: str, key: str, value: Any, said: str, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"model": str(chat), "output_dir": str(tmp_path / "out"), key: value}
    if command in ("prefer", "compare"):
        keys |= rows_for(command, tmp_path)
    before = sorted(tmp_path.iterdir())
    error = error_of(command, keys, capsys)
    assert error.startswith(f"error: --set: {key.split('.')[0]}")
    assert said in error
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("command", "key", "value", "said"),
    [
        ("sft", "report_to", "wandbb", "report_to: 'wandbb': expected none, all or one of"),
        ("prefer", "report_to", "comet_ml", "report_to: 'comet_ml': needs its package, which is not installed"),
    ],
)
def test_a_tracker_that_is_not_there(
    command: str, key: str, value: str, said: str, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {**rows_for(command, tmp_path), "model": str(chat), key: value}
    assert error_of(command, keys, capsys).startswith(f"error: --set: {said}")
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize("command", ["sft", "prefer", "compare"])
@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("use_liger_kernel", True, "use_liger_kernel: true: needs the package liger-kernel, which is not installed"),
        ("optim", "paged_adamw_8bit", "optim: 'paged_adamw_8bit': needs its package, which is not installed"),
        ("optim", "galore_adamw", "optim: 'galore_adamw': needs its package, which is not installed"),
    ],
)
def test_a_package_that_is_not_there(
    command: str, key: str, value: Any, said: str, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if any(find_spec(package) for package in ("liger_kernel", "bitsandbytes", "galore_torch")):
        pytest.skip("there are packages here that are not asked for")
    keys = {**rows_for(command, tmp_path), "model": str(chat), key: value}
    assert error_of(command, keys, capsys) == f"error: --set: {said}\n"
    assert list(tmp_path.glob(".*")) == [] and not (tmp_path / "out").exists()


def test_a_lineage_that_is_not_one(chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (chat / "training_lineage.json").write_text("{")
    keys = {**rows_for("sft", tmp_path), "model": str(chat)}
    assert "training_lineage.json: not a lineage of format 1" in error_of("sft", keys, capsys)
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize("command", ["sft", "prefer", "compare"])
def test_an_output_that_no_folder_can_be(
    command: str, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {**rows_for(command, tmp_path), "model": str(chat)}
    (tmp_path / "file").write_text("")
    (tmp_path / ".taken.work").write_text("")
    for output, said in (
        (tmp_path / "file" / "out", "no folder can be made there"),
        (tmp_path / "taken", "no folder can be made there"),
        (Path("/proc/x"), "no folder can be made there"),
        (tmp_path / ("n" * 300), "no folder can be made there"),
        (chat / "out", "is in the folder of the model"),
    ):
        assert said in error_of(command, {**keys, "output_dir": str(output)}, capsys)
    assert "chat" in error_of(command, {**keys, "output_dir": str(chat)}, capsys)
    assert "is there already" in error_of(command, {**keys, "output_dir": "/"}, capsys)
    assert not (chat / "out").exists()


def test_a_mistake_does_not_stand_in_the_way_of_the_corrected_command(
    chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {**rows_for("sft", tmp_path), "model": str(chat)}
    absent = {**keys, "data": {"path": str(tmp_path / "absent.jsonl")}}
    assert "no such file" in error_of("sft", absent, capsys)
    assert not (tmp_path / ".out.work").exists()
    with own_work_folder(tmp_path / "out", {"settings": 1}) as work:
        (work / "result").mkdir()
        (tmp_path / ".out.work" / "checkpoint-1").mkdir()
        assert "is being written by another process" in error_of("sft", keys, capsys)
    (tmp_path / ".out.work").mkdir()
    (tmp_path / ".out.work" / "identity").write_text("of a killed process that had no checkpoint")
    with own_work_folder(tmp_path / "out", {"settings": 2}) as work:
        (work / "checkpoint").write_text("")
    with (
        pytest.raises(Mistake, match="unfinished work with other settings"),
        own_work_folder(tmp_path / "out", {"settings": 3}),
    ):
        pass
