"""Runs whose checkpoints go to a real S3 store: undisturbed, through everything that a store does, and back."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_store import CheckpointStore, checkpoint_store, credentials, uploading
from small_pretraining import TRAIN_STEPS, Process, StartProcess, curve, pretrain_command

from launch.storage.state import joint_state
from launch.train.metrics import read_metrics
from parallel.checkpoint_files import verify_checkpoint_files


@pytest.fixture(scope="module")
def store() -> Iterator[CheckpointStore]:
    with pytest.MonkeyPatch.context() as patch:
        credentials(patch)
        with checkpoint_store() as running:
            yield running


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, small_file: Path, start_process: StartProcess) -> Path:
    """A run that uploads nothing."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, _, err = start_process(pretrain_command(small_file, "--run", "plain"), folder).end()
    assert (code, err) == (0, "")
    return folder / "runs" / "plain"


def saved(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal())


def test_a_run_uploads_every_checkpoint_and_a_wiped_disk_resumes_from_the_store_with_the_same_bits(
    small_file: Path, start_process: StartProcess, store: CheckpointStore, undisturbed: Path, tmp_path: Path
) -> None:
    policy = [*uploading(store), "--set", "checkpoints.keep_last=2", "--set", "checkpoints.keep_every=8"]
    command = pretrain_command(small_file, "--run", "wiped", *policy)
    code, out, err = start_process([*command, "--stop-after", "26"], tmp_path).end()
    assert (code, err) == (0, ""), out
    run = tmp_path / "runs" / "wiped"
    assert saved(run) == [24, 26], "what keep_every keeps is in the store"
    assert store.whole_steps("wiped", tmp_path) == [8, 16, 24, 26]

    shutil.rmtree(run / "checkpoints")
    code, out, err = start_process(command, tmp_path).end()
    assert (code, err) == (0, "")
    assert "26: fetched from the store, and verified" in out and "resumed after step 26" in out
    assert curve(read_metrics(run / "metrics.jsonl").steps) == curve(read_metrics(undisturbed / "metrics.jsonl").steps)
    assert store.whole_steps("wiped", tmp_path) == [8, 16, 24, 26, 32, 40]
    assert saved(run) == [32, 40]
