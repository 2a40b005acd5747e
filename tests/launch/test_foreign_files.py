"""Nothing deletes or replaces what it did not create: files of others in folders of steps, and in the place of one."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from launch.cli.checkpoints import _verify
from launch.train.resume import Start, refuse_foreign_steps
from launch.train.retention import delete_checkpoint
from launch.train.run_folder import RunFolder
from launch.train.seen_checkpoint import problems_of_step
from nanotron_recipes.errors import UserError
from parallel.checkpoint import save_tensors
from parallel.checkpoint_disks import one_disk
from parallel.checkpoint_files import (
    MANIFEST_FILE,
    PARTIAL_SUFFIX,
    REPLACED_SUFFIX,
    FileEntry,
    Manifest,
    verify_checkpoint_files,
    write_manifest,
)
from parallel.checkpoint_writer import SaveFailed, remove_leftovers, take_name

NOTES = "my_notes.txt"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run with checkpoints of steps 8 and 16."""
    run = RunFolder(tmp_path / "run", tmp_path / "run" / "checkpoints")
    for step in (8, 16):
        save(run.checkpoints / str(step), step)
    return run


def save(path: Path, step: int) -> None:
    state = {"step": step, "data": "fingerprint"}
    save_tensors(path, [("a.weight", torch.ones(3))], state, {"recipe.yaml": "general: {}\n", "note.txt": "listed"})


def names(path: Path) -> list[str]:
    return sorted(str(found.relative_to(path)) for found in path.rglob("*"))


def test_what_others_put_into_a_step_stays_when_it_is_deleted(folder: RunFolder) -> None:
    place = folder.checkpoints / "8"
    (place / NOTES).write_text("mine")
    (place / "plots").mkdir()
    (place / "plots" / "loss.png").touch()
    (place / "__0_0.distcp.bak").touch()
    assert delete_checkpoint(folder, 8) == [place / name for name in ("__0_0.distcp.bak", NOTES, "plots")]
    assert names(place) == ["__0_0.distcp.bak", NOTES, "plots", "plots/loss.png"] and folder.steps() == [16]
    assert delete_checkpoint(folder, 16) == [] and names(folder.checkpoints)[0] == "8"


@pytest.mark.parametrize("content", [b"", b"{}"])
def test_of_a_checkpoint_with_a_damaged_manifest_our_own_names_are_deleted(folder: RunFolder, content: bytes) -> None:
    (folder.checkpoints / "8" / MANIFEST_FILE).write_bytes(content)
    left = delete_checkpoint(folder, 8)
    assert left == [folder.checkpoints / "8" / "note.txt"], "no manifest says that it is ours"


def test_a_step_that_is_saved_again_keeps_what_others_put_into_it(folder: RunFolder) -> None:
    place = folder.checkpoints / "8"
    (place / NOTES).write_text("mine")
    save(place, 8)
    assert (place / NOTES).read_text() == "mine"
    assert [str(problem) for problem in verify_checkpoint_files(place)] == [f"{NOTES}: not in the manifest"]
    # As after going back, and after a kill -9 in the middle of it.
    place.rename(folder.checkpoints / f"8{REPLACED_SUFFIX}")
    remove_leftovers(folder.checkpoints)
    assert names(folder.checkpoints / f"8{REPLACED_SUFFIX}") == [NOTES]
    save(place, 8)
    assert (place / NOTES).read_text() == "mine" and sorted(map(int, names(folder.checkpoints)[:1])) == [16]
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["16", "8"]


def a_file(path: Path) -> None:
    path.write_text("mine")


def a_folder(path: Path) -> None:
    path.mkdir()
    (path / "recipe.yaml").write_text("mine")


def a_link_to_a_folder(path: Path) -> None:
    path.symlink_to("..")


def a_dead_link(path: Path) -> None:
    path.symlink_to("nowhere")


FOREIGN = [a_file, a_folder, a_link_to_a_folder, a_dead_link]


@pytest.mark.parametrize("make", FOREIGN)
def test_a_foreign_thing_in_the_place_of_a_step_is_found_before_step_1(
    make: Callable[[Path], None], folder: RunFolder
) -> None:
    make(folder.checkpoints / "20")
    start = Start(None, folder.checkpoints / "16", one_disk(), 17, True, {})
    with pytest.raises(
        UserError, match=r"checkpoints/20: a (file|folder) of somebody's, not a checkpoint; move it away"
    ):
        refuse_foreign_steps(folder, start, 40)
    refuse_foreign_steps(folder, start, 19)
    (folder.checkpoints / "15").touch()
    (folder.checkpoints / "20x").touch()
    (folder.checkpoints / "18").mkdir()
    refuse_foreign_steps(folder, start, 19)


@pytest.mark.parametrize("make", FOREIGN)
def test_a_save_replaces_no_foreign_thing_and_says_so(make: Callable[[Path], None], folder: RunFolder) -> None:
    place = folder.checkpoints / "20"
    make(place)
    before = names(folder.checkpoints)
    with pytest.raises(
        SaveFailed, match=rf"^{re.escape(str(place))}: a (file|folder) of somebody's, .*; move it away$"
    ):
        save(place, 20)
    assert names(folder.checkpoints) == before


def test_an_empty_folder_in_the_place_of_a_step_is_used(folder: RunFolder) -> None:
    (folder.checkpoints / "20").mkdir()
    save(folder.checkpoints / "20", 20)
    assert folder.steps() == [8, 16, 20]


def test_foreign_things_with_the_names_of_unfinished_saves_are_not_removed(folder: RunFolder) -> None:
    unfinished, file = (folder.checkpoints / f"{step}{PARTIAL_SUFFIX}" for step in (20, 24))
    a_folder(unfinished)
    for name in (NOTES, ".metadata.tmp", f".state.json.{'a' * 32}.tmp", ".__1_0.distcp.incoming", "__0_0.distcp"):
        (unfinished / name).touch()
    file.touch()
    remove_leftovers(folder.checkpoints)
    assert names(unfinished) == [NOTES] and file.exists()
    with pytest.raises(SaveFailed, match=r"24\.partial: not a directory"):
        save(folder.checkpoints / "24", 24)
    save(folder.checkpoints / "20", 20)
    assert (folder.checkpoints / "20" / NOTES).exists() and file.exists()


def test_two_files_of_one_name_both_stay(folder: RunFolder) -> None:
    place, aside = folder.checkpoints / "8", folder.checkpoints / f"8{REPLACED_SUFFIX}"
    aside.mkdir()
    for path in (place, aside):
        (path / NOTES).write_text(path.name)
    save(folder.checkpoints / "9", 8)
    (folder.checkpoints / "9").rename(folder.checkpoints / f"8{PARTIAL_SUFFIX}")
    with pytest.raises(OSError, match="not empty"):
        take_name(place, folder.checkpoints / f"8{PARTIAL_SUFFIX}")
    assert [(path / NOTES).read_text() for path in (place, aside)] == [path.name for path in (place, aside)]


def test_verify_names_foreign_files_and_parts_that_are_not_seen_without_calling_a_checkpoint_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(Path("runs/mine"), Path("ssd/a/mine"))
    place = folder.checkpoints / "8"
    write_manifest(place, Manifest(8, "data", {}, (FileEntry("part", 4, "0" * 64, ("b",)),)))
    (place / NOTES).write_text("mine")
    _verify(folder, {8: problems_of_step(folder, 8, checksums=True)})
    assert capsys.readouterr().out.splitlines() == [
        f"note: ssd/a/mine/8: {NOTES}: not in the manifest",
        "note: ssd/a/mine/8: parts on b: not seen from here",
        "1 of 1 checkpoints are as they were written",
    ]
