"""After `make posttrain` the example of every help page runs as it is printed, and so does the last line of each."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import QUESTION, chat_rows, overrides, write_rows
from test_prefer import pairs

import posttraining
from posttraining.cli import app, main
from posttraining.next_line import chat_command, free_folder, recipe_beside, stage_command
from posttraining.settings import RECIPES

EXAMPLES = {
    command.callback.__name__: command.epilog.removeprefix("Example: posttraining ")
    for command in app.registered_commands
    if command.callback and command.epilog
}

SIDE = {"max_new_tokens": 60, "backend": "transformers"}
MIX = {"method": "soup", "models": [{"model": "{model}"}, {"model": "{model}"}]}
SHORT = {"max_steps": 2, "save_strategy": "no"}
SMALL: dict[str, dict[str, Any]] = {
    "sft": {"data": {"path": "chats.jsonl"}, "learning_rate": 1e-2, "early_at": 0.6, "save_strategy": "no"},
    "preview": {"data": {"generated": "arithmetic", "examples": 4}},
    "pairs": {
        "data": {"path": "prompts.jsonl"},
        "held_out_prompts": 6,
        "chosen": {**SIDE, "temperature": 0.7},
        "rejected": {**SIDE, "temperature": 1.5},
        "filters": {"check": "none"},
    },
    "prefer": SHORT,
    "compare": {**SHORT, "seeds": [1]},
    "grpo": {**SHORT, "per_device_train_batch_size": 8, "max_completion_length": 4},
    "merge": {},
    "pipeline": {"stages": [{"name": "mix", "command": "merge", "recipe": "tiny", "set": MIX}], "final": "mix"},
}
"""Keys that make a command short; they change nothing about what it reads and where it writes."""


def small(command: str) -> list[str]:
    """What is appended to a call to make it short."""
    if command == "evaluate":
        tasks = yaml.safe_load((RECIPES / "tiny" / "evaluate.yaml").read_text())["tasks"]
        keys = {"tasks": [{**task, "data": {**task["data"], "examples": 4}, "max_new_tokens": 4} for task in tasks]}
    else:
        keys = SMALL[command]
    return [word for key in overrides(keys) for word in ("--set", key)]


def called(line: str) -> str:
    """Make the call, shortened; returns its last line."""
    words = shlex.split(line)
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as ended:
        main([*words, *small(words[0])])
    assert not ended.value.code, line
    return out.getvalue().rstrip().splitlines()[-1]


@pytest.fixture(scope="module")
def clone(base: Path, taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory after `make pretrain posttrain`: what matters of its `runs/`."""
    folder = tmp_path_factory.mktemp("clone")
    run = folder / "runs" / "tiny-1"
    shutil.copytree(base, run / "export")
    run.with_name("latest-export").symlink_to(run.name)
    for stage in ("sft", "apo", "grpo", "merge"):
        shutil.copytree(taught, run / "posttraining" / stage)
    (run / "posttraining" / "pairs").mkdir()
    write_rows(run / "posttraining" / "pairs" / "pairs.jsonl", pairs(8))
    write_rows(run / "posttraining" / "pairs" / "held_out.jsonl", pairs(12)[8:])
    write_rows(folder / "chats.jsonl", chat_rows(480))
    write_rows(folder / "prompts.jsonl", [{"prompt": f"{QUESTION}{number}", "answer": "5"} for number in range(24)])
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(posttraining.__file__).parents[1]))  # also where it was given relative
        yield folder


@pytest.fixture(scope="module")
def last_lines(clone: Path) -> dict[str, str]:
    """Command → the last line that its help's example printed, run in the order of the help."""
    return {command: called(example) for command, example in EXAMPLES.items()}


def test_every_example_runs_and_says_what_to_call_next(last_lines: dict[str, str]) -> None:
    assert set(last_lines) == {*SMALL, "evaluate"}
    for command, line in last_lines.items():
        assert line.lower().startswith("next: "), command


@pytest.mark.parametrize(
    ("command", "following"),
    [
        ("sft", "pairs"),
        ("pairs", "prefer"),
        ("prefer", "grpo"),
        ("compare", "prefer"),
        ("grpo", "evaluate"),
        ("merge", "evaluate"),
    ],
)
def test_a_last_line_runs_as_it_is_printed(
    last_lines: dict[str, str], clone: Path, command: str, following: str
) -> None:
    line = last_lines[command].removeprefix("next: ")
    call = line.partition("posttraining ")[2]
    assert call.startswith(f"{following} tiny --set ")
    output = next(word.partition("=")[2] for word in shlex.split(call) if word.startswith("output_dir="))
    shutil.rmtree(clone / output, ignore_errors=True)  # a later example of the help made it meanwhile
    # "next: " once more: the next stage's folder is whole and can be gone on from.
    assert called(call).startswith("next: ")


@pytest.mark.parametrize("command", ["evaluate", "pipeline"])
def test_the_last_line_of_all_asks_the_model(last_lines: dict[str, str], clone: Path, command: str) -> None:
    line = last_lines[command].removeprefix("next: ")
    done = subprocess.run(line, shell=True, cwd=clone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Compute 47+86?" in done.stdout


def test_a_call_can_be_pasted_whatever_is_in_its_values(tmp_path: Path) -> None:
    keys = {"model": "it's here", "data": {"path": "a b.jsonl"}, "loss_type": ["apo_zero"], "eval_strategy": "no"}
    words = shlex.split(stage_command("prefer", "tiny", keys))
    given = dict(word.split("=", 1) for word in words if "=" in word)
    assert {key: yaml.safe_load(value) for key, value in given.items()} == keys
    model = tmp_path / """a "quoted" model's $HOME"""
    model.mkdir()
    code = shlex.split(chat_command(model))[-1]
    assert json.dumps(str(model)) in code or repr(str(model)) in code


def test_the_recipe_of_the_next_stage_lies_beside(tmp_path: Path) -> None:
    (tmp_path / "sft.yaml").touch()
    (tmp_path / "grpo.yaml").touch()
    assert recipe_beside("smollm3", "pairs") == "smollm3"
    assert recipe_beside(str(tmp_path / "sft.yaml"), "grpo") == str(tmp_path / "grpo.yaml")
    assert recipe_beside(str(tmp_path / "sft.yaml"), "pairs") == "tiny"


def test_a_folder_that_is_taken_is_not_named(tmp_path: Path) -> None:
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs-2").mkdir()
    assert free_folder(tmp_path / "sft", "pairs") == str(tmp_path / "pairs-3")
    assert free_folder("sft", "pairs") == "pairs"


def test_the_program_is_one_that_is_there() -> None:
    words = shlex.split(stage_command("merge", "tiny", {}))
    assert shutil.which(words[0]) or words[:3] == [sys.executable, "-m", "posttraining"]
