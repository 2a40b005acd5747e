"""Rewards: the length penalty point by point, accuracy and format on what models write, and paths that do not fit."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl.rewards import get_soft_overlong_punishment

from posttraining.errors import Mistake
from posttraining.rewards import (
    RewardChoice,
    accuracy,
    math_accuracy,
    resolve,
    soft_overlong_penalty,
    think_format,
    waits,
)


def said(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


THOUGHT = "<think>\n7+6+0=13\n</think>\n"


@pytest.mark.parametrize(
    ("tokens", "penalty"),
    [(0, 0), (2499, 0), (2500, 0), (2501, -0.002), (2600, -0.2), (2750, -0.5), (2999, -0.998), (3000, -1), (3001, -1)],
)
def test_penalty_of_the_2500_to_3000_zone(tokens: int, penalty: float) -> None:
    assert soft_overlong_penalty(3000, 500)([[0] * tokens]) == [pytest.approx(penalty, abs=1e-12)]


@given(zone=st.integers(1, 60).flatmap(lambda longest: st.tuples(st.just(longest), st.integers(1, longest))))
def test_penalty_equals_trls_at_every_length(zone: tuple[int, int]) -> None:
    answers = [[0] * length for length in range(zone[0] + 3)]
    assert soft_overlong_penalty(*zone)(answers) == pytest.approx(get_soft_overlong_punishment(*zone)(answers))


@pytest.mark.parametrize(("longest", "cache"), [(100, 0), (100, -1), (100, 101)])
def test_a_zone_that_is_none_is_refused(longest: int, cache: int) -> None:
    with pytest.raises(Mistake, match=f"soft_punish_cache: {cache}: expected above 0 and at most"):
        soft_overlong_penalty(longest, cache)


def test_accuracy_reads_the_last_box_after_the_thoughts() -> None:
    texts = [
        THOUGHT + r"The answer is \boxed{133}.",
        r"<think>\boxed{133}</think> The answer is \boxed{132}.",
        r"<think>it must be \boxed{133}",
        r"First \boxed{1}, no: \boxed{ 133 }.",
        "133",
    ]
    assert accuracy(completions=said(*texts), answer=["133"] * 5) == [1, 0, 0, 1, 0]


def test_math_accuracy_takes_equal_forms_and_strips_thoughts() -> None:
    texts = [
        THOUGHT + r"\boxed{\frac{1}{2}}",
        r"\boxed{0.5}",
        r"<think>\boxed{0.5}</think>\boxed{2}",
        r"<think>\boxed{0.5}",
    ]
    assert math_accuracy(completions=said(*texts), answer=[r"\frac{1}{2}", "1/2", "0.5", "0.5"]) == [1, 1, 0, 0]


def test_think_format_wants_one_closed_thought_and_one_box() -> None:
    good = THOUGHT + r"The answer is \boxed{133}."
    bad = [r"\boxed{133}", "<think>x\\boxed{1}", good + r" \boxed{2}", "<think><think>a</think>" + good, "x" + good]
    assert think_format(completions=said(good, *bad)) == [1, 0, 0, 0, 0, 0]


def test_waits_are_counted_in_any_case() -> None:
    assert waits(completions=said("Wait, wait. Await", "no")) == [3, 0]


def test_paths_become_functions_and_factories_are_called() -> None:
    choices = [
        RewardChoice("posttraining.rewards.accuracy"),
        RewardChoice(
            "posttraining.rewards.soft_overlong_penalty", 0.1, {"max_completion_len": 4, "soft_punish_cache": 2}
        ),
        RewardChoice("trl.rewards.think_format_reward"),
    ]
    exact, penalty, _ = resolve(choices, "grpo.yaml")
    assert getattr(exact, "function", None) is accuracy and exact.__name__ == "accuracy"
    assert penalty(completions=said("a"), completion_ids=[[0] * 3]) == [-0.5]


@pytest.mark.parametrize(
    ("path", "arguments", "reason"),
    [
        ("posttraining.rewards.acuracy", {}, "does not import"),
        ("no.such.module", {}, "does not import"),
        ("accuracy", {}, "does not import"),
        ("posttraining.errors.NO_VALUE", {}, "is a object and no function"),
        ("posttraining.rewards.soft_overlong_penalty", {"max_length": 3}, "does not take them"),
        (
            "posttraining.rewards.soft_overlong_penalty",
            {"max_completion_len": 3, "soft_punish_cache": 9},
            "expected above 0",
        ),
    ],
)
def test_a_reward_that_does_not_fit_is_a_mistake_of_the_recipe(
    path: str, arguments: dict[str, Any], reason: str
) -> None:
    with pytest.raises(Mistake, match=reason):
        resolve([RewardChoice(path, arguments=arguments)], "grpo.yaml")


def test_no_rewards_are_a_mistake() -> None:
    with pytest.raises(Mistake, match=r"grpo.yaml: rewards: \[\]: expected at least one"):
        resolve([], "grpo.yaml")
