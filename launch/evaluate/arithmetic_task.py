"""How many held-out sums and differences an exported model gets right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from launch.evaluate.generation import Generator

BOXED = r"\\boxed\{[^{}\n]*\}"
MAX_ANSWER_TOKENS = 80
"""The longest worked answer of the arithmetic source takes 66 tokens where digits are single ones."""


class Problem(Protocol):
    """A question, as the arithmetic source writes it, and its answer as digits (`data.arithmetic.Problem` is one)."""

    @property
    def question(self) -> str: ...
    @property
    def answer(self) -> object: ...


@dataclass(frozen=True)
class Answered:
    """One problem with what the model wrote."""

    question: str
    expected: str
    written: str
    correct: bool


@dataclass(frozen=True)
class ArithmeticResult:
    """Exact-match accuracy; `examples` holds every problem in the order given."""

    correct: int
    total: int
    examples: list[Answered]

    @property
    def accuracy(self) -> float:
        """Share of correct answers."""
        return self.correct / self.total


def boxed_answer(text: str) -> str | None:
    r"""Contents of the first \boxed{…} in a text, without surrounding blanks; None where there is none."""
    match = re.search(BOXED, text)
    return match.group()[len(r"\boxed{") : -1].strip() if match else None


def arithmetic_accuracy(export: Path | Generator, problems: Sequence[Problem], batch: int = 200) -> ArithmeticResult:
    r"""Ask each question once, greedily, and compare what stands in the first \boxed{} with the answer.

    `export`: an exported folder, or its generator. `batch`: questions at a time.
    """
    generator = export if isinstance(export, Generator) else Generator(export)
    written = generator.continue_texts(
        [prompt_of(problem) for problem in problems],
        max_new_tokens=MAX_ANSWER_TOKENS,
        batch_size=batch,
        stop_after=BOXED,
    )
    examples = [
        Answered(problem.question, str(problem.answer), text, boxed_answer(text) == str(problem.answer))
        for problem, text in zip(problems, written, strict=True)
    ]
    return ArithmeticResult(sum(example.correct for example in examples), len(examples), examples)


def prompt_of(problem: Problem) -> str:
    """The question and the line break that the arithmetic source writes after it."""
    return problem.question.rstrip("\n") + "\n"
