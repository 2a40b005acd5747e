"""Models that the tests share; each is made once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from tiny_model import write_base

from posttraining import sft
from posttraining.generation import Answer, Generator

QUESTION, ANSWER = "2+3?", "<think>\n2+3=5\n</think>\n\\boxed{5}"


def pytest_configure() -> None:
    """Property tests have no deadline: how long an example takes is the machine's."""
    settings.register_profile("any machine", settings(), deadline=None)
    settings.load_profile("any machine")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def overrides(keys: dict[str, Any]) -> list[str]:
    """What --set is given for each of these keys."""
    return [f"{key}={json.dumps(value)}" for key, value in keys.items()]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat_rows(count: int = 16, answer: str = ANSWER) -> list[dict[str, Any]]:
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}]
    return [{"messages": turns} for _ in range(count)]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model as an export is: no chat template."""
    return write_base(tmp_path_factory.mktemp("base") / "base", hidden=32)


@pytest.fixture(scope="session")
def taught(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that SFT taught to answer QUESTION with ANSWER; in `early`, what it was after a tenth of that."""
    folder = tmp_path_factory.mktemp("taught")
    rows = write_rows(folder / "chats.jsonl", chat_rows(960))
    keys = {
        "model": str(base),
        "output_dir": str(folder / "sft"),
        "data": {"path": str(rows)},
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 16,
        "early_at": 0.1,
        "save_strategy": "no",
        "logging_steps": 20,
    }
    sft.run("tiny", overrides(keys))
    return folder / "sft"


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer counts as ended: the early model has not learnt to end."""
    call = Generator.__call__

    def ended(self: Generator, *arguments: Any, **keywords: Any) -> list[Answer]:
        return [Answer(one.text, one.tokens, True) for one in call(self, *arguments, **keywords)]

    monkeypatch.setattr(Generator, "__call__", ended)
