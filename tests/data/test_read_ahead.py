"""The batches of a run are the same however many threads read them ahead, at any sequence length."""

import hashlib

import numpy as np
import pytest
from small_data import recipe_with, write_source

from data.batch import StepBatch
from data.loader import Prefetcher, RankBatches
from data.plan import DataPlan

BATCH = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two sources of 300,000 tokens, documents of 1 to 4,000."""
    folder = tmp_path_factory.mktemp("sources")
    for number, name in enumerate(("one", "two")):
        generator = np.random.default_rng(number)
        tokens = generator.integers(0, 1000, 300_000)
        cuts = np.cumsum(generator.integers(1, 4000, 200))
        documents = np.split(tokens, cuts[cuts < len(tokens)])
        write_source(folder / name, [documents[:60], documents[60:]])
    return [str(folder / name) for name in ("one", "two")]


def digest(batch: StepBatch) -> str:
    rows = hashlib.sha256(repr((batch.num_valid_targets, batch.stage, batch.sources)).encode())
    for part in batch.micro_batches:
        for name in ("tokens", "target_mask", "position_ids"):
            rows.update(np.ascontiguousarray(getattr(part, name)).tobytes())
    return rows.hexdigest()


def hashes(plan: DataPlan, steps: range, workers: int, dp: int = 1, dp_rank: int = 0) -> list[str]:
    batches = RankBatches(plan, dp=dp, dp_rank=dp_rank, num_micro_batches=BATCH // dp, micro_batch_size=1)
    with Prefetcher(batches, steps.start, steps.stop - 1, workers) as loader:
        return [digest(batch) for batch in loader]


def test_0_and_4_workers_give_the_same_1000_steps_over_three_stages(folders: list[str]) -> None:
    one, two = folders
    stages = [(1, {one: 0.5, two: 0.5}), (301, {one: 0.2, two: 0.8}), (701, {two: 1.0})]
    recipe = recipe_with(stages, sequence_length=16, global_batch_size=BATCH, train_steps=1000, lengths=(16, 32, 64))
    found = [hashes(DataPlan.from_recipe(recipe), range(1, 1001), workers) for workers in (0, 1, 4)]
    assert found[0] == found[1] == found[2] and len(set(found[0])) == 1000
    # From any step on, on any rank.
    late = hashes(DataPlan.from_recipe(recipe), range(650, 760), 4)
    assert late == found[0][649:759]


@pytest.mark.parametrize("length", [2048, 8192, 32768, 131072])
def test_sequences_of_2k_to_128k_tokens(folders: list[str], length: int) -> None:
    recipe = recipe_with([(1, dict.fromkeys(folders, 0.5))], sequence_length=length, global_batch_size=BATCH)
    plan = DataPlan.from_recipe(recipe)
    ahead = hashes(plan, range(1, 5), 2, dp=2, dp_rank=1)
    assert ahead == hashes(plan, range(1, 5), 0, dp=2, dp_rank=1)
    batch = plan.step(1, dp=1, dp_rank=0, num_micro_batches=BATCH, micro_batch_size=1)
    assert {part.tokens.shape for part in batch.micro_batches} == {(1, length + 1)}
    assert sum(int(part.target_mask.sum()) for part in batch.micro_batches) == batch.num_valid_targets


def test_the_ring_is_filled_again_and_again_and_grows_with_the_sequences(folders: list[str]) -> None:
    made: list[tuple[int, ...]] = []

    def allocate(shape: tuple[int, ...], dtype: type[np.int64 | np.bool_], /) -> np.ndarray:
        made.append(shape)
        return np.empty(shape, dtype)

    recipe = recipe_with(
        [(1, {folders[0]: 1.0}), (31, {folders[0]: 1.0})], sequence_length=16, global_batch_size=BATCH, lengths=(16, 64)
    )
    batches = RankBatches(
        DataPlan.from_recipe(recipe), dp=1, dp_rank=0, num_micro_batches=3, micro_batch_size=2, allocate=allocate
    )
    with Prefetcher(batches, 1, 60, workers=2, depth=3) as loader:
        assert len([digest(batch) for batch in loader]) == 60
    assert len(made) == 2 * 4 * 3, "two lengths, four slots, three arrays each"
    assert {shape[1] for shape in made} == {16, 17, 64, 65}
