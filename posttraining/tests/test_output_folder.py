"""An output folder belongs to one process at a time, and a mistake leaves nothing there or beside it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import chat_rows, overrides, write_rows
from test_mistakes import error_of
from test_prefer import pairs
from tiny_model import write_chat

from posttraining.errors import Mistake
from posttraining.files import own_work_folder

BUSY = "is being written by another process"
COMMANDS = ("sft", "pairs", "prefer", "grpo", "merge", "evaluate")


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    return write_chat(tmp_path / "chat")


def keys_of(command: str, model: Path, tmp_path: Path) -> dict[str, Any]:
    """What `command` is right with; its output folder is below one that is not there."""
    rows = {
        "sft": chat_rows(),
        "pairs": [{"prompt": f"{number}?", "answer": "1"} for number in range(6)],
        "prefer": pairs(4),
        "grpo": [{"prompt": "1?", "answer": "1"}],
    }.get(command, [])
    file = str(write_rows(tmp_path / "rows.jsonl", rows))
    start = {"model": str(model)}
    keys: dict[str, dict[str, Any]] = {
        "sft": {**start, "data": {"path": file}},
        "pairs": {**start, "weak_model": str(model), "data": {"path": file}, "held_out_prompts": 0},
        "prefer": {**start, "data": {"path": file, "held_out_path": file}},
        "grpo": {**start, "data": {"path": file}},
        "merge": {"models": [start] * 2, "method": "soup"},
        "evaluate": {
            "models": {"mine": str(model)},
            "tasks": [{"name": "sums", "data": {"generated": "arithmetic", "examples": 2}, "max_new_tokens": 2}],
        },
    }
    return {**keys[command], "output_dir": str(tmp_path / "runs" / "one" / "out")}


def tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_second_process_in_one_output_folder_is_refused(
    command: str, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = keys_of(command, chat, tmp_path)
    with own_work_folder(Path(keys["output_dir"]), {}):
        before = tree(tmp_path)
        assert error_of(command, keys, capsys) == f"error: {keys['output_dir']}: {BUSY}\n"
        assert tree(tmp_path) == before
    assert not (tmp_path / "runs").exists()


LATE_MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "sft": ({"data": {"path": "absent.jsonl"}}, "no such file"),
    "pairs": ({"chosen": {"max_new_tokens": 256}}, "6 of 6 prompts"),
    "prefer": ({"data": {"path": "absent.jsonl"}}, "no such file"),
    "grpo": ({"max_completion_length": 256}, "1 of 1 prompts"),
}
"""Changes that are found out late, and what is said."""


@pytest.mark.parametrize("command", sorted(LATE_MISTAKES))
def test_a_mistake_leaves_nothing(command: str, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, said = LATE_MISTAKES[command]
    keys = {**keys_of(command, chat, tmp_path), **changes}
    before = tree(tmp_path)
    assert said in error_of(command, keys, capsys)
    assert tree(tmp_path) == before
    (tmp_path / "runs").mkdir()
    assert said in error_of(command, keys, capsys)
    assert tree(tmp_path) == before | {tmp_path / "runs"}, "a folder that was there stays"


def words(command: str, keys: dict[str, Any]) -> list[str]:
    given = (word for one in overrides(keys) for word in ("--set", one))
    return [sys.executable, "-m", "posttraining", command, "tiny", *given]


def test_pairs_that_are_under_way_are_not_disturbed_by_a_second_process(
    chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    side = {"max_new_tokens": 200, "batch_size": 1, "backend": "transformers"}
    keys = {**keys_of("pairs", chat, tmp_path), "chunk": 1, "chosen": side, "rejected": side}
    keys["filters"] = {"check": "none"}
    lock = tmp_path / "runs" / "one" / ".out.work" / "lock"
    with subprocess.Popen(words("pairs", keys), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first:
        try:
            while first.poll() is None and not lock.exists():
                time.sleep(0.02)
            assert BUSY in error_of("pairs", keys, capsys)
            assert first.poll() is None, "the first had ended; the test shows nothing"
            out, errors = first.communicate(timeout=120)
        finally:
            first.kill()
    # Its untrained model may end no answer: then the filters leave nothing, which is no mistake of the second's.
    assert first.returncode in (0, 1), errors
    assert "chunk 6/6" in out


def test_each_shard_of_pairs_is_one_process(chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {**keys_of("pairs", chat, tmp_path), "shards": 2, "shard": 1}
    output = Path(keys["output_dir"])
    with own_work_folder(output, {}, 1):
        assert BUSY in error_of("pairs", keys, capsys)
        with pytest.raises(Mistake, match=BUSY), own_work_folder(output, {}):
            pass
        with own_work_folder(output, {}, 0) as work:
            pass
        assert work.is_dir(), "another shard's process is in it"
    assert not (tmp_path / "runs").exists()
    with own_work_folder(output, {}), pytest.raises(Mistake, match=BUSY), own_work_folder(output, {}, 0):
        pass
