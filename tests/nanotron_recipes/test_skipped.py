"""Which batch a step reads where some are skipped."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import dump_yaml, load_recipe
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schedule import learning_rate_at, stage_at, stage_boundaries
from nanotron_recipes.skipped import SkippedBatches, keep_ranges

Ranges = list[tuple[int, int]]
STEPS = 60
RANGES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 15)).map(lambda r: (r[0], r[0] + r[1])), max_size=6)


def numbers(ranges: Ranges) -> set[int]:
    return {number for first, end in ranges for number in range(first, end)}


@given(RANGES)
def test_steps_read_in_order_what_is_not_skipped_and_leave_out_nothing_else(ranges: Ranges) -> None:
    skipped = SkippedBatches(ranges)
    read = [skipped.batch_of(step) for step in range(1, STEPS + 1)]
    assert all(later > earlier for earlier, later in pairwise(read))
    assert set(range(1, read[-1] + 1)) - set(read) == {number for number in numbers(ranges) if number <= read[-1]}
    for step, batch in enumerate(read, 1):
        assert batch == step + sum(number < batch for number in numbers(ranges))
        assert skipped.step_of(batch) == step


@given(RANGES, st.randoms(use_true_random=False))
def test_order_and_overlap_of_the_ranges_do_not_matter(ranges: Ranges, generator: object) -> None:
    shuffled = ranges + ranges[:2]
    generator.shuffle(shuffled)  # type: ignore[attr-defined]
    singles = [(number, number + 1) for number in sorted(numbers(ranges))]
    for other in (shuffled, singles):
        assert str(SkippedBatches(other)) == str(SkippedBatches(ranges))
        assert SkippedBatches(other).first_difference(SkippedBatches(ranges)) is None


@given(RANGES, st.integers(1, 50), st.integers(0, 30))
def test_a_skipped_batch_belongs_to_the_step_that_reads_the_next_one(ranges: Ranges, first: int, length: int) -> None:
    skipped, end = SkippedBatches(ranges), first + length
    for batch in range(first, end):
        expected = min(step for step in range(1, 200) if skipped.batch_of(step) >= batch)
        assert skipped.step_of(batch) == expected
    stretches = list(skipped.read_between(first, end))
    assert numbers(stretches) == set(range(first, end)) - numbers(ranges)
    assert all(start < stop for start, stop in stretches) and stretches == sorted(stretches)


@given(RANGES, RANGES, st.integers(0, STEPS))
def test_two_sets_read_the_same_until_the_first_difference(one: Ranges, other: Ranges, step: int) -> None:
    ours, theirs = SkippedBatches(one), SkippedBatches(other)
    first = ours.first_difference(theirs)
    assert first == min(numbers(one) ^ numbers(other), default=None) == theirs.first_difference(ours)
    is_same = [ours.batch_of(t) for t in range(1, step + 1)] == [theirs.batch_of(t) for t in range(1, step + 1)]
    assert is_same == (first is None or first > ours.batch_of(step))


def skipping(*ranges: str) -> Recipe:
    return load_recipe("tiny", [f"data_skipped_ranges=[{', '.join(ranges)}]"]).recipe


def test_stages_follow_the_batches_and_the_learning_rate_the_step() -> None:
    plain, recipe = skipping(), skipping("{first: 101, end: 151}", "{first: 560, end: 570}")
    assert stage_boundaries(plain) == [(1, 551), (551, 793), (793, 1101)]
    assert stage_boundaries(recipe) == [(1, 501), (501, 733), (733, 1101)]
    assert [stage_at(recipe, step)[0] for step in (500, 501, 732, 733)] == [0, 1, 1, 2]
    assert [learning_rate_at(recipe, step) for step in (5, 900)] == [learning_rate_at(plain, step) for step in (5, 900)]


def test_a_range_survives_the_file_and_an_empty_one_is_refused() -> None:
    recipe = skipping("{first: 7, end: 9, spike_step: 8}")
    assert "- first: 7\n  end: 9\n  spike_step: 8\n" in dump_yaml(recipe)
    with pytest.raises(UserError, match=r"data_skipped_ranges.0.end: 7: expected more than first 7"):
        skipping("{first: 7, end: 7}")


def test_a_run_keeps_its_own_ranges_whatever_a_recipe_says() -> None:
    run = skipping("{first: 3, end: 5}", "{first: 70, end: 90, spike_step: 80}")
    kept = keep_ranges(run, skipping("{first: 3, end: 5}"))
    assert kept.data_skipped_ranges == run.data_skipped_ranges and keep_ranges(run, run) is run
    assert [entry.first for entry in keep_ranges(run, skipping()).data_skipped_ranges] == [70]
