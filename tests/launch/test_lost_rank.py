"""A rank that is killed: what the others say, and what stays in the records."""

import re
from pathlib import Path

from small_pretraining import StartProcess, pretrain_command

from launch.status.gather import gather
from launch.status.runs import read_run
from launch.train.metrics import read_metrics


def test_the_survivor_of_a_killed_rank_says_so_in_a_line_and_the_launcher_which(
    small_file: Path, start_process: StartProcess, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "hurt"
    process = start_process(pretrain_command(small_file, "--run", "hurt"), tmp_path)
    process.wait_for_step(run / "metrics.jsonl", 2)
    (victim,) = [rank for rank in process.ranks() if rank.environ()["RANK"] == "1"]
    victim.kill()
    code, _, err = process.end()
    assert code == 1
    lost, failed = err.splitlines()
    assert lost.startswith("error: the connection to another rank was lost: ") and "gloo" not in lost
    assert re.fullmatch(rf"Training failed: rank 1 \(process {victim.pid}\) was ended by SIGKILL\.", failed)
    end = read_metrics(run / "metrics.jsonl").events[-1]
    assert (end["event"], end["verdict"]) == ("end", "failed")
    (start,) = gather(read_run(run)).restarts
    assert (start.verdict, f"error: {start.reason}") == ("failed", lost)
