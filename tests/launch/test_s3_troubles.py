"""What an uploader does where not the store fails but a file on its disk, or the place belongs to somebody else."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_store import BUCKET, CheckpointStore
from uploaded_run import begun_run, make_checkpoint, uploaded, uploading, wait_for

from launch.storage.remote import local_identity
from launch.storage.state import NodeState, read_state
from launch.storage.store import RunStore
from launch.storage.uploader import Uploader
from launch.train.run_folder import RunFolder
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schema.checkpoints import S3Upload

RUN = "team/run"


@pytest.fixture
def run(
    store: CheckpointStore, small_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[RunFolder, Recipe]:
    """A run that was begun; a trouble is told after half a second, in which several attempts are made."""
    monkeypatch.setattr("launch.storage.uploader.LOOK_SECONDS", 0.02)
    monkeypatch.setattr("launch.storage.uploader.OTHERS_SECONDS", 0.05)
    monkeypatch.setattr("launch.storage.trouble.TROUBLE_SECONDS", 0.5)
    upload = S3Upload(upload_s3_path=f"s3://{BUCKET}/team", endpoint_url=store.url)
    return begun_run(tmp_path, small_file, upload)


def said(folder: RunFolder) -> NodeState:
    return read_state(folder.path, "a") or NodeState("a", "l", "", 0.0)


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [shorten, Path.unlink], ids=["shortened", "missing"])
def test_a_step_whose_file_is_shortened_or_missing_is_given_up_and_the_others_are_sent(
    harm: Callable[[Path], None], store: CheckpointStore, run: tuple[RunFolder, Recipe], tmp_path: Path
) -> None:
    folder, recipe = run
    for step in (8, 16, 24):
        make_checkpoint(folder.checkpoints, step)
    damaged = folder.checkpoints / "8" / "__0_0.distcp"
    harm(damaged)
    with uploading(Uploader(folder, recipe, "a", ("a",), "l")):
        wait_for(lambda: uploaded(folder) == [16, 24] and not said(folder).waiting)
    (given_up,) = said(folder).given_up
    assert (given_up.step, given_up.identity) == (8, local_identity([folder.checkpoints / "8"]))
    assert given_up.reason == f"{damaged}: expected a file of 1,000 bytes, as its manifest says"
    assert store.whole_steps("run", tmp_path) == [16, 24]


def test_a_step_that_a_disk_does_not_give_is_told_waits_and_holds_up_no_other(
    store: CheckpointStore, run: tuple[RunFolder, Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, recipe = run
    for step in (8, 16):
        make_checkpoint(folder.checkpoints, step)
    send, fails = RunStore.send, [True]

    def failing(self: RunStore, path: Path, *arguments: Any) -> None:
        if fails[0] and path.parent.name == "8":
            raise OSError(errno.EIO, "Input/output error", str(path))
        send(self, path, *arguments)

    monkeypatch.setattr(RunStore, "send", failing)
    with uploading(Uploader(folder, recipe, "a", ("a",), "l")):
        wait_for(lambda: uploaded(folder) == [16])
        wait_for(lambda: said(folder).problem.startswith(f"{folder.checkpoints / '8'}/"))
        assert said(folder).problem.endswith(": Input/output error") and said(folder).waiting == (8,)
        fails[0] = False
        wait_for(lambda: uploaded(folder) == [8, 16] and not said(folder).problem)


def test_that_the_place_belongs_to_another_run_is_told_though_the_store_answers(
    store: CheckpointStore, run: tuple[RunFolder, Recipe]
) -> None:
    folder, recipe = run
    make_checkpoint(folder.checkpoints, 8)
    store.client.put_object(Bucket=BUCKET, Key=f"{RUN}/owner.json", Body=b'{"run": "b2", "folder": "/elsewhere"}')
    with uploading(Uploader(folder, recipe, "a", ("a",), "l")):
        wait_for(lambda: said(folder).problem)
        assert "belongs to another run" in said(folder).problem and said(folder).waiting == (8,)
        store.client.delete_object(Bucket=BUCKET, Key=f"{RUN}/owner.json")
        wait_for(lambda: uploaded(folder) == [8] and not said(folder).problem)
