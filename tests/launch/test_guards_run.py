"""Whole runs with a fault: what they record, how they end, what they leave behind."""

import json
import sys
from pathlib import Path

from small_pretraining import REPOSITORY, StartProcess

from launch.cluster.local import torchrun_arguments
from launch.train.metrics import read_metrics

HERE = Path(__file__).parent


def run_planted(
    start_process: StartProcess, folder: Path, fault: str, file: Path, *settings: str, ranks: int = 2
) -> tuple[int, str, str]:
    """Train the recipe at so many ranks with this fault as the run `planted`; exit code, stdout, stderr of rank 0."""
    arguments = ["--", fault, str(file), "--run", "planted", *(part for pair in settings for part in ("--set", pair))]
    torchrun = torchrun_arguments("planted_rank", arguments, ranks, folder / "logs", "planted")
    command = [sys.executable, "-P", "-m", "launch.cluster.agent", *torchrun]
    process = start_process(command, folder, PYTHONPATH=f"{REPOSITORY}:{HERE}", OMP_NUM_THREADS="1")
    return process.end()  # type: ignore[no-any-return]


def log_of_rank_1(folder: Path) -> str:
    (log,) = (folder / "logs").glob("*/attempt_0/1/stderr.log")
    return log.read_text()


def test_a_skipped_step_is_recorded_and_many_in_a_row_end_the_run(
    small_file: Path, start_process: StartProcess, tmp_path: Path
) -> None:
    code, out, err = run_planted(
        start_process, tmp_path, "nan_now_and_then", small_file, "guards.max_skipped_steps=3", "optimizer.zero_stage=1"
    )
    assert code == 1, err
    run = tmp_path / "runs" / "planted"
    metrics = read_metrics(run / "metrics.jsonl")
    assert [record.step for record in metrics.steps] == list(range(1, 8))
    assert [record.step for record in metrics.steps if record.grad_norm is None] == [2, 5, 6, 7]
    skipped = [event for event in metrics.events if event["event"] == "skipped"]
    assert [(event["step"], event["in_a_row"]) for event in skipped] == [(2, 1), (5, 1), (6, 2), (7, 3)]
    assert all(sorted(event["sources"]) == ["numbers", "words"] for event in skipped)
    assert "step 2: skipped, loss or gradient norm is not finite (sources: " in out
    message = "not finite in 3 steps in a row (guards.max_skipped_steps), read from: step 5: words, numbers; step 6: "
    assert message in err and "Traceback" not in err
    failed = json.loads((run / "failed").read_text())
    assert (failed["kind"], failed["step"]) == ("skipped_steps", 7) and message in failed["message"]
    assert not (run / "holder.json").exists()


def test_a_flipped_bit_in_one_replica_ends_the_run_and_is_named(
    small_file: Path, start_process: StartProcess, tmp_path: Path
) -> None:
    code, _, err = run_planted(
        start_process, tmp_path, "flipped_bit", small_file, "general.replica_check_interval=2", "parallelism.dp=2"
    )
    assert code == 1
    message = (
        "after step 4 the copies of parameters differ: model.decoder.2.pp_block.mlp.down_proj.weight (rank 0 ≠ rank 1)"
    )
    assert f"error: runs/planted: {message}\n" in err and "Traceback" not in err
    failed = json.loads((tmp_path / "runs" / "planted" / "failed").read_text())
    assert failed == {"kind": "replicas", "step": 4, "message": message}


def test_a_deadlock_ends_in_time_with_the_stacks_of_all_ranks(
    small_file: Path, start_process: StartProcess, tmp_path: Path
) -> None:
    code, _, err = run_planted(
        start_process, tmp_path, "left_out_collective", small_file, "guards.step_timeout_seconds=4"
    )
    assert code == 1
    for rank, log in enumerate((err, log_of_rank_1(tmp_path))):
        said, _, stacks = log.partition("this is where each thread stands:")
        assert f"error: rank {rank}: step " in said and "took more than 4 s (guards.step_timeout_seconds)" in said
        assert "in train_step" in stacks and "in _run" in stacks
    assert not (tmp_path / "runs" / "planted" / "failed").exists(), "a hang may be over at the next start"
