import hashlib
import re

import pytest

from data.arithmetic import document, held_out_problems, is_held_out

DOCUMENTS = [document(1, index, held_out=False) for index in range(4000)]
PROBLEM = re.compile(r"(?<!\d)(\d\d)([+-])(\d\d)(?!\d)")


def by_hash(left: int, sign: str, right: int) -> bool:
    """The rule as it is documented, written down once more."""
    text = f"{min(left, right)}+{max(left, right)}" if sign == "+" else f"{left}-{right}"
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) < 2**32 / 10


def test_a_document_is_a_pure_function_of_seed_and_index() -> None:
    assert [document(1, index, held_out=False) for index in range(50)] == DOCUMENTS[:50]
    assert document(2, 0, held_out=False) != DOCUMENTS[0]


def test_no_training_document_shows_a_held_out_problem() -> None:
    shown = {(int(a), sign, int(b)) for text in DOCUMENTS for a, sign, b in PROBLEM.findall(text)}
    assert len(shown) > 3000 and not any(by_hash(*problem) for problem in shown)


def test_validation_documents_pose_held_out_problems() -> None:
    for index in range(300):
        a, sign, b = PROBLEM.findall(document(1, index, held_out=True))[0]
        assert by_hash(int(a), sign, int(b))


def test_every_line_of_every_document_is_exact() -> None:
    for text in DOCUMENTS:
        left, sign, right = re.match(r"(?:Compute )?(\d\d)([+-])(\d\d)[?=]", text).groups()  # type: ignore[union-attr]
        a, b = int(left), int(right)
        result = a + b if sign == "+" else a - b
        if text.startswith("Compute"):
            assert text.endswith(f"\nThe answer is \\boxed{{{result}}}.")
        else:
            assert text == f"{a}{sign}{b}={result}"
        for equation in re.findall(r"\d+[+-]\d+[+-]\d=\d+b?", text):
            x, y, carry, value, borrows = re.match(r"(\d+)[+-](\d+)[+-](\d)=(\d+)(b?)", equation).groups()  # type: ignore[union-attr]
            total = int(x) + int(y) + int(carry) if "+" in equation else int(x) - int(y) - int(carry)
            assert int(value) - (10 if borrows else 0) == total
        for first, opposite, second, third in re.findall(r"Check: (\d+)([+-])(\d+)=(\d+)\.", text):
            assert int(third) == int(first) + (int(second) if opposite == "+" else -int(second))


def test_the_layout_is_units_first_with_carry_and_borrow() -> None:
    carried = next(text for text in DOCUMENTS if text.startswith("Compute 47+8") and "7+" in text)
    units = int(carried[len("Compute 47+8")])
    assert carried.splitlines()[1] == f"7+{units}+0={7 + units}; 4+8+{(7 + units) // 10}={12 + (7 + units) // 10}"
    borrowed = next(text for text in DOCUMENTS if text.startswith("Compute 52-") and "b;" in text)
    assert re.match(r"2-\d-0=\db; 5-\d-1=\d$", borrowed.splitlines()[1])


def test_the_variants_have_their_shares() -> None:
    size = len(DOCUMENTS)
    bare = sum(not text.startswith("Compute") for text in DOCUMENTS) / size
    twice = sum("Once more: " in text for text in DOCUMENTS) / size
    check = sum("Check: " in text for text in DOCUMENTS) / size - twice
    assert (bare, twice, check) == pytest.approx((0.06, 0.145, 0.145), abs=0.02)


def test_the_evaluation_has_four_hundred_different_held_out_problems() -> None:
    problems = held_out_problems(400, 1)
    assert len({problem.question for problem in problems}) == 400
    assert problems == held_out_problems(400, 1) != held_out_problems(400, 2)
    signs = set()
    for problem in problems:
        a, sign, b = re.fullmatch(r"Compute (\d\d)([+-])(\d\d)\?\n", problem.question).groups()  # type: ignore[union-attr]
        assert is_held_out(int(a), sign, int(b))
        assert int(problem.answer) == (int(a) + int(b) if sign == "+" else int(a) - int(b)) >= 0
        signs.add(sign)
    assert signs == {"+", "-"}


def test_a_tenth_of_all_problems_is_held_out() -> None:
    assert len(held_out_problems(820, 1)) == 820
    with pytest.raises(ValueError, match="there are 820"):
        held_out_problems(821, 1)
