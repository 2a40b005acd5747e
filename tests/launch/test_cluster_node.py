"""A node of a job: how long it waits for the others, and what it notes about its end."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.run import config_from_args, parse_args

from launch.cluster import agent, node
from launch.cluster.attempts import Attempt, Begin, NodeEnd, bad_nodes, decide, read_attempts, write_begin
from launch.cluster.local import Meeting, torchrun_arguments
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import dump_yaml, load_recipe
from nanotron_recipes.schema.slurm import Slurm
from parallel.rank_pool import free_port

ROOT = Path(__file__).parents[2]
DAY = 24 * 3600


def test_nodes_wait_for_one_that_copies_its_data_for_days(tmp_path: Path) -> None:
    meeting = Meeting(1, 2, "node1", 29500, "node2")
    arguments = torchrun_arguments("launch.train", [], 1, tmp_path, "slurm-7.0", meeting)
    config, _, _ = config_from_args(parse_args(arguments))
    assert config.rdzv_configs["rank"] == 1
    assert int(config.rdzv_configs["timeout"]) >= 7 * DAY


def test_a_node_that_never_came_is_reported_as_what_it_is(tmp_path: Path) -> None:
    report = tmp_path / "end.json"
    meet = ["--nnodes=2", "--node-rank=0", "--rdzv-backend=static", "--rdzv-conf=timeout=1"]
    meet += [f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1", "--nproc-per-node=1"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "launch.cluster.agent", f"--report={report}", *meet, "-m", "this"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "FATAL"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("Training failed: torchrun failed: DistStoreError: ") and "1/2 clients joined" in line
    content = json.loads(report.read_text())
    assert content["code"] == 1 and line.endswith(content["message"])
    assert content["failed_at"] is not None and content["is_by_signal"] is False


@pytest.mark.parametrize(
    ("error", "code", "outcome", "verdict"),
    [
        (OSError(errno.EIO, "Input/output error", "shards"), 1, "crashed", "requeue"),
        (RuntimeError("the store did not answer"), 1, "crashed", "requeue"),
        (UserError("data_staging.path: no such folder"), 2, "mistake", "give up"),
    ],
)
def test_a_disk_that_fails_on_one_node_is_tried_elsewhere_and_a_mistake_is_not(
    error: Exception, code: int, outcome: str, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> NoReturn:
        raise error

    monkeypatch.setattr(node, "_stage", fail)
    assert run_node(tmp_path, []) == code
    (end,) = ends_in(tmp_path)
    assert end.outcome == outcome and (end.failed_at is None) == (outcome == "mistake")
    assert verdict_in(tmp_path) == verdict


@pytest.mark.parametrize(
    ("built_for", "gpus", "outcome", "verdict", "message"),
    [
        ("13.0", 3, "crashed", "requeue", "3 GPUs can be used here; expected 4, one for each rank"),
        ("13.0", 0, "crashed", "requeue", "0 GPUs can be used here; expected 4, one for each rank"),
        (None, 0, "mistake", "give up", "slurm.gpus_per_node: 4: torch"),
        ("13.0", 4, "mistake", "give up", "as far as staging"),
    ],
    ids=["a GPU lost", "the driver lost", "torch for CPUs", "all there"],
)
def test_a_node_that_has_lost_a_gpu_is_one_to_go_on_without(
    built_for: str | None,
    gpus: int,
    outcome: str,
    verdict: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: object) -> NoReturn:
        raise UserError("as far as staging")

    monkeypatch.setattr(node, "_stage", stop)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    run_node(tmp_path, ["slurm.gpus_per_node=4"])
    (end,) = ends_in(tmp_path)
    assert (end.outcome, verdict_in(tmp_path)) == (outcome, verdict) and end.message.startswith(message)


def run_node(folder: Path, overrides: list[str]) -> int:
    """The node `a` of a job of its own, in the run `run` of `folder`; returns its exit code."""
    submission = folder / "run" / "jobs" / "1"
    submission.mkdir(parents=True)
    (submission / "tiny.yaml").write_text(dump_yaml(load_recipe("tiny", overrides).recipe))
    write_begin(folder / "run", Begin("7", 0, ["a"], "2026-01-01T00:00:00+00:00", 0))
    words = [str(submission), "--node-rank", "0", "--num-nodes", "1", "--node-name", "a", "--main-address", "a"]
    return node.main([*words, "--main-port", "29500", "--job-id", "7", "--restart", "0"])


def ends_in(folder: Path) -> list[NodeEnd]:
    (attempt,) = read_attempts(folder / "run")
    return attempt.nodes


def verdict_in(folder: Path) -> str:
    attempts = read_attempts(folder / "run")
    return decide(attempts, step=0, is_done=False, failure=None, asked="", slurm=Slurm()).verdict


@pytest.mark.parametrize(
    ("cause", "peers", "expected"),
    [
        (1, -signal.SIGABRT, "a"),  # nccl: torch's watchdog ends ranks that lose a peer
        (-signal.SIGABRT, -signal.SIGABRT, "a"),
        (-signal.SIGKILL, 1, "a"),
        (1, -signal.SIGKILL, "b"),  # gloo: a rank that loses a peer raises, and may be seen to end first
    ],
)
def test_the_node_that_is_kept_off_is_where_it_began(cause: int, peers: int, expected: str, tmp_path: Path) -> None:
    ends = []
    for name, exitcode, failed_at in (("a", cause, 100), ("b", peers, 101)):
        failure = ProcessFailure(local_rank=0, pid=1, exitcode=exitcode, error_file="")
        failure.timestamp = failed_at
        agent._write_report(tmp_path / name, 1, f"rank on {name} failed", [failure])
        ends.append(node._describe_end(name, 1, node._Report.read(tmp_path / name)))
    attempts = [
        Attempt(Begin("7", number, ["a", "b"], "2026-01-01T00:00:00+00:00", 0), ends, None) for number in range(2)
    ]
    assert bad_nodes(attempts) == [expected]
