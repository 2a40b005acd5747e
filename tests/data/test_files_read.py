"""Which files a run reads is worked out from manifests alone, and is what it reads."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import random_documents, recipe_with, write_source

from data.manifest import Manifest
from data.plan import DataPlan
from data.readings import files_read
from data.sources import read_source_manifests
from nanotron_recipes.recipe import Recipe


def files_touched(recipe: Recipe) -> dict[str, set[int]]:
    """By source, the files that hold a token of any step's windows, last targets included."""
    plan = DataPlan.from_recipe(recipe)
    ends = {
        name: np.cumsum([file.tokens for file in source.manifest.train.files]) for name, source in plan.sources.items()
    }
    found: dict[str, set[int]] = {name: set() for name in plan.sources}
    for step in range(1, recipe.tokens.train_steps + 1):
        planned = plan.planned(step)
        for piece in planned.pieces(slice(0, plan.global_batch_size)):
            name = planned.stage.sources[piece.source].name
            first, last = np.searchsorted(ends[name], [piece.start, piece.start + piece.length], side="right").tolist()
            found[name] |= set(range(first, last + 1))
    return found


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    for number, name in enumerate(("one", "two")):
        # Files of very different sizes, some shorter than a block.
        files = [random_documents(10 * number + i, size, 9) for i, size in enumerate([40, 1, 1, 90, 3, 60, 30, 1, 200])]
        write_source(folder / name, files)
    return {name: folder / name for name in ("one", "two")}


@settings(max_examples=25, deadline=None)
@given(
    steps=st.integers(1, 12),
    boundary=st.integers(2, 8),
    weights=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    long=st.sampled_from([None, 8, 32]),
    together=st.sampled_from([None, 32]),
)
def test_the_files_that_are_staged_are_those_that_windows_touch(
    sources: dict[str, Path],
    steps: int,
    boundary: int,
    weights: tuple[int, int],
    long: int | None,
    together: int | None,
) -> None:
    one, two = map(str, sources.values())
    recipe = recipe_with(
        [(1, {one: weights[0], two: weights[1]}), (boundary, {two: 1.0})],
        sequence_length=8,
        global_batch_size=4,
        train_steps=steps,
        lengths=[None, long],
        tokens={"contiguous_length": together, "block_length": 8},
    )
    read = files_read(recipe, read_source_manifests(recipe))
    touched = files_touched(recipe)
    # A sequence of several pieces ends each of them where it goes on elsewhere: its last token may not be read.
    assert all(touched[name] <= set(read[name]) for name in touched)
    if long in (None, 8):
        assert {name: set(numbers) for name, numbers in read.items()} == touched


def test_whole_epochs_need_every_file_but_what_lies_beyond_the_last_block(sources: dict[str, Path]) -> None:
    one = str(sources["one"])
    recipe = recipe_with([(1, {one: 1.0})], sequence_length=8, global_batch_size=16, train_steps=10_000)
    manifests: dict[str, Manifest] = read_source_manifests(recipe)
    assert files_read(recipe, manifests)[one] == list(range(9))


def test_batches_that_a_run_may_skip_after_spikes_count(sources: dict[str, Path]) -> None:
    one = str(sources["one"])

    def number_of_files(**sections: object) -> int:
        recipe = recipe_with([(1, {one: 1.0})], global_batch_size=1, train_steps=1, **sections)
        return len(files_read(recipe, read_source_manifests(recipe))[one])

    few = number_of_files()
    assert few < number_of_files(guards={"rewind_after_spike": True}) == 9
    assert few < number_of_files(data_skipped_ranges=[{"first": 1, "end": 200}]) == 9
