"""The uploader as a process: it outlives nobody, is started again where it died, and ends when it is told to."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from checkpoint_store import BUCKET, CheckpointStore
from processes import running
from small_pretraining import REPOSITORY
from uploaded_run import make_checkpoint

from launch.storage.state import log_file
from launch.storage.uploads import Uploads
from launch.train.run_folder import RunFolder
from launch.train.run_header import RunHeader
from nanotron_recipes.loading import dump_yaml, load_recipe
from nanotron_recipes.recipe import Recipe

STARTER = """
import sys, time
from pathlib import Path
from launch.storage.uploads import Uploads
from launch.train.run_folder import RunFolder
from nanotron_recipes.loading import load_recipe
recipe = load_recipe(sys.argv[1]).recipe
uploads = Uploads(RunFolder.of(Path("runs"), "mine", recipe, "a"), recipe, "a", ("a",), "l")
print("started", flush=True)
time.sleep(600)
"""


@pytest.fixture
def run(
    store: CheckpointStore, small_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[RunFolder, Recipe]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    place = [f"s3_upload.upload_s3_path=s3://{BUCKET}/team", f"s3_upload.endpoint_url={store.url}"]
    recipe = load_recipe(str(small_file), place).recipe
    folder = RunFolder.of(Path("runs"), "mine", recipe, "a")
    folder.path.mkdir(parents=True)
    folder.write_recipe(dump_yaml(recipe), RunHeader("small", "", "", run="a1"))
    make_checkpoint(folder.checkpoints, 8)
    return folder, recipe


def uploaders() -> list[psutil.Process]:
    """Of this test."""
    return running(psutil.Process().children(recursive=True), "launch.storage.uploader")


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def uploaded(uploads: Uploads) -> list[int]:
    state = uploads.look()
    return [] if state is None else [one.step for one in state.uploaded]


def test_one_that_was_killed_is_started_again_and_one_that_is_told_to_ends(
    store: CheckpointStore, run: tuple[RunFolder, Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, recipe = run
    monkeypatch.setattr("launch.storage.uploads._AGAIN_SECONDS", 0.2)
    uploads = Uploads(folder, recipe, "a", ("a",), "l")
    try:
        wait_for(lambda: uploaded(uploads) == [8])
        assert [event["step"] for event in uploads.events(None)] == [8] and uploads.events(None) == []
        (first,) = uploaders()
        assert first.nice() >= 10, "what trains comes first"
        first.kill()
        make_checkpoint(folder.checkpoints, 16)
        wait_for(lambda: uploaded(uploads) == [8, 16])
        (second,) = uploaders()
        assert second.pid != first.pid
        assert [event["step"] for event in uploads.events(None)] == [16], "each upload is told once"
    finally:
        uploads.end()
    assert uploaders() == [] and uploads.left() == []
    uploads.look()
    assert uploaders() == []
    (folder.checkpoints / "16").rename(folder.path / "gone")
    make_checkpoint(folder.checkpoints, 16)
    assert uploads.left() == [16], "trained again, it is another checkpoint than the one in the store"
    assert "step 8: is in the store" in log_file(folder.path, "a").read_text()


def test_one_that_hangs_in_a_request_ends_too(store: CheckpointStore, run: tuple[RunFolder, Recipe]) -> None:
    folder, recipe = run
    store.faults.seconds_per_put = 20
    uploads = Uploads(folder, recipe, "a", ("a",), "l")
    try:
        wait_for(lambda: any(line.startswith("PUT") for line in store.faults.seen))
        assert uploads.left() == [8]
    finally:
        began = time.monotonic()
        uploads.end()
    assert time.monotonic() - began < 20 and uploaders() == []


def test_none_outlives_who_started_it(store: CheckpointStore, run: tuple[RunFolder, Recipe]) -> None:
    folder, _ = run
    store.faults.is_out = True
    command = [sys.executable, "-P", "-c", STARTER, str(folder.recipe_file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None and starter.stdout.readline() == b"started\n"
        wait_for(uploaders)
        (uploader,) = uploaders()
        wait_for(lambda: store.faults.seen)
        starter.kill()
    wait_for(lambda: not running([uploader], "launch.storage.uploader"), 30)


def test_what_the_launch_gives_up_may_be_deleted_at_once_and_the_uploader_is_told_also_one_that_is_started_later(
    store: CheckpointStore, run: tuple[RunFolder, Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, recipe = run
    monkeypatch.setattr("launch.storage.uploads._AGAIN_SECONDS", 0.2)
    store.faults.is_out = True
    uploads = Uploads(folder, recipe, "a", ("a",), "l")
    try:
        wait_for(lambda: (state := uploads.look()) and state.sending == 8)
        (first,) = uploaders()
        first.kill()
        first.wait()
        for step in range(16, 56, 8):
            make_checkpoint(folder.checkpoints, step)
        uploading = uploads.uploading([8, 16, 24, 32, 40, 48])
        assert set(uploading.done) == {16, 24}, "8 was being sent; 32, 40 and it may wait beside the newest"
        told = [(event["step"], event["error"]) for event in uploads.events(None)]
        reason = "given up: 5 steps waited beside the newest, and s3_upload.max_backlog is 3"
        assert told == [(16, reason), (24, reason)]
        wait_for(lambda: (state := uploads.look()) and [one.step for one in state.given_up] == [16, 24])
        assert set(uploads.uploading([8, 16, 24, 32, 40, 48]).done) == {16, 24} and uploads.events(None) == []
        store.faults.is_out = False
        wait_for(lambda: uploaded(uploads) == [8, 32, 40, 48])
        assert uploads.left() == []
    finally:
        uploads.end()
    again = Uploads(folder, recipe, "a", ("a",), "l2")
    try:
        assert set(again.uploading([8, 16, 24, 32, 40, 48]).done) == {8, 16, 24, 32, 40, 48}, "it was written down"
        wait_for(again.look)
        assert again.events(None) == []
    finally:
        again.end()
