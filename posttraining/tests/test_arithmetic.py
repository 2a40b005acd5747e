"""The generated task: exact answers, no held-out problem in any training text, the same problems from one seed."""

from __future__ import annotations

import hashlib
import re

import pytest

from posttraining.answers import is_right, keeps_format
from posttraining.errors import Mistake
from posttraining.tasks import arithmetic
from posttraining.tasks.arithmetic import STYLES, Problem, problems, worked_answer


def test_the_hash_rule_is_the_one_of_the_docstring() -> None:
    def by_hand(text: str) -> bool:
        return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32 < 0.1

    for left, right in ((47, 86), (86, 47), (123, 45), (10, 10), (999, 1)):
        low, high = sorted((left, right))
        assert arithmetic.is_held_out(left, "+", right) == by_hand(f"{low}+{high}")
        assert arithmetic.is_held_out(left, "-", right) == by_hand(f"{left}-{right}")


def test_splits_have_no_problem_in_common_and_no_text_of_training_shows_a_held_out_one() -> None:
    held_out = {problem.expression for problem in problems(1, 400, "held_out")}
    assert len(held_out) == 400
    for row in arithmetic.chats(2, 2000):
        text = " ".join(turn["content"] for turn in row["messages"])
        for left, sign, right in re.findall(r"(?<![\d+-])(\d+)([+-])(\d+)(?![\d+-])(?!\d*b)", text):
            if int(left) > 9 and int(right) > 9:  # not the steps of single digits
                assert not arithmetic.is_held_out(int(left), sign, int(right)), text
                assert f"{left}{sign}{right}" not in held_out


def test_every_style_of_an_answer_is_right_and_keeps_the_format() -> None:
    for problem in problems(3, 200, "train"):
        lengths = []
        for style in STYLES:
            text = worked_answer(problem, style)
            assert is_right(text, problem.answer)
            assert keeps_format(text, thinking=True)
            for left, sign, right, carry, result in re.findall(r"(\d)([+-])(\d)[+-](\d)=(\d+)", text):
                value = int(left) + int(right) + int(carry) if sign == "+" else int(left) - int(right) - int(carry)
                assert int(result) == value % (10 if sign == "-" else 100)
            lengths.append(len(text))
        assert lengths == sorted(lengths)


def test_answers_of_known_problems() -> None:
    problem = Problem(147, "+", 86, "What is {}?")
    assert (problem.question, problem.plain_prompt) == ("What is 147+86?", "Compute 147+86?\n")
    text = "<think>\n7+6+0=13; 4+8+1=13; 1+0+1=2\n</think>\nThe answer is \\boxed{233}."
    assert worked_answer(problem, "short") == text
    assert "2-8-0=4b; 4-1-1=2" in worked_answer(Problem(42, "-", 18, "{}"), "short")


def test_problems_are_a_function_of_seed_and_split() -> None:
    assert problems(5, 50, "train") == problems(5, 50, "train")
    assert problems(5, 50, "train") != problems(6, 50, "train")
    assert problems(5, 50, "train") == problems(5, 80, "train")[:50]
    signs = [problem.sign for problem in problems(5, 400, "train")]
    assert 140 < signs.count("+") < 260


def test_more_problems_than_there_are_is_a_mistake() -> None:
    with pytest.raises(Mistake, match="examples: 1000000: expected at most 20000 problems of the split held_out"):
        problems(1, 10**6, "held_out")
