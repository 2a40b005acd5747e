"""Checkpoints that lie elsewhere than in their run's folder belong to one run, and one launch saves there."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from small_pretraining import StartProcess, pretrain_command

from launch.train.checkpoint_owner import held_checkpoints
from launch.train.prepare import PreparedRun, RunRequest, prepare_run
from launch.train.run_folder import OWNER_FILE, RunFolder
from launch.train.run_lock import HOLDER_FILE, RunIsTrained
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import load_recipe
from parallel.checkpoint_disks import one_disk

Prepare = Callable[..., PreparedRun]


@pytest.fixture
def prepare(small_file: Path, tmp_path: Path) -> Prepare:
    """Prepare a run in a working directory whose checkpoints go to `tmp_path/disk`, and give it back."""

    def call(directory: str, run: str | None = None, disk: str = "disk") -> PreparedRun:
        loaded = load_recipe(str(small_file), [f"checkpoints.checkpoints_path={tmp_path / disk}"])
        prepared = prepare_run(RunRequest(loaded, run, tmp_path / directory / "runs"))
        prepared.lock.release()
        return prepared

    return call


def train(prepared: PreparedRun, node: str = "a") -> None:
    """Hold the checkpoints for a moment, as the ranks of a launch do on a node."""
    folder = RunFolder.of(prepared.folder.path.parent, prepared.folder.name, prepared.recipe, node)
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    with held_checkpoints(folder, one_disk(), prepared.launch_id):
        pass


@pytest.mark.parametrize("disk", ["disk", "disk/{node}"])
def test_a_run_of_another_folder_is_refused_by_name_also_when_nobody_trains(
    disk: str, prepare: Prepare, tmp_path: Path
) -> None:
    train(prepare("one", "mine", disk))
    with pytest.raises(UserError, match=rf"mine: belongs to another run, begun in {tmp_path}/one/runs/mine; choose"):
        prepare("two", "mine", disk)
    assert not (tmp_path / "two" / "runs" / "mine" / "recipe.yaml").exists()
    assert prepare("one", "mine", disk).state == "resumed"


def test_without_a_name_another_one_is_chosen(prepare: Prepare) -> None:
    train(prepare("one", disk="disk/{node}"))
    assert prepare("two", disk="disk/{node}").folder.name == "small-2"
    train(prepare("three", "small-3", disk="disk/{node}"))
    assert prepare("two", disk="disk/{node}").folder.name == "small-2", "it was begun, and is this directory's"


def test_of_two_runs_that_begin_at_once_the_second_finds_it_out_in_its_ranks(prepare: Prepare, tmp_path: Path) -> None:
    first, second = prepare("one", "mine"), prepare("two", "mine")
    train(first)
    with pytest.raises(UserError, match="belongs to another run, begun in"):
        train(second)
    train(first)
    assert not (tmp_path / "disk" / "mine" / HOLDER_FILE).exists()
    assert prepare("two").folder.name == "small-1", "the one that it cannot go on with is no candidate"


def test_a_run_that_was_moved_with_other_mount_paths_goes_on(prepare: Prepare, tmp_path: Path) -> None:
    train(prepare("one", "mine"))
    (tmp_path / "disk" / "mine" / "8").mkdir()
    shutil.move(tmp_path / "one", tmp_path / "moved")
    shutil.move(tmp_path / "disk", tmp_path / "mounted")
    again = prepare("moved", "mine", "mounted")
    assert again.state == "resumed"
    train(again)


def test_a_copy_of_a_run_cannot_be_trained_at_the_same_time(prepare: Prepare, tmp_path: Path) -> None:
    first = prepare("one", "mine")
    shutil.copytree(tmp_path / "one", tmp_path / "two", symlinks=True)
    second = prepare("two", "mine")
    first.folder.checkpoints.mkdir(parents=True, exist_ok=True)
    with held_checkpoints(first.folder, one_disk(), first.launch_id):
        with pytest.raises(UserError, match=r"disk/mine: process \d+ on .* trains this run"):
            train(second)
        with pytest.raises(RunIsTrained, match=r"disk/mine: process \d+ on .* saves here since"):
            prepare("two", "mine")
    train(second)


def test_a_damaged_owner_is_named(prepare: Prepare, tmp_path: Path) -> None:
    train(prepare("one", "mine"))
    file = tmp_path / "disk" / "mine" / OWNER_FILE
    for content in ("", "[1]", '{"run": 1, "place": 2}', "[" * 100_000):
        file.write_text(content)
        with pytest.raises(UserError, match=rf"{OWNER_FILE}: damaged; remove it if"):
            prepare("one", "mine")
    file.unlink()
    train(prepare("one", "mine"))
    assert json.loads(file.read_text())["folder"] == str(tmp_path / "one" / "runs" / "mine")


def test_checkpoints_inside_the_runs_folder_need_neither(prepare: Prepare, small_file: Path, tmp_path: Path) -> None:
    prepared = prepare_run(RunRequest(load_recipe(str(small_file)), "plain", tmp_path / "runs"))
    prepared.lock.release()
    train(prepared)
    assert list(prepared.folder.checkpoints.iterdir()) == []


def test_a_launch_in_another_directory_ends_with_exit_code_2_and_overwrites_nothing(
    small_file: Path, start_process: StartProcess, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    command = pretrain_command(
        small_file, "--run", "mine", "--stop-after", "2", "--set", f"checkpoints.checkpoints_path={disk}"
    )
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    assert start_process(command, tmp_path / "one").end()[0] == 0
    before = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
    code, _, err = start_process(command, tmp_path / "two").end()
    assert code == 2 and err.startswith(
        f"error: {disk}/mine: belongs to another run, begun in {tmp_path}/one/runs/mine"
    )
    assert {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in (disk / "mine").iterdir()) == [".holder.lock", "2", OWNER_FILE]
