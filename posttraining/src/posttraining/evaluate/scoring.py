"""Scores of generated answers with their standard errors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from posttraining.answers import boxed_answer, find_boxes, is_right, keeps_format
from posttraining.generation import Answer
from posttraining.rewards import math_accuracy

Mode = Literal["think", "no_think", "plain"]
Check = Literal["exact", "math"]
Kind = Literal["right", "well_formed", "tokens", "ended"]


@dataclass(frozen=True)
class Score:
    """One generated answer, judged."""

    problem: int
    """Its place among the problems, by which answers of different models are paired."""
    right: bool
    well_formed: bool
    tokens: int
    """Of the answer, the end-of-turn token included."""
    ended: bool
    """Whether it ended by itself and not at the limit."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.error:.3f}"


@dataclass(frozen=True)
class Summary:
    """Of all answers to one task."""

    n: int
    """Problems."""
    accuracy: Estimate
    format: Estimate
    tokens: Estimate
    ended: Estimate


def judge(problem: int, expected: str, answer: Answer, mode: Mode, check: Check = "exact") -> Score:
    r"""Judge an answer: thoughts are stripped, then the last \boxed{} is compared with `expected`.

    With `check` math, math-verify says whether they are equal: 1/2 is 0.5.

    A base model asked in its own plain form often goes on with further problems: of its text what follows the first
    \boxed{} is left out, and its format is that there is one and an end.
    """
    if mode == "plain":
        text, kept = _to_first_box(answer.text), boxed_answer(answer.text) is not None
    else:
        text, kept = answer.text, keeps_format(answer.text, thinking=mode == "think")
    right = is_right(text, expected) if check == "exact" else bool(math_accuracy([[{"content": text}]], [expected])[0])
    return Score(problem, right, kept and answer.stopped, answer.tokens, answer.stopped)


def _to_first_box(text: str) -> str:
    boxes = find_boxes(text)
    return text[: boxes[0].end] if boxes else text


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error s/√n, with n - 1 in s. One value has no error (nan)."""
    n = len(values)
    mean = sum(values) / n
    spread = sum((value - mean) ** 2 for value in values)
    return Estimate(mean, math.sqrt(spread / (n - 1) / n) if n > 1 else math.nan)


def by_problem(scores: Sequence[Score], kind: Kind) -> list[float]:
    """The mean of each problem's answers, in the order of the problems: the independent draws of a task."""
    values: dict[int, list[float]] = {}
    for score in scores:
        values.setdefault(score.problem, []).append(float(getattr(score, kind)))
    return [sum(group) / len(group) for _, group in sorted(values.items())]


def summarize(scores: Sequence[Score]) -> Summary:
    """All figures of one task; several answers to a problem count as one draw."""
    return Summary(
        n=len({score.problem for score in scores}),
        accuracy=estimate(by_problem(scores, "right")),
        format=estimate(by_problem(scores, "well_formed")),
        tokens=estimate(by_problem(scores, "tokens")),
        ended=estimate(by_problem(scores, "ended")),
    )


def gain(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """Mean rise from `before` to `after` over the same problems in the same order, with the error of that difference.

    Raises ValueError where the two are not of one length.
    """
    return estimate([new - old for old, new in zip(before, after, strict=True)])
