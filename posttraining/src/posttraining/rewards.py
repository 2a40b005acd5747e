"""Rewards of GRPO, and finding those that a recipe names by their dotted path.

A reward is called as TRL calls it: keyword arguments `prompts`, `completions`, `completion_ids` and, of the data, the
column `answer` and those that a reward of the recipe has as parameters. It returns one number for each completion, or
None where the example has no verdict. A completion is a list of one message, `[{"role": "assistant", "content": "…"}]`.
"""

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttraining.answers import is_right, keeps_format, strip_reasoning
from posttraining.errors import NO_VALUE, StageFailed, mistake

Reward = Callable[..., list[float | None]]
Completion = Sequence[Mapping[str, str]]

GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""What TRL calls every reward with, beside the columns of the data."""
SILENT_CALLS = 3
"""Calls without any verdict, from the first on, after which a reward is taken to have none ever."""


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


class CheckedReward:
    """A reward that must say what `Reward` does: a finite number or None for each completion.

    A class and no closure, so that rollout workers can be handed it.
    """

    def __init__(self, function: Reward, path: str) -> None:
        """`path`: what messages call the reward."""
        self.function, self.path = function, path
        self.__name__ = getattr(function, "__name__", path.rpartition(".")[2])
        self._silent_calls: int | None = 0

    def __call__(self, **columns: Any) -> list[float | None]:
        """What the reward says. Raises Mistake for a row without what it needs, StageFailed where its words
        are no list of numbers, or never a number at all."""
        for name in _required(self.function):
            if name not in GIVEN and any(value is None for value in columns.get(name, [None])):
                raise mistake(None, "data", NO_VALUE, f"a row has no {name!r}, which the reward {self.path} needs")
        values = self.function(**columns)
        wanted = len(columns["completions"])
        try:
            verdicts = [None if value is None else float(value) for value in values]
        except (TypeError, ValueError) as error:
            raise StageFailed(f"{self.path}: expected a list of numbers, not {values!r:.80}") from error
        if len(verdicts) != wanted:
            raise StageFailed(f"{self.path}: gave {len(verdicts)} numbers for {wanted} completions")
        for verdict in verdicts:
            if verdict is not None and not math.isfinite(verdict):
                raise StageFailed(f"{self.path}: gave {verdict}; expected finite numbers, or None for no verdict")
        self._count_silence(verdicts)
        return verdicts

    def _count_silence(self, verdicts: Sequence[float | None]) -> None:
        """A batch whose answers cannot be read has no verdict; the first three in a row are no accident."""
        if self._silent_calls is None:
            return
        self._silent_calls = self._silent_calls + 1 if all(verdict is None for verdict in verdicts) else None
        if self._silent_calls == SILENT_CALLS:
            raise StageFailed(f"{self.path}: gave None for every completion of its first {SILENT_CALLS} batches")


def resolve(choices: Sequence[RewardChoice], file: str) -> list[Reward]:
    """The functions that the rewards of the recipe `file` name, in order; what they say is checked at every call.

    Raises Mistake for a path that does not import, something that cannot be called, arguments that do not fit, or a
    weight that is no finite number.
    """
    if not choices:
        raise mistake(file, "rewards", [], "expected at least one, such as posttraining.rewards.accuracy")
    for number, choice in enumerate(choices):
        if not math.isfinite(choice.weight):
            raise mistake(
                file, f"rewards.{number}.weight", choice.weight, f"expected a finite number for {choice.path}"
            )
    rewards: list[Reward] = []
    for number, choice in enumerate(choices):
        reward = _resolve(choice, file, f"rewards.{number}")
        asynchronous: bool = inspect.iscoroutinefunction(reward)  # the trainer awaits these itself
        rewards.append(reward if asynchronous else CheckedReward(reward, choice.path))
    return rewards


def columns_of(rewards: Sequence[Reward]) -> list[str]:
    """The columns of the data that rewards, as `resolve` gives them, have as parameters."""
    parameters = [name for reward in rewards for name in _named(getattr(reward, "function", reward))]
    return [name for name in parameters if name not in GIVEN]


def check_answers(rewards: Sequence[Reward], data: Any, file: str) -> None:
    """Raise Mistake where a reward asks for a column that the rows of prompts lack, or for the answer of a row without.

    `rewards`: as `resolve` gives them.
    """
    for reward in rewards:
        function, path = getattr(reward, "function", reward), getattr(reward, "path", str(reward))
        for name in _required(function):
            if name not in (*GIVEN, *data.column_names):
                raise mistake(file, "data", NO_VALUE, f"row 0 has no {name!r}, which the reward {path} needs")
            if name in data.column_names and None in data[name]:
                row = list(data[name]).index(None)
                raise mistake(file, "data", NO_VALUE, f"row {row} has no {name!r}, which the reward {path} needs")


def _required(function: Any) -> list[str]:
    """The names of the parameters that a call must give; none where they cannot be known."""
    return [name for name, one in _named(function).items() if one.default is inspect.Parameter.empty]


def _named(function: Any) -> dict[str, inspect.Parameter]:
    """The parameters that a call may give by name; none where they cannot be known."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: one for name, one in parameters.items() if one.kind in kinds}


def _takes_any_column(function: Any) -> bool:
    """Whether a function takes every column of the data, as rewards are called; True where that cannot be known."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return True
    return not inspect.isclass(function) and any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)


def _resolve(choice: RewardChoice, file: str, key: str) -> Reward:
    """`key`: of the choice in `file`, for messages."""
    found = _imported(choice.path, file, key)
    if choice.arguments:
        return _made(found, choice, file, key)
    if not _takes_any_column(found):
        needs = f"({', '.join(_required(found))})"
        expected = f"expected a reward, which takes **kwargs, or {key}.arguments {needs} for what makes one"
        raise mistake(file, f"{key}.path", choice.path, expected)
    return found


def _imported(path: str, file: str, key: str) -> Any:
    expected = "expected a dotted path that imports, such as posttraining.rewards.accuracy"
    module, _, name = path.rpartition(".")
    if not all(part.isidentifier() for part in path.split(".")):
        raise mistake(file, f"{key}.path", path, f"does not import (no absolute path); {expected}")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module may raise whatever it likes while it is imported
        raise mistake(file, f"{key}.path", path, f"does not import ({error}); {expected}") from error
    if not callable(found):
        raise mistake(file, f"{key}.path", path, f"is a {type(found).__name__} and no function; {expected}")
    return found


def _made(found: Any, choice: RewardChoice, file: str, key: str) -> Reward:
    try:
        made: Reward = found(**choice.arguments)
    except TypeError as error:
        raise mistake(
            file, f"{key}.arguments", choice.arguments, f"{choice.path} does not take them: {error}"
        ) from error
    if not callable(made):
        raise mistake(file, f"{key}.arguments", choice.arguments, f"{choice.path} is a reward itself and takes none")
    return made


def _text(completion: Completion) -> str:
    return completion[0]["content"]
