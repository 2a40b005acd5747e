"""Staging from a folder: what is copied, what a start finds out about copies, and going on after an interruption."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small_data import random_documents, recipe_with, write_source

from data.manifest import MANIFEST_NAME, STAGED_NAME
from data.plan import DataPlan
from data.sources import open_sources
from data.staged import NotStaged, StagedLog, read_staged
from data.staging import StagingFailed, plan_staging, stage
from data.transfer import Watch
from nanotron_recipes.errors import UserError
from nanotron_recipes.recipe import Recipe

FILES = 8


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """A source of 8 files, each of a few kB."""
    write_source(tmp_path / "shared/words", [random_documents(i, 100, 50) for i in range(FILES)])
    (tmp_path / "shared/words/00008.ds").touch()  # datatrove leaves such a file behind
    return tmp_path / "shared/words"


def recipe_of(origin: Path | str, disk: Path, **tokens: int) -> Recipe:
    return recipe_with(
        [(1, {str(origin): 1.0})],
        sequence_length=8,
        global_batch_size=tokens.get("global_batch_size", 64),
        train_steps=tokens.get("train_steps", 60),
        data_staging={"path": str(disk), "workers": tokens.get("workers", 4)},
    )


def copy_of(recipe: Recipe) -> Path:
    """The folder that the recipe's source is staged to."""
    (source,) = plan_staging(recipe).sources
    return source.folder


def stage_all(recipe: Recipe, watch: Watch | None = None) -> None:
    stage(recipe, plan_staging(recipe), watch or Watch())


def test_a_run_reads_the_same_from_copies(origin: Path, tmp_path: Path) -> None:
    recipe = recipe_of(origin, tmp_path / "nvme")
    with pytest.raises(NotStaged, match=r"nvme/.*/shared/words: not staged yet; run `nanotron-recipes data stage"):
        open_sources(recipe)
    told: list[int] = []
    stage_all(recipe, Watch(advance=told.append))
    copies = copy_of(recipe)
    assert copies == tmp_path / "nvme" / origin.relative_to("/")
    names = {str(path.relative_to(origin)) for path in origin.rglob("*") if path.is_file()} - {"00008.ds"}
    assert {str(path.relative_to(copies)) for path in copies.rglob("*") if path.is_file()} == {*names, STAGED_NAME}
    assert sum(told) == sum((copies / name).stat().st_size for name in names - {MANIFEST_NAME})
    there = recipe_with([(1, {str(origin): 1.0})], sequence_length=8, global_batch_size=64, train_steps=60)
    assert DataPlan.from_recipe(recipe).fingerprint == DataPlan.from_recipe(there).fingerprint
    assert not plan_staging(recipe).bytes_to_stage


def test_dataset_read_path_is_where_copies_lie(origin: Path, tmp_path: Path) -> None:
    recipe = recipe_with([(1, {str(origin): 1.0})], sequence_length=8, train_steps=2)
    stage_data = recipe.data_stages[0].data
    dataset = stage_data.dataset.model_copy(update={"dataset_read_path": [str(tmp_path / "here")]})
    data = stage_data.model_copy(update={"dataset": dataset})
    recipe = recipe.model_copy(update={"data_stages": [recipe.data_stages[0].model_copy(update={"data": data})]})
    stage_all(recipe)
    assert next(iter(open_sources(recipe).values())).folder == tmp_path / "here"


def test_only_files_that_some_step_reads_are_staged_and_read(origin: Path, tmp_path: Path) -> None:
    recipe = recipe_of(origin, tmp_path / "nvme", global_batch_size=1, train_steps=3)
    stage_all(recipe)
    copies = copy_of(recipe)
    assert 0 < len(list(copies.glob("*.ds"))) < FILES
    plan = DataPlan.from_recipe(recipe)
    for step in (1, 2, 3):
        plan.step(step, dp=1, dp_rank=0, num_micro_batches=1, micro_batch_size=1)
        plan.announce(step, dp=1, dp_rank=0)
    longer = recipe_of(origin, tmp_path / "nvme", global_batch_size=64, train_steps=60)
    with pytest.raises(NotStaged, match=r"files that the run reads are not staged, 0000\d\.ds for one"):
        open_sources(longer)
    before = {path: path.stat().st_ino for path in copies.glob("*.ds")}
    stage_all(longer)
    assert len(list(copies.glob("*.ds"))) == FILES
    assert all(path.stat().st_ino == inode for path, inode in before.items())


def test_a_file_that_is_not_here_is_never_read_as_something_else(origin: Path, tmp_path: Path) -> None:
    recipe = recipe_of(origin, tmp_path / "nvme", global_batch_size=1, train_steps=1)
    stage_all(recipe)
    (source,) = open_sources(recipe).values()
    missing = [n for n in range(FILES) if not (source.folder / f"{n:05d}.ds").exists()]
    first = sum(file.tokens for file in source.manifest.train.files[: missing[0]])
    import numpy as np

    for read in (
        lambda: source.train.read(first, np.empty(4, dtype=np.int64)),
        lambda: source.train.announce(first, 4),
        lambda: source.train.documents_before(np.array([first + 1])),
    ):
        with pytest.raises(UserError, match=rf"{missing[0]:05d}\.ds: not on this machine"):
            read()


def in_place(path: Path) -> None:
    """Another byte in the same file, its times set back."""
    found = path.stat()
    with path.open("r+b") as file:
        file.seek(10)
        byte = file.read(1)
        file.seek(10)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def replaced(path: Path) -> None:
    """Another file of the same name, size and times."""
    found = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[::-1])
    os.utime(other, ns=(found.st_atime_ns, found.st_mtime_ns))
    other.replace(path)


def swapped(path: Path) -> None:
    """This shard under another's name, and the other way round."""
    other, aside = path.with_name("00001.ds"), path.with_name("aside")
    path.replace(aside)
    other.replace(path)
    aside.replace(other)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (in_place, r"changed since it was staged \(time of change of status\)"),
        (replaced, r"changed since it was staged \(inode, time of change of status\)"),
        (swapped, r"changed since it was staged \(.*inode, "),
        (truncated, r"changed since it was staged \(size, time of change"),
        (emptied, r"changed since it was staged \(size, time of change"),
        (Path.unlink, "staged, and now gone"),
    ],
)
def test_what_changed_after_staging_is_found_before_the_first_step_and_mended_by_staging(
    origin: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    recipe = recipe_of(origin, tmp_path / "nvme")
    stage_all(recipe)
    path = copy_of(recipe) / "00003.ds"
    time.sleep(0.02)  # a change of status is dated by the system's clock, which ticks every few milliseconds
    damage(path)
    with pytest.raises(UserError, match=rf"0000\d\.ds: {message}.*; run `nanotron-recipes data stage RECIPE`"):
        open_sources(recipe)
    stage_all(recipe)
    open_sources(recipe)
    assert path.read_bytes() == (origin / "00003.ds").read_bytes()


@pytest.mark.parametrize(("damage", "message"), [(in_place, "content is not what"), (truncated, "and its manifest")])
def test_damage_at_the_origin_is_found_by_staging_and_gets_no_final_name(
    origin: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    recipe = recipe_of(origin, tmp_path / "nvme")
    damage(origin / "00003.ds")
    with pytest.raises(UserError, match=rf"shared/words/00003\.ds: .*{message}"):
        stage_all(recipe)
    copies = copy_of(recipe)
    assert not (copies / "00003.ds").exists() and not (copies / MANIFEST_NAME).exists()
    with pytest.raises(NotStaged):
        open_sources(recipe)


def test_swapped_and_missing_shards_at_the_origin_are_found_by_staging(origin: Path, tmp_path: Path) -> None:
    recipe = recipe_of(origin, tmp_path / "nvme")
    swapped(origin / "00003.ds")
    with pytest.raises(UserError, match=r"0000[13]\.ds: \d+ bytes, and its manifest says"):
        stage_all(recipe)
    swapped(origin / "00003.ds")
    (origin / "00005.ds.index").unlink()
    with pytest.raises(UserError, match=r"00005\.ds\.index: no such file, but the manifest beside it names it"):
        stage_all(recipe)


def test_a_wrong_vocabulary_or_type_is_said_before_anything_is_copied(origin: Path, tmp_path: Path) -> None:
    recipe = recipe_with(
        [(1, {str(origin): 1.0})], vocab_size=500, data_staging={"path": str(tmp_path / "nvme")}, train_steps=2
    )
    with pytest.raises(
        UserError, match=r"vocab_size: 500: the shards in .*shared/words were made with a vocabulary of 1"
    ):
        plan_staging(recipe)
    assert not (tmp_path / "nvme").exists()


def test_staging_goes_on_inside_a_file(origin: Path, tmp_path: Path) -> None:
    recipe = recipe_of(origin, tmp_path / "nvme")
    part = copy_of(recipe) / ".00003.ds.part"
    part.parent.mkdir(parents=True)
    content = (origin / "00003.ds").read_bytes()
    part.write_bytes(content[:1000])
    stage_all(recipe)
    assert not part.exists() and (part.parent / "00003.ds").read_bytes() == content


@pytest.mark.parametrize("rest", [b"of something else" * 10, b"x" * 1_000_000])
def test_the_beginning_of_another_file_is_thrown_away(origin: Path, tmp_path: Path, rest: bytes) -> None:
    recipe = recipe_of(origin, tmp_path / "nvme")
    part = copy_of(recipe) / ".00003.ds.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(rest)
    told: list[int] = []
    staging = plan_staging(recipe)
    stage(recipe, staging, Watch(advance=told.append))
    assert sum(told) == staging.bytes_to_stage
    assert (part.parent / "00003.ds").read_bytes() == (origin / "00003.ds").read_bytes()


def test_copies_that_others_made_are_hashed_and_kept(origin: Path, tmp_path: Path) -> None:
    """As after a copy from node to node: nothing is transferred."""
    recipe = recipe_of(origin, tmp_path / "nvme")
    copies = copy_of(recipe)
    shutil.copytree(origin, copies)
    before = {path: path.stat().st_ino for path in copies.rglob("*.ds")}
    shutil.move(origin, tmp_path / "gone")
    (origin / "validation").mkdir(parents=True)
    shutil.copy(tmp_path / "gone" / MANIFEST_NAME, origin)
    stage_all(recipe)
    assert {path: path.stat().st_ino for path in copies.rglob("*.ds")} == before
    open_sources(recipe)


def test_what_others_put_there_is_never_replaced(origin: Path, tmp_path: Path) -> None:
    recipe = recipe_of(origin, tmp_path / "nvme")
    copies = copy_of(recipe)
    copies.mkdir(parents=True)
    (copies / "00003.ds").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"00003\.ds: not what the manifest in .* says, and not staged by us; move it"):
        stage_all(recipe)
    assert (copies / "00003.ds").read_bytes() == b"mine"
    shutil.rmtree(copies)
    write_source(copies, [random_documents(77, 10, 5)])
    with pytest.raises(UserError, match=r"manifest\.json: not that of .*, and nothing here was staged"):
        stage_all(recipe)


def test_a_source_that_was_tokenized_again_is_staged_again(origin: Path, tmp_path: Path) -> None:
    recipe = recipe_of(origin, tmp_path / "nvme")
    stage_all(recipe)
    write_source(origin, [random_documents(100 + i, 100, 50) for i in range(FILES)])
    stage_all(recipe)
    (source,) = open_sources(recipe).values()
    assert (source.folder / "00003.ds").read_bytes() == (origin / "00003.ds").read_bytes()


def test_one_process_stages_into_a_folder(origin: Path, tmp_path: Path) -> None:
    recipe = recipe_of(origin, tmp_path / "nvme")
    with StagedLog(copy_of(recipe)), pytest.raises(UserError, match="words: another process is staging into it"):
        stage_all(recipe)
    stage_all(recipe)


def test_a_line_of_the_record_that_a_crash_cut_off_is_none(origin: Path, tmp_path: Path) -> None:
    recipe = recipe_of(origin, tmp_path / "nvme")
    stage_all(recipe)
    record = copy_of(recipe) / STAGED_NAME
    os.truncate(record, record.stat().st_size - 20)
    with pytest.raises(NotStaged, match="1 of 18 files"):
        open_sources(recipe)
    stage_all(recipe)
    assert len(read_staged(record.parent).files) == 18  # type: ignore[union-attr]
    open_sources(recipe)


@pytest.fixture
def small_disk(mount: Callable[[str], Path]) -> Path:
    """A file system of 1 MB."""
    return mount("1m")


def test_a_disk_that_is_too_small_is_said_before_anything_is_copied(tmp_path: Path, small_disk: Path) -> None:
    write_source(tmp_path / "big", [[[1] * 100_000] for _ in range(6)])
    recipe = recipe_of(tmp_path / "big", small_disk, global_batch_size=640)
    with pytest.raises(UserError, match=r"disk: 1\.4 MB are to be staged and 1\.0 MB are free; make room"):
        stage_all(recipe)
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_is_one_message_and_what_is_staged_stays(
    tmp_path: Path, small_disk: Path
) -> None:
    write_source(tmp_path / "big", [[[1] * 100_000] for _ in range(3)])
    recipe = recipe_of(tmp_path / "big", small_disk, global_batch_size=640, workers=1)
    staging = plan_staging(recipe)

    def fill_up(count: int) -> None:
        if not (small_disk / "filler").exists():
            (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 100_000))

    with pytest.raises(StagingFailed, match=r"\.ds: no space left on device: 0\.\d MB are free; make room and call"):
        stage(recipe, staging, Watch(advance=fill_up))
    names = [path.name for path in staging.sources[0].folder.rglob("*.ds")]
    assert len(names) < 4 and MANIFEST_NAME not in names
    for path in staging.sources[0].folder.rglob("*.ds"):
        assert path.read_bytes() == (tmp_path / "big" / path.relative_to(staging.sources[0].folder)).read_bytes()
    (small_disk / "filler").unlink()
    stage_all(recipe)
    open_sources(recipe)
