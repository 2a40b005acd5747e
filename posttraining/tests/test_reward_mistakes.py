"""Rewards that cannot be used are refused before training; those that say nonsense end it, in one line each."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from posttraining.datasets import from_rows
from posttraining.errors import Mistake, StageFailed
from posttraining.rewards import RewardChoice, check_answers, resolve

COMPLETIONS = [[{"role": "assistant", "content": "a"}]] * 2
PENALTY = "posttraining.rewards.soft_overlong_penalty"


def not_a_number(completions: list[Any], **_: Any) -> list[float]:
    return [math.nan for _ in completions]


def silent(completions: list[Any], **_: Any) -> list[None]:
    return [None for _ in completions]


def too_few(completions: list[Any], **_: Any) -> list[float]:
    return [1.0]


def words(completions: list[Any], **_: Any) -> list[str]:
    return ["good" for _ in completions]


def one_number(completions: list[Any], **_: Any) -> float:
    return 1.0


def of_a_column(completions: list[Any], difficulty: list[int], **_: Any) -> list[float]:
    return [float(value) for value in difficulty]


def test_a_row_without_what_a_reward_needs_is_no_traceback() -> None:
    with pytest.raises(Mistake, match=r"a row has no 'difficulty', which the reward test_reward_mistakes.of_a_column"):
        call("of_a_column")


def call(name: str, times: int = 1) -> None:
    (reward,) = resolve([RewardChoice(f"test_reward_mistakes.{name}")], "grpo.yaml")
    for _ in range(times):
        reward(prompts=["p"] * 2, completions=COMPLETIONS, completion_ids=[[1]] * 2)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("not_a_number", "gave nan; expected finite numbers"),
        ("too_few", "gave 1 numbers for 2 completions"),
        ("words", r"expected a list of numbers, not \['good', 'good'\]"),
        ("one_number", "expected a list of numbers, not 1.0"),
    ],
)
def test_a_reward_that_says_nonsense_ends_the_stage_by_its_path(name: str, said: str) -> None:
    with pytest.raises(StageFailed, match=f"^test_reward_mistakes.{name}: {said}"):
        call(name)


def test_a_reward_may_have_no_verdict_on_a_batch_and_not_on_every_one() -> None:
    call("silent", 2)
    with pytest.raises(StageFailed, match=r"test_reward_mistakes.silent: gave None for every completion"):
        call("silent", 3)


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (RewardChoice(".rewards.accuracy"), "does not import"),
        (RewardChoice("..accuracy"), "does not import"),
        (RewardChoice("broken_reward.score"), "does not import"),
        (RewardChoice("raising_reward.score"), "does not import"),
        (RewardChoice(PENALTY), r"or rewards.0.arguments \(max_completion_len, soft_punish_cache\)"),
        (RewardChoice("posttraining.rewards.waits", math.nan), "rewards.0.weight: nan: expected a finite number"),
        (RewardChoice("posttraining.rewards.waits", math.inf), "rewards.0.weight: inf: expected a finite number"),
    ],
)
def test_a_reward_that_cannot_be_used_is_refused(
    choice: RewardChoice, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_reward.py").write_text("def score(:\n")
    (tmp_path / "raising_reward.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(Mistake, match=said):
        resolve([choice], "grpo.yaml")


def test_a_reward_that_needs_an_answer_names_the_row_without_one() -> None:
    exact = resolve([RewardChoice("posttraining.rewards.accuracy")], "grpo.yaml")
    with pytest.raises(Mistake, match=r"data: row 0 has no 'answer', which the reward posttraining.rewards.accuracy"):
        check_answers(exact, from_rows([{"prompt": "a"}]), "grpo.yaml")
    with pytest.raises(Mistake, match="data: row 1 has no 'answer'"):
        check_answers(exact, from_rows([{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": None}]), "grpo.yaml")
    waits = resolve([RewardChoice("posttraining.rewards.waits")], "grpo.yaml")
    check_answers(waits, from_rows([{"prompt": "a"}]), "grpo.yaml")
