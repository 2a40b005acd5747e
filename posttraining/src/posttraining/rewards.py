"""Rewards of GRPO, and finding those that a recipe names by their dotted path.

A reward is called as TRL calls it: keyword arguments `prompts`, `completions`, `completion_ids` and every column of the
data; it returns one number for each completion, or None where the example has no verdict. A completion is a list of
one message, `[{"role": "assistant", "content": "…"}]`.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttraining.answers import is_right, keeps_format, strip_reasoning
from posttraining.errors import mistake

Reward = Callable[..., list[float | None]]
Completion = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class RewardChoice:
    """One reward of a recipe."""

    path: str
    """Dotted path of the reward, `posttraining.rewards.accuracy`; with `arguments`, of what makes one from them."""
    weight: float = 1.0
    """What it is multiplied by before the rewards of an answer are added. 0: it is only logged."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of a factory, `{max_completion_len: 3000, soft_punish_cache: 512}`."""


def accuracy(completions: Sequence[Completion], answer: Sequence[str], **_: Any) -> list[float | None]:
    r"""1 where the last \boxed{} after the reasoning is exactly the column `answer`, else 0."""
    return [float(is_right(_text(one), right)) for one, right in zip(completions, answer, strict=True)]


def math_accuracy(completions: Sequence[Completion], answer: Sequence[str], **_: Any) -> list[float | None]:
    r"""1 where math-verify finds what follows the reasoning equal to the column `answer`, else 0.

    None where the answer of the data cannot be read. Completions without reasoning are scored whole, which TRL's
    `reasoning_accuracy_reward` would count as wrong.
    """
    from trl.rewards import accuracy_reward

    stripped = [[{"role": "assistant", "content": strip_reasoning(_text(one))}] for one in completions]
    solutions = [right if "$" in right or "\\" in right else f"${right}$" for right in answer]
    verdicts: list[float | None] = accuracy_reward(completions=stripped, solution=solutions)
    return verdicts


def think_format(completions: Sequence[Completion], **_: Any) -> list[float | None]:
    r"""1 for one closed think block followed by an answer with one \boxed{}, else 0."""
    return [float(keeps_format(_text(one), thinking=True)) for one in completions]


def waits(completions: Sequence[Completion], **_: Any) -> list[float | None]:
    """How often each completion says "wait": with weight 0 it feeds the alarm on reasoning that only grows."""
    return [float(_text(one).lower().count("wait")) for one in completions]


@dataclass(frozen=True)
class SoftOverlongPenalty:
    """See `soft_overlong_penalty`. A class and no closure, so that rollout workers can be handed it."""

    max_completion_len: int
    soft_punish_cache: int
    __name__ = "soft_overlong_penalty"

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float | None]:
        """One penalty, from -1 to 0, for each completion by its number of tokens."""
        free = self.max_completion_len - self.soft_punish_cache
        return [max(-1.0, min(0.0, (free - len(ids)) / self.soft_punish_cache)) for ids in completion_ids]


def soft_overlong_penalty(max_completion_len: int, soft_punish_cache: int) -> SoftOverlongPenalty:
    """The length penalty of DAPO, equation 13 (arXiv 2503.14476).

    With n tokens in an answer: 0 up to max_completion_len - soft_punish_cache, from there in a straight line down to
    -1 at max_completion_len, and -1 beyond. SmolLM3's zone of 2,500 to 3,000 tokens is (3000, 500). Answers longer
    than `max_completion_length` are cut before they are seen, so that should be at least max_completion_len.

    Raises Mistake for a zone that is empty or longer than the whole.
    """
    if not 0 < soft_punish_cache <= max_completion_len:
        expected = f"expected above 0 and at most max_completion_len, {max_completion_len}"
        raise mistake("soft_overlong_penalty", "soft_punish_cache", soft_punish_cache, expected)
    return SoftOverlongPenalty(max_completion_len, soft_punish_cache)


def resolve(choices: Sequence[RewardChoice], file: str) -> list[Reward]:
    """The functions that the rewards of the recipe `file` name, in order.

    Raises Mistake for a path that does not import, something that cannot be called, or arguments that do not fit.
    """
    if not choices:
        raise mistake(file, "rewards", [], "expected at least one, such as posttraining.rewards.accuracy")
    return [_resolve(choice, file) for choice in choices]


def _resolve(choice: RewardChoice, file: str) -> Reward:
    module, _, name = choice.path.rpartition(".")
    expected = "expected a dotted path that imports, such as posttraining.rewards.accuracy"
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise mistake(file, "rewards.path", choice.path, f"does not import ({error}); {expected}") from error
    if not callable(found):
        raise mistake(file, "rewards.path", choice.path, f"is a {type(found).__name__} and no function; {expected}")
    if not choice.arguments:
        return found
    try:
        made = found(**choice.arguments)
    except TypeError as error:
        raise mistake(
            file, "rewards.arguments", choice.arguments, f"{choice.path} does not take them: {error}"
        ) from error
    if not callable(made):
        raise mistake(file, "rewards.arguments", choice.arguments, f"{choice.path} is a reward itself and takes none")
    return made


def _text(completion: Completion) -> str:
    return completion[0]["content"]
