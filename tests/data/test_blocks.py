"""The order of blocks: each once an epoch whatever the sequences' length, neighbours together where they can be."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import recipe_with, train_tokens, write_source

import data.blocks
from data.blocks import BlockOrder, Reading
from data.coverage import coverage
from data.order import Permutation, derive_key, derive_keys, permutations
from data.plan import DataPlan
from nanotron_recipes.errors import UserError
from nanotron_recipes.frozen import changes_of_the_past
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.sequences import tokens_through

STRETCHES = st.sampled_from([1, 2, 3, 4, 8, 16])


@pytest.fixture
def few_open_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that small sources have many groups of open stretches."""
    monkeypatch.setattr(data.blocks, "OPEN_BLOCKS", 32)


def order_of(order: BlockOrder, first: int, count: int) -> list[int]:
    return order.blocks(np.arange(first, first + count, dtype=np.int64)).tolist()


@pytest.mark.usefixtures("few_open_blocks")
@settings(deadline=None)
@given(
    num_blocks=st.integers(1, 400),
    stretch=STRETCHES,
    readings=st.lists(st.tuples(st.integers(0, 500), st.integers(1, 20)), max_size=4),
    seed=st.integers(0, 2**32),
)
def test_every_block_is_read_once_an_epoch_whatever_lengths_it_is_read_at(
    num_blocks: int, stretch: int, readings: list[tuple[int, int]], seed: int
) -> None:
    lengths = tuple(Reading(first, blocks) for first, blocks in sorted(readings))
    order = BlockOrder(num_blocks, seed, "source", stretch, lengths)
    for epoch in range(3):
        assert sorted(order_of(order, epoch * num_blocks, num_blocks)) == list(range(num_blocks))


@pytest.mark.usefixtures("few_open_blocks")
@settings(deadline=None)
@given(num_blocks=st.integers(300, 2000), changed_at=st.integers(0, 900), length=st.sampled_from([2, 4, 8]))
def test_after_a_change_sequences_are_neighbouring_blocks_once_the_open_ones_are_read(
    num_blocks: int, changed_at: int, length: int
) -> None:
    order = BlockOrder(num_blocks, 3, "source", 8, (Reading(0, 1), Reading(changed_at, length)))
    blocks = np.array(order_of(order, changed_at, 200 * length)).reshape(200, length)
    whole = (np.diff(blocks, axis=1) == 1).all(axis=1)
    positions = changed_at + length * np.arange(200)
    # Of each group of open stretches, the rest of an epoch included, at most the first and the last sequence is cut.
    places = positions % num_blocks
    in_old_group = (positions < changed_at + 32 + 7) & (positions // num_blocks == changed_at // num_blocks)
    inner = (places % 32 != 0) & (places % 32 + length <= 32) & (places < num_blocks // 32 * 32 - 32)
    assert whole[~in_old_group & inner].mean() > 0.95
    assert order_of(order, 0, changed_at) == order_of(BlockOrder(num_blocks, 3, "source", 8), 0, changed_at)


def test_a_run_of_one_length_reads_one_permutation_an_epoch() -> None:
    order = BlockOrder(1000, 7, "source", 1, (Reading(0, 1),))
    for epoch in range(2):
        keyed = Permutation(1000, derive_key(7, "windows", "source", epoch))
        assert order_of(order, 1000 * epoch, 1000) == [keyed.at(i) for i in range(1000)]


def test_epochs_have_different_orders() -> None:
    order = BlockOrder(500, 7, "source", 4, (Reading(0, 1),))
    assert order_of(order, 0, 500) != order_of(order, 500, 500)


def test_neighbours_in_a_stretch_are_read_far_apart() -> None:
    """As far as those of a permutation of all open blocks: a third of their number on average."""
    order = BlockOrder(4 * data.blocks.OPEN_BLOCKS, 1, "source", 16, (Reading(0, 1),))
    place = np.empty(order.num_blocks, dtype=np.int64)
    place[order_of(order, 0, order.num_blocks)] = np.arange(order.num_blocks)
    apart = np.abs(np.diff(place.reshape(-1, 16), axis=1))
    assert apart.mean() == pytest.approx(data.blocks.OPEN_BLOCKS / 3, rel=0.03)


@given(size=st.integers(1, 200), keys=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5))
def test_permutations_made_together_are_those_made_one_by_one(size: int, keys: list[int]) -> None:
    together = permutations(size, keys)
    assert together.tolist() == [[Permutation(size, key).at(i) for i in range(size)] for key in keys]


def test_keys_made_together_are_those_made_one_by_one() -> None:
    for parts in ((7,), (3, "batch"), ("a", 2, "b")):
        assert derive_keys(*parts, last=range(5, 9)) == [derive_key(*parts, number) for number in range(5, 9)]


# The whole plan: three sources, three stages, two of them longer.

L, BATCH = 8, 24


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Three sources; every token of a source is different, so that a window can be told by its tokens."""
    names = ["one", "two", "three"]
    for number, (name, total) in enumerate(zip(names, (3001, 1600, 799), strict=True)):
        generator = np.random.default_rng(number)
        cuts = np.sort(generator.choice(np.arange(1, total), total // 15, replace=False))
        documents = np.split(np.arange(total) + number * 3001, cuts)
        middle = len(documents) // 2
        write_source(tmp_path / name, [documents[:middle], documents[middle:-3], documents[-3:]], vocab_size=9003)
    return [str(tmp_path / name) for name in names]


def growing(folders: list[str], **tokens: int) -> Recipe:
    one, two, three = folders
    stages = [(1, {one: 0.5, two: 0.5}), (11, {three: 0.7, one: 0.3}), (18, {two: 0.2, three: 0.3, one: 0.5})]
    return recipe_with(
        stages,
        sequence_length=L,
        global_batch_size=BATCH,
        vocab_size=9003,
        train_steps=1000,
        lengths=(None, 2 * L, 4 * L),
        tokens=tokens,
    )


def array_hash(plan: DataPlan, step: int, dp: int) -> str:
    """Of the global batch's arrays in the order of the ranks."""
    size = BATCH // dp
    parts = [plan.step(step, dp=dp, dp_rank=rank, num_micro_batches=1, micro_batch_size=size) for rank in range(dp)]
    rows = hashlib.sha256(repr({batch.num_valid_targets for batch in parts}).encode())
    for name in ("tokens", "target_mask", "position_ids"):
        rows.update(np.concatenate([getattr(batch.micro_batches[0], name) for batch in parts]).tobytes())
    return rows.hexdigest()


def test_the_global_sequence_is_the_same_at_any_dp_over_1000_steps_and_three_stages(folders: list[str]) -> None:
    """Also across a change of dp in the middle of the run, which is a new plan that starts there."""
    plans = {dp: DataPlan.from_recipe(growing(folders)) for dp in (1, 2, 3, 8)}
    hashes = {dp: [array_hash(plan, step, dp) for step in range(1, 1001)] for dp, plan in plans.items()}
    assert len({tuple(found) for found in hashes.values()}) == 1
    assert len(set(hashes[1])) == 1000
    changing = [(1, 2), (400, 8), (401, 3), (700, 1)]
    found = []
    for (first, dp), (end, _) in zip(changing, [*changing[1:], (1001, 0)], strict=True):
        plan = DataPlan.from_recipe(growing(folders))
        found += [array_hash(plan, step, dp) for step in range(first, end)]
    assert found == hashes[1]


@pytest.mark.usefixtures("few_open_blocks")
@pytest.mark.parametrize("contiguous", [None, L, 8 * L])
def test_every_block_of_every_source_is_read_once_an_epoch_over_changes_of_length(
    folders: list[str], contiguous: int | None
) -> None:
    recipe = growing(folders) if contiguous is None else growing(folders, contiguous_length=contiguous)
    plan = DataPlan.from_recipe(recipe)
    read: dict[str, list[int]] = {name: [] for name in folders}
    for step in range(1, 61):
        planned = plan.planned(step)
        assert planned.blocks.shape == (BATCH, {1: 1, 2: 2, 3: 4}[1 + plan.stage_of(step)])
        for number, blocks in zip(planned.numbers.tolist(), planned.blocks.tolist(), strict=True):
            read[planned.stage.sources[number].name] += blocks
    for name, blocks in read.items():
        size = plan.sources[name].blocks_per_epoch
        counts = np.bincount(blocks, minlength=size)
        assert len(blocks) > size, "more than an epoch"
        # The samples of the step in which an epoch ends are permuted: one epoch may be ahead of the other in it.
        assert counts.min() >= len(blocks) // size and counts.max() <= -(-len(blocks) // size)


def test_a_sequence_of_several_pieces_restarts_where_it_goes_on_elsewhere(folders: list[str]) -> None:
    """With blocks that do not stay together, tokens are not predicted from text that is not theirs."""
    plan = DataPlan.from_recipe(growing(folders, contiguous_length=L))
    batch = plan.step(20, dp=1, dp_rank=0, num_micro_batches=1, micro_batch_size=BATCH).micro_batches[0]
    assert batch.tokens.shape == (BATCH, 4 * L + 1)
    follows = np.diff(batch.tokens, axis=1) == 1
    assert not follows.all() and not batch.target_mask[~follows].any()
    positions = batch.position_ids
    assert (positions[:, 1:][~batch.target_mask[:, :-1]] == 0).all()
    assert (np.diff(positions, axis=1)[batch.target_mask[:, :-1]] == 1).all()
    assert batch.target_mask.sum() == plan.planned(20).num_valid_targets


def test_the_past_does_not_depend_on_a_later_stage_of_longer_sequences(folders: list[str]) -> None:
    """Where it was said from the start how long they may become; otherwise the run may not go on with it."""
    stages = [(1, {folders[0]: 1.0}), (11, {folders[0]: 1.0})]
    sizes = {"sequence_length": L, "global_batch_size": BATCH, "vocab_size": 9003}
    short = recipe_with(stages[:1], tokens={"contiguous_length": 4 * L}, **sizes)
    longer = recipe_with(stages, tokens={"contiguous_length": 4 * L}, lengths=(None, 4 * L), **sizes)
    one, other = DataPlan.from_recipe(short), DataPlan.from_recipe(longer)
    assert [array_hash(one, step, 1) for step in range(1, 11)] == [array_hash(other, step, 1) for step in range(1, 11)]
    assert changes_of_the_past(short, longer, 10) == []
    unprepared = recipe_with(stages[:1], **sizes)
    changes = changes_of_the_past(unprepared, recipe_with(stages, lengths=(L, 4 * L), **sizes), 10)
    assert [str(change) for change in changes] == ["tokens.contiguous_length: 8 → 32"]


def test_tokens_are_counted_over_changes_of_length(folders: list[str]) -> None:
    recipe = growing(folders)
    assert tokens_through(recipe, 0) == 0
    assert tokens_through(recipe, 10) == 10 * BATCH * L
    assert tokens_through(recipe, 12) == (10 + 2 * 2) * BATCH * L
    assert tokens_through(recipe, 20) == (10 + 7 * 2 + 3 * 4) * BATCH * L
    plan = DataPlan.from_recipe(recipe)
    assert sum(line.tokens for line in coverage(recipe, train_tokens(plan))) == tokens_through(recipe, 1000)


def test_a_length_that_is_not_made_of_blocks_is_refused(folders: list[str]) -> None:
    one = {folders[0]: 1.0}
    with pytest.raises(
        UserError, match=r"data_stages\.1\.sequence_length: 12: expected a multiple of .*block_length 8"
    ):
        recipe_with([(1, one), (5, one)], lengths=(None, 12))
    with pytest.raises(UserError, match=r"tokens\.contiguous_length: 20: expected a multiple of the block_length 8"):
        recipe_with([(1, one)], tokens={"contiguous_length": 20})
    recipe_with([(1, one), (5, one)], lengths=(None, 12), tokens={"block_length": 4})
