import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_data import random_documents, recipe_with, write_source
from tokenizers import Tokenizer, models

from data.batch import StepBatch
from data.plan import DataPlan
from data.repetition import repetition_notes
from nanotron_recipes.errors import UserError
from nanotron_recipes.recipe import Recipe

S, BATCH = 8, 12


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Three sources; every token of a source is different, so that a window can be told by its tokens."""
    names = ["one", "two", "three"]
    for number, name in enumerate(names):
        generator = np.random.default_rng(number)
        tokens = iter(range(number * 2000, number * 2000 + 700))
        files = []
        for size in (300, 40, 360):
            left, documents = size, []
            while left:
                length = min(left, int(generator.integers(1, 30)))
                documents.append([next(tokens) for _ in range(length)])
                left -= length
            files.append(documents)
        write_source(tmp_path / name, files, vocab_size=6000)
    return [str(tmp_path / name) for name in names]


def three_stages(folders: list[str], **changes: Any) -> Recipe:
    one, two, three = folders
    stages = [
        (1, {one: 0.5, two: 0.5}),
        (11, {three: 0.7, one: 0.3}),
        (18, {two: 0.2, three: 0.3, one: 0.5}),
    ]
    return recipe_with(stages, sequence_length=S, global_batch_size=BATCH, vocab_size=6000, **changes)


def global_batch(plan: DataPlan, step: int, dp: int = 1, micro_batch_size: int = 1) -> list[StepBatch]:
    micro_batches = BATCH // dp // micro_batch_size
    return [
        plan.step(step, dp=dp, dp_rank=rank, num_micro_batches=micro_batches, micro_batch_size=micro_batch_size)
        for rank in range(dp)
    ]


def digest(batches: list[StepBatch]) -> str:
    rows = hashlib.sha256()
    for name in ("input_ids", "target_ids", "target_mask", "position_ids"):
        for batch in batches:
            for micro_batch in batch.micro_batches:
                rows.update(np.ascontiguousarray(getattr(micro_batch, name)).tobytes())
    return rows.hexdigest()


def test_the_global_batch_is_the_same_for_every_dp_and_micro_batch(folders: list[str]) -> None:
    plan = DataPlan.from_recipe(three_stages(folders))
    for step in range(1, 31):
        expected = digest(global_batch(plan, step))
        for dp, micro_batch_size in [(1, 12), (2, 3), (3, 2), (4, 3), (6, 1), (12, 1)]:
            assert digest(global_batch(plan, step, dp, micro_batch_size)) == expected


def test_a_step_does_not_depend_on_the_steps_before_it(folders: list[str]) -> None:
    in_order = [digest(global_batch(DataPlan.from_recipe(three_stages(folders)), step)) for step in range(1, 21)]
    plan = DataPlan.from_recipe(three_stages(folders))
    assert [digest(global_batch(plan, step)) for step in range(20, 0, -1)] == in_order[::-1]


def test_the_number_of_valid_targets_is_that_of_the_global_batch(folders: list[str]) -> None:
    plan = DataPlan.from_recipe(three_stages(folders))
    for step in range(1, 31):
        batches = global_batch(plan, step, dp=3, micro_batch_size=2)
        counted = sum(int(part.target_mask.sum()) for batch in batches for part in batch.micro_batches)
        assert {batch.num_valid_targets for batch in batches} == {counted}


def windows_read(plan: DataPlan, steps: range) -> dict[str, list[int]]:
    """By source, the first tokens of the windows in the order in which the mixture asked for them."""
    read: dict[str, list[int]] = {name: [] for name in plan.sources}
    for step in steps:
        planned = plan.planned(step)
        for number, blocks in zip(planned.numbers.tolist(), planned.blocks.tolist(), strict=True):
            source = planned.stage.sources[number]
            read[source.name].extend(block * source.block_length for block in blocks)
    return read


def test_every_window_is_read_once_an_epoch_over_all_stages(folders: list[str]) -> None:
    """Batches permute the samples, so an epoch may end anywhere inside one: counts may then differ by one epoch."""
    plan = DataPlan.from_recipe(three_stages(folders))
    for name, starts in windows_read(plan, range(1, 61)).items():
        windows = plan.sources[name].blocks_per_epoch
        counts = np.bincount(np.array(starts) // S, minlength=windows)
        assert counts.sum() == len(starts) and np.array(starts).max() < windows * S
        assert counts.min() >= len(starts) // windows and counts.max() <= -(-len(starts) // windows)


def test_every_token_is_a_target_once_an_epoch(folders: list[str]) -> None:
    recipe = recipe_with([(1, {folders[0]: 1.0})], sequence_length=S, global_batch_size=29, vocab_size=6000)
    plan = DataPlan.from_recipe(recipe)
    windows = plan.sources[folders[0]].blocks_per_epoch
    assert windows == 3 * 29, "three steps are an epoch"
    for epoch in range(3):
        targets = []
        for step in range(3 * epoch + 1, 3 * epoch + 4):
            batch = plan.step(step, dp=1, dp_rank=0, num_micro_batches=1, micro_batch_size=29)
            targets.append(batch.micro_batches[0].target_ids)
        assert np.array_equal(np.sort(np.concatenate(targets), axis=None), np.arange(1, windows * S + 1))


def test_a_later_stage_leaves_the_earlier_ones_as_they_were(folders: list[str]) -> None:
    plan = DataPlan.from_recipe(three_stages(folders))
    shorter = DataPlan.from_recipe(recipe_with([(1, {folders[0]: 0.5, folders[1]: 0.5})], vocab_size=6000))
    for step in range(1, 11):
        assert digest(global_batch(plan, step)) == digest(global_batch(shorter, step))


def test_a_stage_has_the_shares_of_its_weights(folders: list[str]) -> None:
    plan = DataPlan.from_recipe(three_stages(folders))
    read = windows_read(plan, range(11, 18))
    assert [len(read[name]) for name in folders] == [pytest.approx(84 * 0.3, abs=1), 0, pytest.approx(84 * 0.7, abs=1)]
    assert global_batch(plan, 11)[0].stage == "stage 1"


SKIPPED = [{"first": 4, "end": 7}, {"first": 6, "end": 9}, {"first": 15, "end": 20}]


def test_where_batches_are_skipped_the_others_are_what_they_were(folders: list[str]) -> None:
    """A skipped stretch may reach over a stage's border: samples, names and stages belong to the batch."""
    plan = DataPlan.from_recipe(three_stages(folders))
    skipping = DataPlan.from_recipe(three_stages(folders, data_skipped_ranges=SKIPPED))
    read = [1, 2, 3, 9, 10, 11, 12, 13, 14, 20, 21, 22]
    assert skipping.fingerprint == plan.fingerprint
    for step, batch in enumerate(read, 1):
        assert digest(global_batch(skipping, step, 3, 2)) == digest(global_batch(plan, batch, 3, 2))
        assert skipping.source_names(step) == plan.source_names(batch)
        assert global_batch(skipping, step)[0].stage == global_batch(plan, batch)[0].stage


@pytest.mark.parametrize(("skipped", "last"), [([], 25), (SKIPPED, 35)])
def test_coverage_counts_what_is_read(skipped: list[dict[str, int]], last: int, folders: list[str]) -> None:
    plan = DataPlan.from_recipe(three_stages(folders, train_steps=25, data_skipped_ranges=skipped))
    read = windows_read(plan, range(1, 26))
    passed = windows_read(DataPlan.from_recipe(three_stages(folders)), range(1, last + 1))
    lines = plan.coverage()
    for name in folders:
        mine = [line for line in lines if line.source == name]
        assert sum(line.samples for line in mine) == len(read[name])
        assert mine[-1].epochs == pytest.approx(len(passed[name]) / plan.sources[name].blocks_per_epoch)


def test_sources_that_are_read_many_times_over_are_named(folders: list[str]) -> None:
    assert repetition_notes(DataPlan.from_recipe(three_stages(folders, train_steps=60))) == []
    plan = DataPlan.from_recipe(three_stages(folders, train_steps=100))
    epochs = {line.source: line.epochs for line in plan.coverage()}
    assert max(epochs.values()) > 4 > min(epochs.values())
    notes = repetition_notes(plan)
    assert {note.split(":")[0] for note in notes} == {name for name, times in epochs.items() if times > 4}
    assert any(
        f"its 700 training tokens are read {max(epochs.values()):.1f} times over in 100" in note for note in notes
    )


@pytest.mark.parametrize("dp", [1, 2, 5])
def test_validation_windows_are_dealt_once_to_the_ranks(folders: list[str], dp: int) -> None:
    plan = DataPlan.from_recipe(three_stages(folders))
    parts = [
        plan.validation(folders[0], 17, dp=dp, dp_rank=rank, micro_batch_size=2, min_micro_batches=3)
        for rank in range(dp)
    ]
    batches = [batch for part in parts for batch in part.micro_batches]
    targets = np.sort(np.concatenate([batch.target_ids[batch.target_mask] for batch in batches]))
    whole = plan.validation(folders[0], 17, micro_batch_size=17).micro_batches[0]
    assert np.array_equal(targets, np.sort(whole.target_ids[whole.target_mask]))
    assert {part.num_valid_targets for part in parts} == {len(targets)}
    assert len({len(part.micro_batches) for part in parts}) == 1 and len(parts[0].micro_batches) >= 3
    assert {batch.input_ids.shape for batch in batches} == {(2, S)}


def test_fewer_held_out_windows_than_asked_for_are_all_read(folders: list[str]) -> None:
    plan = DataPlan.from_recipe(three_stages(folders))
    batches = plan.validation(folders[0], 1000, micro_batch_size=1).micro_batches
    assert len(batches) == 299 // S


def test_a_missing_source_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder; run `nanotron-recipes tokenize"):
        DataPlan.from_recipe(recipe_with([(1, {str(tmp_path / "absent"): 1.0})]))
    with pytest.raises(UserError, match=r"no manifest\.json in it"):
        DataPlan.from_recipe(recipe_with([(1, {str(tmp_path): 1.0})]))


def test_shards_with_more_tokens_than_the_model_are_refused_and_with_fewer_read(folders: list[str]) -> None:
    with pytest.raises(UserError, match=r"model\.model_config\.vocab_size: 500: .* a vocabulary of 6000"):
        DataPlan.from_recipe(recipe_with([(1, {folders[0]: 1.0})], vocab_size=500))
    same, larger = (DataPlan.from_recipe(recipe_with([(1, {folders[0]: 1.0})], vocab_size=v)) for v in (6000, 70_000))
    assert larger.fingerprint == same.fingerprint
    assert larger.sources[folders[0]].train.vocab_size == 6000, "a token beyond the tokenizer's is damage"


@pytest.mark.parametrize(("key", "value", "found"), [("token_size_in_bytes", 4, 2), ("vocab_size", 5000, 6000)])
def test_shards_of_another_form_than_the_recipe_says_are_refused(
    key: str, value: int, found: int, folders: list[str]
) -> None:
    for said in (found, value):
        recipe = recipe_with([(1, {folders[0]: 1.0})], vocab_size=6000)
        stage = recipe.data_stages[0]
        dataset = stage.data.dataset.model_copy(update={key: said})
        stages = [stage.model_copy(update={"data": stage.data.model_copy(update={"dataset": dataset})})]
        recipe = recipe.model_copy(update={"data_stages": stages})
        if said == found:
            DataPlan.from_recipe(recipe)
            continue
        with pytest.raises(UserError, match=rf"dataset\.{key}: {value}: the shards in .* have {found}"):
            DataPlan.from_recipe(recipe)


def test_a_sequence_longer_than_the_source_is_refused(folders: list[str]) -> None:
    with pytest.raises(UserError, match="only 700 training tokens"):
        DataPlan.from_recipe(recipe_with([(1, {folders[0]: 1.0})], vocab_size=6000, sequence_length=700))


def test_shards_of_another_tokenizer_are_refused(folders: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    recipe = recipe_with([(1, {folders[0]: 1.0})], vocab_size=6000, tokenizer={"tokenizer_name_or_path": str(folder)})
    with pytest.raises(UserError, match="not made with the tokenizer in"):
        DataPlan.from_recipe(recipe)


def test_the_fingerprint_changes_with_the_shards_alone(folders: list[str], tmp_path: Path) -> None:
    plan = DataPlan.from_recipe(three_stages(folders))
    again = DataPlan.from_recipe(three_stages(folders, train_steps=99))
    assert plan.fingerprint == again.fingerprint
    write_source(Path(folders[1]), [random_documents(3, 50, 20, 6000)], vocab_size=6000)
    changed = DataPlan.from_recipe(three_stages(folders))
    assert changed.fingerprint != plan.fingerprint
    differing = {name for name in folders if changed.source_fingerprints[name] != plan.source_fingerprints[name]}
    assert differing == {folders[1]}


def test_shards_may_move_and_stages_may_be_added(folders: list[str], tmp_path: Path) -> None:
    short, long = (
        DataPlan.from_recipe(recipe_with(stages, train_steps=20, vocab_size=6000))
        for stages in (
            [(1, {folders[0]: 0.5, folders[1]: 0.5})],
            [(1, {folders[0]: 0.5, folders[1]: 0.5}), (11, {folders[2]: 1.0})],
        )
    )
    assert short.fingerprint == short.fingerprint_through(1) == long.fingerprint_through(10)
    assert long.fingerprint_through(11) == long.fingerprint != short.fingerprint
    moved = [str(shutil.copytree(folder, tmp_path / "moved" / Path(folder).name)) for folder in folders]
    there = DataPlan.from_recipe(recipe_with([(1, {moved[0]: 0.5, moved[1]: 0.5})], train_steps=20, vocab_size=6000))
    assert there.fingerprint == short.fingerprint
    swapped = DataPlan.from_recipe(recipe_with([(1, {moved[1]: 0.5, moved[0]: 0.5})], train_steps=20, vocab_size=6000))
    assert swapped.fingerprint != short.fingerprint
