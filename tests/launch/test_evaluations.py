"""Checkpoints are evaluated as they appear, and nothing that becomes of an evaluation touches the training."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from launch.evaluate.evaluators import LocalEvaluator, SlurmEvaluator
from launch.train.evaluations import Evaluations, evaluation_environment
from launch.train.metrics import Event
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import load_recipe


class Shell:
    """An evaluator that runs a line of shell, with the step in $1."""

    def __init__(self, folder: Path, line: str) -> None:
        self.folder, self.line = folder, line

    def command(self, step: int) -> list[str]:
        return ["sh", "-c", self.line, "sh", str(step)]

    def log(self, step: int) -> Path:
        return self.folder / "logs" / f"{step}.log"

    def told(self, last_line: str) -> str:
        return last_line


class Told:
    """An `Evaluations` with what it has said and recorded."""

    def __init__(self, evaluator: Any, interval: int | None = None, first_step: int = 1, **changes: Any) -> None:
        self.lines: list[str] = []
        self.events: list[Event] = []
        settings: dict[str, Any] = {"is_asked_to_stop": lambda: False, "longest_end_seconds": 10.0, **changes}
        self.evaluations = Evaluations(
            evaluator, interval, first_step, self.events.append, tell=self.lines.append, **settings
        )

    def saved(self, *steps: int, error: str | None = None) -> None:
        for step in steps:
            self.evaluations.on_event({"event": "checkpoint", "step": step, "error": error})


def test_the_first_checkpoint_from_each_multiple_on_is_evaluated(tmp_path: Path) -> None:
    told = Told(Shell(tmp_path, "echo step $1 done"), interval=100, first_step=51)
    for step in (60, 90, 103, 110, 190, 200, 350):
        told.saved(step)
        told.evaluations.close()
    assert told.lines == [f"evaluation: step {step} done" for step in (103, 200, 350)]
    assert told.events == [] and (tmp_path / "logs/103.log").read_text() == "step 103 done\n"


def test_a_save_that_failed_is_not_evaluated_and_after_a_rewind_steps_count_again(tmp_path: Path) -> None:
    told = Told(Shell(tmp_path, "echo $1"), interval=10)
    told.saved(10, error="full")
    told.saved(20)
    told.evaluations.close()
    told.evaluations.on_event({"event": "rewind", "to": 10})
    told.evaluations.on_event({"event": "rewind", "to": None})
    told.saved(20)
    told.evaluations.close()
    assert told.lines == ["evaluation: 20"] * 2


def test_there_are_never_two_at_once_and_the_newest_that_waits_is_next(tmp_path: Path) -> None:
    line = f"mkdir {tmp_path}/running || echo two at once; sleep 0.3; rmdir {tmp_path}/running; echo $1"
    told = Told(Shell(tmp_path, line))
    told.saved(1, 2, 3, 4)
    told.evaluations.close()
    assert told.lines == [
        "step 2: not evaluated: step 3 is newer",
        "step 3: not evaluated: step 4 is newer",
        "evaluation: 1",
        "evaluation: 4",
    ]


@pytest.mark.parametrize(
    ("line", "said", "recorded"),
    [
        ("echo error: no data; exit 1", "evaluation: error: no data (see ", []),
        ("kill -9 $$", "evaluation: step 5: ended by SIGKILL (see ", ["ended by SIGKILL"]),
        ("echo bad call; exit 2", "ended with exit code 2: bad call (see ", ["ended with exit code 2: bad call"]),
    ],
)
def test_a_failure_is_a_line_and_an_event(line: str, said: str, recorded: list[str], tmp_path: Path) -> None:
    told = Told(Shell(tmp_path, line))
    told.saved(5)
    told.evaluations.close()
    assert len(told.lines) == 1 and said in told.lines[0]
    assert [event["error"] for event in told.events] == recorded
    assert all((event["event"], event["step"]) == ("evaluation", 5) for event in told.events)


def test_one_that_cannot_be_started_is_a_line_and_an_event(tmp_path: Path) -> None:
    class Missing(Shell):
        def command(self, step: int) -> list[str]:
            return [str(tmp_path / "no-such-program")]

    class Mistaken(Shell):
        def command(self, step: int) -> list[str]:
            raise UserError("slurm.partition: no such")

    (tmp_path / "file").write_text("")
    for evaluator in (Missing(tmp_path, ""), Shell(tmp_path / "file", "true"), Mistaken(tmp_path, "")):
        told = Told(evaluator)
        told.saved(5)
        told.evaluations.close()
        assert len(told.lines) == 1 and "could not be started" in told.events[0]["error"]


@pytest.mark.parametrize("how", ["time is over", "asked to stop", "ignores SIGTERM"])
def test_the_launchs_end_is_not_held_up(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.train.evaluations._END_SECONDS", 0.3)
    changes: dict[str, Any] = {"longest_end_seconds": 0.3 if how != "asked to stop" else 100.0}
    line = "trap '' TERM; sleep 60; sleep 60" if how == "ignores SIGTERM" else "exec sleep 60"
    told = Told(Shell(tmp_path, line), is_asked_to_stop=lambda: how == "asked to stop", **changes)
    told.saved(5, 6)
    began = time.monotonic()
    told.evaluations.close()
    assert time.monotonic() - began < 5
    assert [event["error"] for event in told.events] == [
        "was ended with the launch",
        "the launch ended before it began",
    ]


def test_an_evaluation_is_no_rank_and_not_in_the_trainings_job() -> None:
    given = {"RANK": "3", "MASTER_ADDR": "a", "TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "0", "OMP_NUM_THREADS": "8"}
    kept = {"HOME": "/h", "SLURM_CONF": "/etc/slurm.conf", "RANKS": "1"}
    assert evaluation_environment({**given, **kept, "SLURM_JOB_ID": "4"}) == kept


def test_beside_the_training_it_ends_with_it_and_sees_no_gpu(tmp_path: Path) -> None:
    command = LocalEvaluator(tmp_path / "runs/a", tmp_path).command(7)
    assert command[:3] == ["env", "CUDA_VISIBLE_DEVICES=", "OMP_NUM_THREADS=1"]
    assert command[-2:] == ["--launcher", str(os.getpid())]


def test_in_a_slurm_job_another_one_is_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text('#!/bin/sh\nbash -n "$2" && echo "43;cluster"\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    recipe = load_recipe("tiny", ["lighteval.eval_interval=5"]).recipe
    told = Told(SlurmEvaluator(Path("runs/a"), tmp_path, recipe), environment=os.environ)
    told.saved(10)
    told.evaluations.close()
    assert told.lines == ["evaluation: submitted as job 43"] and told.events == []
    assert "launch.evaluate.job runs/a 10 --device cpu\n" in (tmp_path / "10.sh").read_text()
