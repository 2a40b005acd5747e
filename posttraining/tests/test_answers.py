r"""Final answers: a \boxed{} is found whole, whatever LaTeX stands in it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from posttraining.answers import boxed_answer, find_boxes, is_right, keeps_format
from posttraining.evaluate.scoring import judge
from posttraining.generation import Answer
from posttraining.pairs.filters import Filters
from posttraining.pairs.prompts import Prompt
from posttraining.pairs.settings import FilterSettings

HALF = r"The answer is \boxed{\frac{1}{2}}."

words = st.text("ab1 =\n", max_size=4)
latex = st.recursive(
    st.one_of(words, st.sampled_from([r"\{1, 2\}", r"\{", r"\}", r"1 \\ 2 \\", r"\cdot"])),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda parts: rf"\frac{{{parts[0]}}}{{{parts[1]}}}"),
        inner.map(lambda part: "{" + part + "}"),
    ),
    max_leaves=6,
)
filled = latex.filter(lambda text: text.strip() != "")


@given(st.lists(st.tuples(words, filled)), words)
def test_every_box_is_found_with_all_that_is_between_its_braces(boxes: list[tuple[str, str]], last: str) -> None:
    text = "".join(rf"{before}\boxed{{{content}}}" for before, content in boxes) + last
    found = find_boxes(text)
    assert [box.content for box in found] == [content.strip() for _, content in boxes]
    assert not found or text[found[-1].end :] == last
    assert boxed_answer(text) == (boxes[-1][1].strip() if boxes else None)


@given(filled, words, st.data())
def test_a_box_that_is_cut_short_is_none_and_hides_none(content: str, between: str, data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, len(content)))
    text = rf"\boxed{{3}}{between}\boxed{{" + content[:kept]
    assert [box.content for box in find_boxes(text)] == ["3"]


def test_the_inner_one_of_two_boxes_counts_and_an_empty_one_does_not() -> None:
    assert [box.content for box in find_boxes(r"\boxed{\boxed{3}} \boxed{} \boxed{ } \\\boxed{4}")] == ["3", "4"]


def test_a_fraction_is_right_keeps_the_format_and_makes_a_pair() -> None:
    assert is_right(HALF, r"\frac{1}{2}") and not is_right(HALF, "2")
    assert keeps_format(HALF, thinking=False)
    assert boxed_answer(r"first \boxed{3} then \boxed{x^{2}}") == "x^{2}"
    good, bad = (Answer(text, 9, stopped=True) for text in (HALF, r"\boxed{\frac{1}{3}}"))
    filters = Filters(FilterSettings(check="exact", format=True), thinking=False)
    assert filters.choose(Prompt([], r"\frac{1}{2}", held_out=False), [good], [bad]) == (good, bad)


def test_a_base_that_goes_on_is_judged_by_its_first_box() -> None:
    going_on = Answer(HALF + r" Compute 1+1? \boxed{2}", 9, stopped=True)
    assert judge(0, r"\frac{1}{2}", going_on, "plain").right


def test_a_degenerate_answer_is_read_in_one_pass() -> None:
    for part in (r"\boxed{", "{", "\\", "}", r"\boxed{ "):
        find_boxes(part * 100_000 + "}" * 100_000)
