"""What to call after a command, as it can be pasted into a shell: what each command returns, and the last line that
it prints."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from posttraining.settings import RECIPES

_LAST_RESORT = "tiny"


def stage_command(stage: str, config: str, keys: Mapping[str, Any]) -> str:
    """A call of a stage's command with changed keys. Its recipe is the one that belongs to `config`."""
    words = [stage, recipe_beside(config, stage)]
    for key, value in keys.items():
        text = value if isinstance(value, str) and yaml.safe_load(value) == value else _yaml(value)
        words += ["--set", f"{key}={text}"]
    return " ".join([_tool("posttraining"), *map(shlex.quote, words)])


def same_config(stage: str, config: str, overrides: Sequence[str]) -> str:
    """A call of another command with the config and the overrides of this one."""
    words = [stage, config, *(word for override in overrides for word in ("--set", override))]
    return " ".join([_tool("posttraining"), *map(shlex.quote, words)])


def chat_command(folder: str | Path) -> str:
    """A line of Python that asks the model in `folder` a question."""
    asked = "Compute 47+86?"
    question = [{"role": "user", "content": asked}] if _has_template(Path(folder)) else f"{asked}\n"
    code = f"from transformers import pipeline; print(pipeline('text-generation', {str(folder)!r})({question!r}))"
    # Double quotes leave single ones readable, where the shell changes nothing inside them.
    quoted = shlex.quote(code) if re.search(r'["$`!]|\\\\', code) else f'"{code}"'
    return f"{_tool('python')} -c {quoted}"


def _has_template(folder: Path) -> bool:
    settings = folder / "tokenizer_config.json"
    inside = settings.is_file() and "chat_template" in json.loads(settings.read_text(encoding="utf-8"))
    return inside or (folder / "chat_template.jinja").is_file()


def recipe_beside(config: str, stage: str) -> str:
    """The recipe of another stage: of the shipped name, or the file beside `config`; tiny where there is none."""
    if (RECIPES / config / f"{stage}.yaml").is_file():
        return config
    beside = Path(config).with_name(f"{stage}.yaml")
    return str(beside) if beside.is_file() else _LAST_RESORT


def free_folder(beside: str | Path, name: str) -> str:
    """A folder that a next stage can write, in the one that `beside` lies in: `name`, or `name`-2, -3 …"""
    folder, number = Path(beside).parent / name, 1
    while folder.exists():
        number += 1
        folder = folder.with_name(f"{name}-{number}")
    return str(folder)


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).strip()
    return text.removesuffix("\n...")


def _tool(name: str) -> str:
    """A program of this environment: by its path where the environment is not on PATH; posttraining as a module where
    it was not installed."""
    here = Path(sys.executable).with_name(name)
    if name == "posttraining" and not here.exists():
        return f"{shlex.quote(sys.executable)} -m posttraining"
    if not here.exists():
        return shlex.quote(sys.executable)
    if shutil.which(name) == str(here):
        return name
    return shlex.quote(str(here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here))
