"""Whole runs whose records, or whose whole folder, lie on a disk that is full."""

import re
import signal
import threading
from pathlib import Path

from faulty_disks import FULL, fill, wait_until
from small_pretraining import StartProcess, pretrain_command

from launch.train.metrics import read_metrics
from launch.train.run_lock import HOLDER_FILE
from parallel.checkpoint_files import MANIFEST_FILE, verify_checkpoint_files


def test_a_run_that_ends_without_its_records_fails_and_has_its_checkpoint(
    small_file: Path, start_process: StartProcess, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "full"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").symlink_to("/dev/full")
    command = pretrain_command(small_file, "--run", "full", "--stop-after", "2", "--gpus-per-node", "1")
    code, out, err = start_process(command, tmp_path).end()
    assert code == 1
    lost = f"error: runs/full/metrics.jsonl: 6 records lost: {FULL}"
    first, second = err.splitlines()
    assert first == lost and re.fullmatch(r"Training failed: rank 0 \(process \d+\) failed with exit code 1\.", second)
    assert out.count(f"runs/full/metrics.jsonl: {FULL}") == 1 and "written again" not in out
    assert verify_checkpoint_files(run / "checkpoints" / "2") == []


def test_a_run_whose_whole_folder_is_on_a_disk_that_was_full_for_a_while_lacks_nothing(
    small_file: Path, start_process: StartProcess, small_disk: Path
) -> None:
    run = small_disk / "runs" / "full"
    long = ["--set", "tokens.train_steps=1000000", "--set", "tokens.val_check_interval=-1"]
    policy = ["--set", "checkpoints.checkpoint_interval=10", "--set", "checkpoints.keep_last=1"]
    process = start_process(pretrain_command(small_file, "--run", "full", *long, *policy), small_disk)
    lines = process.lines()
    said: list[str] = []

    def listen_for(*words: str) -> None:
        while not all(any(word in line for line in said) for word in words):
            line = next(lines, None)
            assert line is not None, said
            said.append(line)

    process.wait_for_step(run / "metrics.jsonl", 10)
    wait_until((run / "checkpoints" / "10" / MANIFEST_FILE).exists)
    enough = threading.Event()

    def keep_full() -> None:  # a save that fails gives its room back
        while not enough.wait(0.02):
            fill(small_disk)

    filler = threading.Thread(target=keep_full)
    filler.start()
    try:
        listen_for("metrics.jsonl: No space", "tensorboard: No space", "not saved: ")
        kept = [int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal()]
        assert kept and all(verify_checkpoint_files(run / "checkpoints" / str(step)) == [] for step in kept)
    finally:
        enough.set()
        filler.join()
    (small_disk / "filler").unlink()
    listen_for("metrics.jsonl: written again", "tensorboard: new points")
    process.wait_for_step(run / "metrics.jsonl", read_metrics(run / "metrics.jsonl").steps[-1].step + 25)
    process.send(signal.SIGTERM)
    said.extend(lines)
    code, _, err = process.end()
    assert (code, err) == (0, "")
    assert sum(f"{FULL}; training goes on, records wait" in line for line in said) == 1

    metrics = read_metrics(run / "metrics.jsonl")
    last = metrics.steps[-1].step
    assert [record.step for record in metrics.steps] == list(range(1, last + 1))
    saves = [event for event in metrics.events if event["event"] == "checkpoint"]
    assert [event["step"] for event in saves] == [*range(10, last, 10), last]
    failed = [event["error"] is not None for event in saves]
    assert not failed[0] and any(failed) and failed[-2:] == [False, False]
    assert [path.name for path in (run / "checkpoints").iterdir()] == [str(last)]
    assert verify_checkpoint_files(run / "checkpoints" / str(last)) == [] and not (run / HOLDER_FILE).exists()
