"""Which batch a step reads, where some batches are skipped: a pure function of the recipe and the step.

A batch is known by its number, the step that would read it if nothing were skipped; number n holds the same samples for
ever. `data_skipped_ranges` is a set of numbers, and step t reads the t-th batch that is not in it: batch t + the number
of skipped batches before that one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import zip_longest

from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schema.data import SkippedRange


class SkippedBatches:
    """A set of batches that no step reads. Every answer takes time in the number of ranges, whatever their length."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Of ranges first ≤ n < end in any order, which may overlap; from 1."""
        self._ranges: list[tuple[int, int]] = []
        for first, end in sorted(ranges):
            if self._ranges and first <= self._ranges[-1][1]:
                self._ranges[-1] = (self._ranges[-1][0], max(end, self._ranges[-1][1]))
            else:
                self._ranges.append((first, end))

    @classmethod
    def of(cls, recipe: Recipe) -> SkippedBatches:
        """The batches that a recipe skips."""
        return cls((skipped.first, skipped.end) for skipped in recipe.data_skipped_ranges)

    def batch_of(self, step: int) -> int:
        """Return the batch that step `step` (from 1) reads."""
        batch = step
        for first, end in self._ranges:
            if batch < first:
                break
            batch += end - first
        return batch

    def step_of(self, batch: int) -> int:
        """Return the step that reads `batch`, or of a skipped one the first batch after it."""
        return batch - sum(min(end, batch) - first for first, end in self._ranges if first < batch)

    def read_between(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the stretches of first ≤ n < end that are read, as (first, end), ascending and none of them empty."""
        for skipped_first, skipped_end in self._ranges:
            if first < min(skipped_first, end):
                yield first, min(skipped_first, end)
            first = max(first, skipped_end)
        if first < end:
            yield first, end

    def first_difference(self, other: SkippedBatches) -> int | None:
        """Return the first batch that is skipped in one of the two alone: steps that read batches before it read the
        same ones with both. None where both skip the same."""
        for mine, theirs in zip_longest(self._ranges, other._ranges):
            if mine is None or theirs is None:
                return (mine or theirs)[0]
            if mine != theirs:
                return min(mine[0], theirs[0]) if mine[0] != theirs[0] else min(mine[1], theirs[1])
        return None

    def __str__(self) -> str:
        """`17–36, 80–99`, or `none`."""
        return ", ".join(f"{first}–{end - 1}" for first, end in self._ranges) or "none"


def keep_ranges(run: Recipe, recipe: Recipe) -> Recipe:
    """Return `recipe` with the ranges that the run itself began to skip: they are the run's, whatever a file says.

    Ranges that a person wrote into a recipe stay that person's, and are compared as everything else is.
    """
    own = [skipped for skipped in run.data_skipped_ranges if skipped.spike_step is not None]
    missing = [skipped for skipped in own if skipped not in recipe.data_skipped_ranges]
    return with_ranges(recipe, missing) if missing else recipe


def with_ranges(recipe: Recipe, more: Iterable[SkippedRange]) -> Recipe:
    """Return the recipe with more ranges appended to those that it skips."""
    return recipe.model_copy(update={"data_skipped_ranges": [*recipe.data_skipped_ranges, *more]})
