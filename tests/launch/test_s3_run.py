"""Runs whose checkpoints go to a real S3 store: undisturbed, through everything that a store does, and back."""

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_store import BUCKET, CheckpointStore, checkpoint_store, uploading
from s3_server import set_credentials
from small_pretraining import Process, StartProcess, curve, pretrain_command

from launch.train.metrics import read_metrics


@pytest.fixture(scope="module")
def store() -> Iterator[CheckpointStore]:
    with pytest.MonkeyPatch.context() as patch:
        set_credentials(patch)
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


@pytest.fixture(autouse=True)
def calm(store: CheckpointStore) -> Iterator[None]:
    """No fault outlives a test."""
    yield
    store.faults.is_out, store.faults.share, store.faults.seconds_per_put = False, 0.0, 0.0


class Disk(threading.Thread):
    """Looks at a run's checkpoints, and at what the store calls whole, again and again."""

    def __init__(self, run: Path) -> None:
        super().__init__(daemon=True)
        self._run, self._end = run, threading.Event()
        self.most: set[int] = set()

    def run(self) -> None:
        while not self._end.wait(0.01):
            if (self._run / "checkpoints").is_dir():
                self.most = max(self.most, set(saved(self._run)), key=len)

    def __enter__(self) -> "Disk":
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self.join()


def test_through_errors_throttling_and_cut_connections_every_step_arrives_and_a_wiped_disk_resumes_with_the_same_bits(
    small_file: Path, start_process: StartProcess, store: CheckpointStore, undisturbed: Path, tmp_path: Path
) -> None:
    policy = [*uploading(store), "--set", "checkpoints.keep_last=2", "--set", "checkpoints.keep_every=8"]
    command = pretrain_command(small_file, "--run", "wiped", *policy)
    run = tmp_path / "runs" / "wiped"
    process = start_process([*command, "--stop-after", "26"], tmp_path)
    wait_for_object(store, "team/wiped/owner.json", process)
    store.faults.share = 0.3
    code, out, err = process.end()
    assert (code, err) == (0, ""), out
    assert {"500", "503", "cut"} <= set(store.faults.failed)
    assert saved(run) == [24, 26], "what keep_every keeps is in the store"
    assert store.whole_steps("wiped", tmp_path) == [8, 16, 24, 26]
    events = read_metrics(run / "metrics.jsonl").events
    uploads = [event for event in events if event["event"] == "upload"]
    assert [(event["step"], event["error"]) for event in uploads] == [(step, None) for step in (8, 16, 24, 26)]
    assert all(event["seconds"] > 0 and event["num_bytes"] > 500_000 for event in uploads)

    store.faults.share = 0.0
    shutil.rmtree(run / "checkpoints")
    code, out, err = start_process(command, tmp_path).end()
    assert (code, err) == (0, "")
    assert "26: fetched from the store, and verified" in out and "resumed after step 26" in out
    assert curve(read_metrics(run / "metrics.jsonl").steps) == curve(read_metrics(undisturbed / "metrics.jsonl").steps)
    assert store.whole_steps("wiped", tmp_path) == [8, 16, 24, 26, 32, 40]
    assert saved(run) == [32, 40]


def wait_for_object(store: CheckpointStore, key: str, process: Process) -> None:
    end = time.monotonic() + 240
    while key not in store.objects(key):
        assert process.is_running() and time.monotonic() < end, process.end()
        time.sleep(0.05)


def events_of(run: Path) -> set[str]:
    return {event["event"] for event in read_metrics(run / "metrics.jsonl").events}


def test_an_outage_of_the_store_stops_no_step_and_what_was_given_up_is_named(
    small_file: Path, start_process: StartProcess, store: CheckpointStore, tmp_path: Path
) -> None:
    slow = ["--set", "tokens.global_batch_size=120", "--set", "tokens.train_steps=32"]
    often = ["--set", "checkpoints.checkpoint_interval=4", "--set", "checkpoints.keep_last=1"]
    schedule = "optimizer.learning_rate_scheduler"
    slow += ["--set", f"{schedule}.lr_decay_starting_step=20", "--set", f"{schedule}.lr_decay_steps=12"]
    command = pretrain_command(small_file, "--run", "outage", *slow, *often, *uploading(store, max_backlog=2))
    run = tmp_path / "runs" / "outage"
    process = start_process(command, tmp_path)
    wait_for_object(store, "team/outage/owner.json", process)
    with Disk(run) as disk:
        store.faults.is_out = True
        process.wait_for_step(run / "metrics.jsonl", 32)
        status, end = "", time.monotonic() + 90
        while not ("wait" in status and "given up: " in status and "upload_problem" in events_of(run)):
            assert time.monotonic() < end and process.is_running(), f"it waits for its uploads and says so: {status}"
            code, status, _ = start_process([*pretrain_command()[:-1], "status", "outage"], tmp_path).end()
            assert code == 0
    store.faults.is_out = False
    code, out, err = process.end()
    assert (code, err) == (0, ""), out
    whole, steps = store.whole_steps("outage", tmp_path), list(range(4, 36, 4))
    records = read_metrics(run / "metrics.jsonl")
    assert [record.step for record in records.steps] == list(range(1, 33))
    given_up = [event["step"] for event in records.events if event["event"] == "upload" and event["error"]]
    assert sorted([*whole, *given_up]) == steps and whole[-1] == 32 and given_up
    for step in given_up:
        assert re.search(rf"step {step}: not uploaded, given up: \d steps waited", out)
    assert "training goes on, steps that wait: " in out and "uploads: they go on, steps that wait: " in out
    problems = [event["reason"] for event in records.events if event["event"] == "upload_problem"]
    assert problems[0] and problems[-1] is None
    assert saved(run) == [32]
    assert len(disk.most) <= 1 + 1 + 2, disk.most
    saves = [event for event in records.events if event["event"] == "checkpoint"]
    assert all(event["error"] is None for event in saves)


def test_uploads_that_fall_behind_are_said_with_both_numbers_and_a_launch_does_not_wait_for_ever(
    small_file: Path, start_process: StartProcess, store: CheckpointStore, tmp_path: Path
) -> None:
    store.faults.seconds_per_put = 1.0
    more = uploading(store, longest_wait_seconds=9, workers=1)
    command = pretrain_command(small_file, "--run", "slow", "--set", "checkpoints.checkpoint_interval=5", *more)
    code, out, err = start_process(command, tmp_path).end()
    assert (code, err) == (0, "")
    run = tmp_path / "runs" / "slow"
    (slow,) = [event for event in read_metrics(run / "metrics.jsonl").events if event["event"] == "slow_upload"]
    assert slow["upload_seconds"] > slow["save_seconds"] > 0
    took, between = f"{slow['upload_seconds']:,.1f} s", f"{slow['save_seconds']:,.1f} s"
    assert f"its upload took {took}, and a checkpoint is saved every {between}: uploads fall behind" in out
    left = re.search(r"not in the store: steps ([\d, ]+); next: nanotron-recipes checkpoints push runs/slow", out)
    assert left is not None and left[1].endswith("40")


def test_another_run_of_the_name_is_refused_before_it_trains_and_so_is_a_bucket_that_is_not_ours(
    small_file: Path, start_process: StartProcess, store: CheckpointStore, tmp_path: Path
) -> None:
    owner = {"run": "another", "folder": "/elsewhere/runs/mine"}
    store.client.put_object(Bucket=BUCKET, Key="team/mine/owner.json", Body=json.dumps(owner).encode())
    code, _, err = start_process(pretrain_command(small_file, "--run", "mine", *uploading(store)), tmp_path).end()
    assert code == 2 and "belongs to another run, begun in /elsewhere/runs/mine; choose another --run" in err
    other = uploading(store, upload_s3_path="s3://nobodys/x")
    code, _, err = start_process(pretrain_command(small_file, "--run", "other", *other), tmp_path).end()
    assert code == 2 and "error: s3_upload.upload_s3_path: s3://nobodys/x/other: " in err and "NoSuchBucket" in err


def test_no_secret_is_in_anything_that_a_run_leaves_or_says(
    small_file: Path, start_process: StartProcess, store: CheckpointStore, tmp_path: Path
) -> None:
    planted = {
        "AWS_ACCESS_KEY_ID": "AKIAPLANTEDPLANTED77",
        "AWS_SECRET_ACCESS_KEY": "planted/secret+key/of/a/test/planted77",
        "AWS_SESSION_TOKEN": "planted-token-of-a-session",
        "HF_TOKEN": "hf_plantedplantedplanted",
        "WANDB_API_KEY": "planted0123456789planted",
    }
    store.faults.share = 0.2
    command = pretrain_command(small_file, "--run", "secret", "--stop-after", "9", *uploading(store))
    code, out, err = start_process(command, tmp_path, **planted).end()
    assert code == 0, err
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("sbatch", "echo 41"), ("squeue", "exit 0")):
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    words = ["--run", "job", "--nodes", "2", "--gpus-per-node", "0", "--launcher", "slurm", *uploading(store)]
    planted["PATH"] = f"{programs}:{os.environ['PATH']}"
    code, submitted, said = start_process(pretrain_command(small_file, *words), tmp_path, **planted).end()
    assert code == 0 and (tmp_path / "runs" / "job" / "jobs" / "1" / "job.sh").is_file(), said
    del planted["PATH"]
    broken = uploading(store, upload_s3_path="s3://nobodys/x")
    code, _, refused = start_process(
        pretrain_command(small_file, "--run", "broken", *broken), tmp_path, **planted
    ).end()
    assert code == 2
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any(path.name == "metrics.jsonl" for path in files) and any(path.suffix == ".log" for path in files)
    left = {str(path): path.read_bytes() for path in files}
    left |= {
        "stdout": out.encode(),
        "stderr": err.encode(),
        "submitted": submitted.encode(),
        "refused": refused.encode(),
    }
    left |= {"notes": said.encode(), **store.objects("team/secret/")}
    found = [
        (where, name) for where, content in left.items() for name, value in planted.items() if value.encode() in content
    ]
    assert found == []
