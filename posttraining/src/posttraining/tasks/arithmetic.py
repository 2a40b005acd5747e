r"""Sums and differences of numbers with two or three digits, for a model that a laptop trains.

    user       What is 147+86?
    assistant  <think>
               7+6+0=13; 4+8+1=13; 1+0+1=2
               Check: 233-86=147.
               </think>
               The answer is \boxed{233}.

Units come first; the third term is the carry, and a difference ends a digit in `b` where it borrows. One answer in
three is short, one also checks, one also goes over it once more: redundant on purpose, so that a length penalty has
something to remove. Whether a problem is held out is decided by its own hash alone, by the rule that the pretraining
corpus of nanotron-recipes follows: the first four bytes of sha256 of `47+86` (operands of a sum in rising order) or
`86-47`, as a big-endian number, lie in the lowest tenth. What pretraining held out is thus trained on nowhere.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any, Literal

from posttraining.errors import mistake

HELD_OUT_SHARE = 0.1
SMALLEST, LARGEST = 10, 999
"""Of the larger operand and of the result; differences are not negative."""
TWO_DIGIT_SHARE = 0.5
"""Of the problems have two digits in both operands."""

WORDINGS = ("What is {}?", "Compute {}?", "Find the value of {}?")
"""How a problem is asked."""

MOST = {"train": 200_000, "held_out": 20_000}
"""Problems that may be asked for: a quarter of those there are, so that drawing ends soon."""

Style = Literal["short", "check", "repeat"]
Split = Literal["train", "held_out"]
STYLES: tuple[Style, ...] = ("short", "check", "repeat")


@dataclass(frozen=True)
class Problem:
    """One problem with the question it is asked by."""

    left: int
    sign: str
    """+ or -."""
    right: int
    wording: str
    """One of WORDINGS."""

    @property
    def expression(self) -> str:
        """`47+86`."""
        return f"{self.left}{self.sign}{self.right}"

    @property
    def question(self) -> str:
        """The user's turn."""
        return self.wording.format(self.expression)

    @property
    def plain_prompt(self) -> str:
        """The prompt in the form that the base model was pretrained on, with the line break before its answer."""
        return f"Compute {self.expression}?\n"

    @property
    def answer(self) -> str:
        """The number that belongs into \\boxed{}, in decimal."""
        return str(self.left + self.right if self.sign == "+" else self.left - self.right)


def is_held_out(left: int, sign: str, right: int) -> bool:
    """Whether `left sign right` (sign + or -) is for evaluation only."""
    if sign == "+":
        left, right = min(left, right), max(left, right)
    digest = hashlib.sha256(f"{left}{sign}{right}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def problems(seed: int, n: int, split: Split) -> list[Problem]:
    """`n` problems of a split, no expression twice, sums and differences mixed: a pure function of its arguments.

    Raises Mistake for more than MOST.
    """
    if n > MOST[split]:
        raise mistake("arithmetic", "examples", n, f"expected at most {MOST[split]} problems of the split {split}")
    draw = random.Random(f"arithmetic {split} {seed}")
    found: dict[str, Problem] = {}
    while len(found) < n:
        left, sign, right = _operands(draw)
        if is_held_out(left, sign, right) == (split == "held_out"):
            problem = Problem(left, sign, right, draw.choice(WORDINGS))
            found.setdefault(problem.expression, problem)
    return list(found.values())


def _operands(draw: random.Random) -> tuple[int, str, int]:
    two_digits = draw.random() < TWO_DIGIT_SHARE
    largest = 99 if two_digits else LARGEST
    if draw.random() < 0.5:
        total = draw.randint(2 * SMALLEST, 2 * largest if two_digits else largest)
        left = draw.randint(max(SMALLEST, total - largest), min(largest, total - SMALLEST))
        return left, "+", total - left
    left, right = draw.randint(SMALLEST, largest), draw.randint(SMALLEST, largest)
    return max(left, right), "-", min(left, right)


def worked_answer(problem: Problem, style: Style) -> str:
    """The assistant's turn for a problem.

    A check that would show a held-out problem is left out, and the answer then is short.
    """
    digits = "; ".join(_digit_steps(problem))
    first, opposite, second = int(problem.answer), "-" if problem.sign == "+" else "+", problem.right
    lines = [digits]
    if style != "short" and not is_held_out(first, opposite, second):
        lines.append(f"Check: {first}{opposite}{second}={problem.left}.")
        if style == "repeat":
            lines.append(f"Once more: {digits}")
    thoughts = "\n".join(lines)
    return f"<think>\n{thoughts}\n</think>\nThe answer is \\boxed{{{problem.answer}}}."


def _digit_steps(problem: Problem) -> list[str]:
    left, right, carry, steps = problem.left, problem.right, 0, []
    while left or right:
        x, y = left % 10, right % 10
        if problem.sign == "+":
            value = x + y + carry
            steps.append(f"{x}+{y}+{carry}={value}")
            carry = value // 10
        else:
            value = x - y - carry
            steps.append(f"{x}-{y}-{carry}={value % 10}{'b' if value < 0 else ''}")
            carry = int(value < 0)
        left, right = left // 10, right // 10
    return steps


def chats(seed: int, n: int) -> list[dict[str, Any]]:
    """`n` training conversations, as rows {"messages": [user, assistant]}; each style is a third of them."""
    draw = random.Random(f"styles {seed}")
    return [
        {
            "messages": [
                {"role": "user", "content": problem.question},
                {"role": "assistant", "content": worked_answer(problem, draw.choice(STYLES))},
            ]
        }
        for problem in problems(seed, n, "train")
    ]


def prompts(seed: int, n: int, split: Split) -> list[dict[str, Any]]:
    """`n` prompts of a split, as rows {"prompt": [user], "answer": text}."""
    return [
        {"prompt": [{"role": "user", "content": problem.question}], "answer": problem.answer}
        for problem in problems(seed, n, split)
    ]
