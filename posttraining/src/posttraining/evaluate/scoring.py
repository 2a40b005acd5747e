"""Scores of generated answers with their standard errors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from posttraining.answers import is_right, keeps_format


@dataclass(frozen=True)
class Score:
    """One generated answer, judged."""

    problem: str
    """The question, by which answers of different models are paired."""
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
    """Of all answers to one task in one way of asking."""

    n: int
    accuracy: Estimate
    format: Estimate
    tokens: Estimate
    ended: Estimate


def judge(problem: str, answer: str, text: str, tokens: int, *, ended: bool, thinking: bool) -> Score:
    """Judge a completion; reasoning is stripped before its answer is compared."""
    return Score(
        problem=problem,
        right=is_right(text, answer),
        well_formed=keeps_format(text, thinking=thinking, ended=ended),
        tokens=tokens,
        ended=ended,
    )


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error, s/√n with n-1 in s; for zeros and ones within 1/2n of √(p(1-p)/n).

    One value has no error (nan).
    """
    n = len(values)
    mean = sum(values) / n
    spread = sum((value - mean) ** 2 for value in values)
    return Estimate(mean, math.sqrt(spread / (n - 1) / n) if n > 1 else math.nan)


def summarize(scores: Sequence[Score]) -> Summary:
    """All figures of one task. Each problem counts as one independent draw."""
    return Summary(
        n=len(scores),
        accuracy=estimate([score.right for score in scores]),
        format=estimate([score.well_formed for score in scores]),
        tokens=estimate([score.tokens for score in scores]),
        ended=estimate([score.ended for score in scores]),
    )


def gain(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """Mean rise from `before` to `after` over the same problems in the same order, with the error of that difference.

    Raises ValueError where the two are not of one length.
    """
    return estimate([new - old for old, new in zip(before, after, strict=True)])
