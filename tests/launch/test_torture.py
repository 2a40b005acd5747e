"""kill -9 at random moments, of everything or of one rank, inside saves too: a run ends as if nothing had happened."""

import os
import random
import time
from pathlib import Path

import pytest
import torch
from small_pretraining import Process, StartProcess, curve, pretrain_command

from launch.train.metrics import read_metrics
from parallel.checkpoint import read_tensors
from parallel.checkpoint_files import verify_checkpoint_files

KILLS = int(os.environ.get("KILLS", "20"))
SEED = 16
TRAIN_STEPS = 10 * KILLS + 20
"""More than the kills allow to take."""


def newest(run: Path) -> int:
    """The newest step with a checkpoint, which must be whole whatever was killed; 0 without one."""
    folder = run / "checkpoints"
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
    if steps:
        assert verify_checkpoint_files(folder / str(max(steps))) == []
    return max(steps, default=0)


def steps_recorded(run: Path) -> int:
    """Step records of all launches together."""
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b'"loss"') if metrics.is_file() else 0


def wait_for_a_moment(process: Process, run: Path, generator: random.Random) -> None:
    """Until this launch has taken a few steps, and then at any time, or while a save is going on."""
    end, wanted = time.monotonic() + 120, steps_recorded(run) + generator.randint(1, 9)
    while steps_recorded(run) < wanted and process.is_running() and time.monotonic() < end:
        time.sleep(0.002)
    if generator.random() < 0.4:
        time.sleep(generator.random() * 0.15)
        return
    while not list((run / "checkpoints").glob("*.partial")) and process.is_running() and time.monotonic() < end:
        time.sleep(0.001)


@pytest.mark.long
def test_many_kills_leave_the_weights_bit_identical(
    small_file: Path, start_process: StartProcess, tmp_path: Path
) -> None:
    steps = ["--set", f"tokens.train_steps={TRAIN_STEPS}"]
    plain = pretrain_command(small_file, "--run", "plain", *steps)
    code, _, err = start_process(plain, tmp_path).end(120 + TRAIN_STEPS)
    assert (code, err) == (0, "")
    often = ["--set", "checkpoints.checkpoint_interval_minutes=0.00001", "--set", "checkpoints.keep_last=3"]
    command = pretrain_command(small_file, "--run", "killed", *often, *steps)
    run, generator = tmp_path / "runs" / "killed", random.Random(SEED)
    kills, reached = 0, []
    while kills < KILLS:
        process = start_process(command, tmp_path)
        wait_for_a_moment(process, run, generator)
        ranks = process.ranks()
        if not ranks:
            process.close()
            assert newest(run) < TRAIN_STEPS, f"the run was over after {kills} kills, at steps {reached}"
            continue
        if generator.random() < 0.5:
            process.kill()
        else:
            generator.choice(ranks).kill()
            assert process.end()[0] == 1
        kills += 1
        reached.append(newest(run))
        assert reached == sorted(reached), "no kill costs a checkpoint"
    assert reached[-1] > 0
    code, _, err = start_process(command, tmp_path).end(120 + TRAIN_STEPS)
    assert (code, err) == (0, "")
    print(f"{kills} kills; the newest checkpoint after each: {reached}")
    assert curve(read_metrics(run / "metrics.jsonl").steps) == curve(
        read_metrics(tmp_path / "runs" / "plain" / "metrics.jsonl").steps
    )
    last = [dict(read_tensors(path / "checkpoints" / str(TRAIN_STEPS), "")) for path in (run, run.with_name("plain"))]
    assert last[0].keys() == last[1].keys()
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])
