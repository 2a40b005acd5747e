"""A run that goes on from another's checkpoint reads on where its parent stopped, with longer sequences too."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from small_data import random_documents, recipe_with, write_source

import data.blocks
from data.plan import DataPlan
from nanotron_recipes.errors import UserError
from nanotron_recipes.frozen import changes_of_the_past
from nanotron_recipes.recipe import Recipe

L, BATCH = 8, 6
STAGES = st.lists(st.tuples(st.integers(1, 4), st.sampled_from([None, 2 * L, 4 * L])), max_size=2)
"""Stages by the steps that they take and the length of their sequences."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The last of them is read by branches alone."""
    folder = tmp_path_factory.mktemp("sources")
    for number, name in enumerate(("one", "two", "three")):
        write_source(folder / name, [random_documents(number, 50 + 40 * number, 30)])
    return [str(folder / name) for name in ("one", "two", "three")]


@pytest.fixture(scope="module", autouse=True)
def few_open_blocks() -> Iterator[None]:
    """So few that these sources have several groups of open stretches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.blocks, "OPEN_BLOCKS", 16)
        yield


def recipe_of(stages: list[tuple[int, int | None, list[str]]], contiguous: int | None) -> Recipe:
    """Stages by their first step, length and sources."""
    mixtures = [(first, {name: 1.0 + i for i, name in enumerate(names)}) for first, _, names in stages]
    return recipe_with(
        mixtures,
        sequence_length=L,
        global_batch_size=BATCH,
        train_steps=60,
        lengths=[length for _, length, _ in stages],
        tokens={"contiguous_length": contiguous},
    )


def blocks_read(plan: DataPlan, first: int, last: int) -> dict[str, list[int]]:
    """By source, the blocks that steps `first` … `last` read."""
    read: dict[str, list[int]] = {}
    for step in range(first, last + 1):
        planned = plan.planned(step)
        for number, blocks in zip(planned.numbers.tolist(), planned.blocks.tolist(), strict=True):
            read.setdefault(planned.stage.sources[number].name, []).extend(blocks)
    return read


@settings(max_examples=40, deadline=None)
@given(
    earlier=STAGES,
    later=STAGES,
    step=st.integers(1, 20),
    length=st.sampled_from([L, 2 * L, 4 * L, 8 * L]),
    parents=st.sampled_from([None, L, 4 * L, 8 * L]),
    branchs=st.sampled_from([None, L, 4 * L, 8 * L]),
)
def test_no_block_is_read_twice_or_left_out_over_a_parent_and_its_branch(
    sources: list[str],
    earlier: list[tuple[int, int | None]],
    later: list[tuple[int, int | None]],
    step: int,
    length: int,
    parents: int | None,
    branchs: int | None,
) -> None:
    """Wherever the branch is let go on, and after stages of any lengths. `parents` and `branchs` are the lengths that
    stay together; what the parent would have read later does not matter."""
    first, stages = 1, []
    for steps, longer in (*earlier, (step, None)):
        stages.append((first, longer, sources[:2]))
        first += steps
    step = first - 1
    new = [*stages, (first, length, sources)]
    for steps, longer in later:
        first += steps
        stages.append((first, longer, sources[1:2]))
    before, after = recipe_of(stages, parents), recipe_of(new, branchs)
    same = parents == branchs if parents or branchs else max(s[1] or L for s in stages) == max(s[1] or L for s in new)
    if changes_of_the_past(before, after, step):
        event("refused")
        assert not same
        return
    event("goes on")
    parent, branch = DataPlan.from_recipe(before), DataPlan.from_recipe(after)
    assert parent.fingerprint_through(step) == branch.fingerprint_through(step)
    read = blocks_read(parent, 1, step)
    assert blocks_read(branch, 1, step) == read
    for name, blocks in blocks_read(branch, step + 1, 60).items():
        all_blocks, size = [*read.get(name, []), *blocks], branch.sources[name].blocks_per_epoch
        # The samples of a step are permuted: an epoch that ends in it is whole only after it.
        counts = np.bincount(all_blocks, minlength=size)
        assert counts.max() - counts.min() <= 1, (name, counts)


def test_a_branch_of_its_new_stage_alone_is_refused_and_told_to_keep_its_parents(sources: list[str]) -> None:
    before = recipe_of([(1, None, sources[:1])], 4 * L)
    changes = changes_of_the_past(before, recipe_of([(1, 4 * L, sources[:1])], 4 * L), 10)
    assert [str(change) for change in changes] == ["data_stages.0.sequence_length: null → 32"], "a past of its own"
    new = [(11, {sources[0]: 1.0})]
    told = r"data_stages\.0\.start_training_step: 11: expected 1 for the first stage"
    with pytest.raises(
        UserError, match=rf"{told}; a run that goes on from .* keeps its parent's stages before its own$"
    ):
        recipe_with(new, checkpoints={"resume_checkpoint_path": "runs/parent/checkpoints/10"})
    with pytest.raises(UserError, match=rf"{told}$"):
        recipe_with(new)
