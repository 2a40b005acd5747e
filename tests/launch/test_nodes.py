"""Nodes whose disks only they see, played by one machine: a run survives the loss of a node and of its disk."""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from small_pretraining import COMMAND_LINE, StartProcess, curve, pretrain_command

from launch.train.metrics import read_metrics
from parallel.checkpoint_files import read_manifest


def test_a_run_goes_on_at_other_topologies_on_other_nodes_and_names_what_was_lost(
    small_file: Path, start_process: StartProcess, tmp_path: Path
) -> None:
    def launch(nodes: str, *arguments: str, run: str = "spread") -> tuple[int, str, str]:
        command = pretrain_command(
            small_file, "--run", run, "--launcher", "local", "--node-names", nodes, "--gpus-per-node", "1",
            "--set", f"checkpoints.checkpoints_path={tmp_path}/disks/{{node}}", *arguments,
        )  # fmt: skip
        return start_process(command, tmp_path).end()

    def steps(node: str) -> list[int]:
        return sorted(
            int(path.name) for path in (tmp_path / "disks" / node / "spread").iterdir() if path.name.isdecimal()
        )

    code, _, err = start_process(pretrain_command(small_file, "--run", "plain"), tmp_path).end()
    assert (code, err) == (0, "")

    code, out, err = launch("a,b", "--set", "checkpoints.copies=2", "--stop-after", "12")
    assert (code, err) == (0, "") and "2 nodes have disks of their own (a, b); each part is written to 2" in out
    assert steps("a") == steps("b") == [8, 12]
    shutil.rmtree(tmp_path / "disks" / "a")

    code, out, err = launch("c,b,d", "--stop-after", "24")
    assert (code, err) == (0, "") and "resumed after step 12" in out and "refused" not in out
    assert steps("c") == steps("d") == [12, 16, 24]
    entry = read_manifest(tmp_path / "disks" / "c" / "spread" / "24").entry("__2_0.distcp")
    assert entry is not None and entry.nodes == ("d",)
    shutil.rmtree(tmp_path / "disks" / "d" / "spread" / "24")

    code, out, err = launch("b,c")
    assert (code, err) == (0, "")
    for step in (24, 16):  # node d, which is not of this launch, has the only copy of a part
        assert re.search(
            rf"checkpoint of step {step} refused: __2_0\.distcp: is not here: it was written to node d", out
        )
    assert "runs/spread: goes on; starting 2 ranks" in out and "resumed after step 12" in out
    found, expected = (
        curve(read_metrics(tmp_path / "runs" / name / "metrics.jsonl").steps) for name in ("spread", "plain")
    )
    branch = ["--set", f"checkpoints.resume_checkpoint_path={tmp_path}/disks/{{node}}/spread/32"]
    branch += ["--set", "checkpoints.copies=2", "--stop-after", "34"]
    code, out, err = launch("c,b", *branch, run="branch")
    assert (code, err) == (0, "") and "weights from" in out and "resumed after step 32" in out

    export = start_process([sys.executable, "-P", "-c", COMMAND_LINE, "export", "spread", "out"], tmp_path)
    assert export.end()[0] == 0 and (tmp_path / "out" / "model.safetensors").is_file()
    assert found.keys() == expected.keys()
    for step, (loss, _, rate) in expected.items():
        assert found[step][0] == pytest.approx(loss, abs=1e-5) and found[step][2] == rate, step


def test_disks_of_two_nodes_are_refused_where_the_recipe_says_that_all_nodes_see_one(
    small_file: Path, start_process: StartProcess, tmp_path: Path
) -> None:
    key = "checkpoints.checkpoints_path_is_shared_file_system"
    settings = ["--set", f"checkpoints.checkpoints_path={tmp_path}/disks/{{node}}", "--set", f"{key}=true"]
    nodes = ["--launcher", "local", "--node-names", "a,b", "--gpus-per-node", "1"]
    code, _, err = start_process(pretrain_command(small_file, "--run", "spread", *nodes, *settings), tmp_path).end()
    assert code == 2 and f"{key}: true: node b does not see in" in err


NODE_NAME = "expected 1 to 64 letters a to z, digits, '.', '_' and '-', beginning with a letter or digit"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "3", "--node-names", "a,b"], "--node-names a,b: expected 3 different names, as many as --nodes"),
        (["--node-names", "a,a"], "--node-names a,a: expected different names"),
        (["--node-names", "a,b/c"], f"--node-names a,b/c: 'b/c': {NODE_NAME}"),
        (["--node-names", "a,.."], f"--node-names a,..: '..': {NODE_NAME}"),
        (["--node-names", "n" * 65], f"--node-names {'n' * 65}: '{'n' * 58}…: {NODE_NAME}"),
        (["--nodes", "2", "--set", "parallelism.dp=3"], "3 ranks: expected a multiple of the 2 nodes node1, node2"),
    ],
)
def test_nodes_that_cannot_be_played_are_refused(
    small_file: Path, start_process: StartProcess, tmp_path: Path, arguments: list[Any], message: str
) -> None:
    code, _, err = start_process(pretrain_command(small_file, "--launcher", "local", *arguments), tmp_path).end()
    assert (code, err.strip()) == (2, f"error: {message}")
    assert not (tmp_path / "runs").exists()


def test_names_of_played_nodes_are_not_lost_on_a_submission(
    small_file: Path, start_process: StartProcess, tmp_path: Path
) -> None:
    code, out, err = start_process(pretrain_command(small_file, "--nodes", "2", "--node-names", "a,b"), tmp_path).end()
    said = "error: --node-names: names nodes that are played here; expected --launcher local with it"
    assert (code, out, err.strip()) == (2, "", said)
