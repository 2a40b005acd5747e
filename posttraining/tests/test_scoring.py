"""Scores: what counts as right, and the standard errors."""

import math
import statistics

import pytest

from posttraining.evaluate.scoring import Mode, Score, by_problem, estimate, gain, judge, summarize
from posttraining.generation import Answer

GOOD = "<think>\n7+6+0=13; 4+8+1=13\n</think>\nThe answer is \\boxed{133}."


@pytest.mark.parametrize(
    ("text", "mode", "right", "well_formed"),
    [
        (GOOD, "think", True, True),
        (GOOD, "no_think", True, False),
        ("The answer is \\boxed{133}.", "no_think", True, True),
        ("The answer is \\boxed{133}.", "think", True, False),
        ("<think>\\boxed{133}", "think", False, False),
        ("<think>a\\boxed{133}</think>\\boxed{1}", "think", False, True),
        ("7+6+0=13\nThe answer is \\boxed{133}.\nCompute 1+1?\nThe answer is \\boxed{2}.", "plain", True, True),
        ("7+6+0=13", "plain", False, False),
    ],
)
def test_an_answer_is_judged_after_its_thoughts(text: str, mode: Mode, right: bool, well_formed: bool) -> None:
    score = judge(3, "133", Answer(text, 9, stopped=True), mode)
    assert (score.problem, score.right, score.well_formed, score.tokens) == (3, right, well_formed, 9)


def test_equal_forms_are_right_where_mathematics_is_checked() -> None:
    half = Answer("<think>\n1:2\n</think>\n\\boxed{0.5}", 9, stopped=True)
    assert judge(0, "1/2", half, "think", "math").right
    assert not judge(0, "1/2", half, "think", "exact").right
    assert not judge(0, "1/3", half, "think", "math").right


def test_an_answer_cut_at_the_limit_keeps_no_format() -> None:
    assert not judge(0, "133", Answer(GOOD, 9, stopped=False), "think").well_formed


def test_error_is_that_of_a_mean() -> None:
    values = [0.0, 1.0, 1.0, 1.0]
    assert estimate(values).mean == 0.75
    assert estimate(values).error == pytest.approx(statistics.stdev(values) / 2)
    assert math.isnan(estimate([1.0]).error)


def test_answers_to_one_problem_are_one_draw() -> None:
    answers = [Score(problem, right, True, 5, True) for problem, right in [(1, True), (0, False), (0, True), (1, True)]]
    assert by_problem(answers, "right") == [0.5, 1.0]
    summary = summarize(answers)
    assert summary.n == 2
    assert summary.accuracy == estimate([0.5, 1.0])


def test_a_gain_on_the_same_problems_has_the_error_of_the_difference() -> None:
    before, after = [0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0]
    assert gain(before, after) == estimate([0.0, 1.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="zip"):
        gain(before, after[:3])
