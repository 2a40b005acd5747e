"""The beginning and the end of a job, as its batch shell calls them. scontrol is a small program of the tests; what it
says of jobs is what Slurm 22.05 says of one whose processes it ends."""

import errno
import json
import signal
from pathlib import Path
from typing import NoReturn

import pytest
from small_pretraining import small_recipe, write_recipe

from launch.cli import prepare_data
from launch.cluster import job
from launch.cluster.attempts import Begin, NodeEnd, read_attempts, write_begin, write_node_end
from launch.status.gather import gather
from launch.status.runs import read_run
from nanotron_recipes.loading import dump_yaml, load_recipe

CANCELLED = "JobState=COMPLETING Reason=None Dependency=(null) Requeue=1 Restarts=0 EndTime=2026-01-01 PreemptTime=None"
TIME_LIMIT = CANCELLED.replace("Reason=None", "Reason=TimeLimit")
PREEMPTED = CANCELLED.replace("PreemptTime=None", "PreemptTime=2026-01-01T00:00:00")
PUT_BACK = CANCELLED.replace("Restarts=0", "Restarts=1").replace(" PreemptTime=None", "")
RUNS_ON = CANCELLED.replace("COMPLETING", "RUNNING")
JOB = ["--job-id", "7", "--restart", "0"]


@pytest.fixture
def submission(tmp_path: Path) -> Path:
    """Of a small recipe whose text is missing."""
    folder = tmp_path / "runs" / "run" / "jobs" / "1"
    folder.mkdir(parents=True)
    file = write_recipe(tmp_path / "small.yaml", small_recipe(tmp_path))
    (folder / "small.yaml").write_text(dump_yaml(load_recipe(str(file)).recipe))
    (folder / "job.json").write_text(json.dumps({"slurm_job": "7", "nodes": 1, "stop_after": None}))
    return folder


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with what Slurm says of the job; beside it, `calls` has a line for every call."""
    said = tmp_path / "said"
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/bash\necho "$*" >> {tmp_path}/calls\n[ "$1" != show ] || cat {said}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setattr(job.time, "sleep", lambda seconds: None)
    return said


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        (CANCELLED, "cancelled"),
        (TIME_LIMIT, "requeue"),
        (PREEMPTED, "requeue"),
        (PUT_BACK, "requeue"),
        (RUNS_ON, "requeue"),
        ("", "requeue"),
    ],
    ids=["cancelled", "time limit", "preempted", "put back", "runs on", "no answer"],
)
def test_a_job_that_was_cancelled_and_no_other_stays_out_of_the_queue(
    submission: Path, scontrol: Path, said: str, verdict: str
) -> None:
    run = submission.parent.parent
    scontrol.write_text(said)
    save(run, 8)
    write_begin(run, Begin("7", 0, ["a"], "2026-01-01T00:00:00+00:00", 0))
    write_node_end(run, "7", 0, NodeEnd("a", "ended", "", None, False))
    code = job.main(["end", str(submission), *JOB, "--asked", "TERM"])
    (attempt,) = read_attempts(run)
    assert attempt.end is not None and (attempt.end.verdict, attempt.end.step) == (verdict, 8)
    assert not attempt.end.is_failure
    calls = (scontrol.parent / "calls").read_text().splitlines()
    assert ("requeue 7" in calls) == (verdict == "requeue") and code == (0 if verdict == "requeue" else 1)
    state = gather(read_run(run)).state
    assert state == ("queued" if verdict == "requeue" else "stopped")


def test_a_time_limit_during_the_export_puts_the_job_back(
    submission: Path, scontrol: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = submission.parent.parent
    scontrol.write_text(TIME_LIMIT)
    save(run, 8)
    write_begin(run, Begin("7", 0, ["a"], "2026-01-01T00:00:00+00:00", 0))

    def export(*_: object) -> NoReturn:
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            pytest.fail("what bears every Exception does not bear this")
        pytest.fail("it went on")

    monkeypatch.setattr(job, "_finish", export)
    assert job.main(["end", str(submission), *JOB]) == 0
    (attempt,) = read_attempts(run)
    assert attempt.end is not None and attempt.end.verdict == "requeue" and "asked to stop (TERM)" in attempt.end.reason
    assert "requeue 7" in (scontrol.parent / "calls").read_text().splitlines()


def test_a_job_that_is_cancelled_while_it_waits_for_slurm_is_not_put_back(
    submission: Path, scontrol: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = submission.parent.parent
    scontrol.write_text(RUNS_ON)
    write_begin(run, Begin("7", 0, ["a", "b"], "2026-01-01T00:00:00+00:00", 0))
    write_node_end(run, "7", 0, NodeEnd("a", "crashed", "a rank was ended by SIGKILL", 5.0, True))

    def wait(seconds: float) -> None:
        scontrol.write_text(CANCELLED)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(job.time, "sleep", wait)
    assert job.main(["end", str(submission), *JOB]) == 1
    (attempt,) = read_attempts(run)
    assert attempt.end is not None and attempt.end.verdict == "cancelled"
    assert "requeue 7" not in (scontrol.parent / "calls").read_text().splitlines()


def test_a_step_that_a_rewind_has_deleted_is_no_gain(submission: Path, scontrol: Path) -> None:
    run = submission.parent.parent
    scontrol.write_text(RUNS_ON)
    save(run, 600, 800, 1000)
    tell(run, {"event": "rewind", "step": 1100, "to": None})
    assert begun_after(submission) == 1000
    tell(run, {"event": "rewind", "step": 1100, "to": 600})
    assert begun_after(submission) == 600
    save(run, 700)
    job.main(["end", str(submission), *JOB, "--asked", "USR1"])
    (attempt,) = read_attempts(run)
    assert attempt.end is not None and (attempt.end.step, attempt.end.is_failure) == (700, False)


@pytest.mark.parametrize("disk_fails", [False, True])
def test_a_job_that_cannot_begin_says_so(submission: Path, disk_fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error", "text")

    if disk_fails:
        monkeypatch.setattr(prepare_data, "ensure_tokens", fail)
    assert job.main(["begin", str(submission), *JOB, "--nodes", "a"]) == 2
    (attempt,) = read_attempts(submission.parent.parent)
    assert attempt.end is not None and attempt.end.verdict == "give up" and attempt.end.is_failure
    assert ("Input/output error" if disk_fails else "words.jsonl") in attempt.end.reason
    status = gather(read_run(submission.parent.parent))
    assert (status.state, status.message) == ("failed", attempt.end.reason)


def begun_after(submission: Path) -> int:
    """The step that a start of the job, which then cannot go on, finds saved."""
    job.main(["begin", str(submission), *JOB, "--nodes", "a"])
    (attempt,) = read_attempts(submission.parent.parent)
    return attempt.begin.step


def save(run: Path, *steps: int) -> None:
    for step in steps:
        tell(run, {"event": "checkpoint", "step": step, "num_bytes": 7, "error": None})


def tell(run: Path, record: dict[str, object]) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
