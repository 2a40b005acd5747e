"""Nodes with disks of their own, played by one machine, whose only second copy is in the store."""

import shutil
from pathlib import Path

from checkpoint_store import CheckpointStore, uploading
from small_pretraining import StartProcess, curve, pretrain_command

from launch.storage.state import joint_state
from launch.train.metrics import read_metrics


def test_a_node_that_is_lost_with_its_disk_costs_nothing_that_was_uploaded(
    small_file: Path, start_process: StartProcess, store: CheckpointStore, tmp_path: Path
) -> None:
    def launch(nodes: str, *arguments: str) -> tuple[int, str, str]:
        command = pretrain_command(
            small_file, "--run", "spread", "--launcher", "local", "--node-names", nodes, "--gpus-per-node", "1",
            "--set", f"checkpoints.checkpoints_path={tmp_path}/disks/{{node}}", *uploading(store),
            "--set", "checkpoints.copies=2", "--set", "checkpoints.keep_last=1", *arguments,
        )  # fmt: skip
        return start_process(command, tmp_path).end()

    def steps(node: str) -> list[int]:
        folder = tmp_path / "disks" / node / "spread"
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())

    code, _, err = start_process(pretrain_command(small_file, "--run", "plain"), tmp_path).end()
    assert (code, err) == (0, "")
    code, out, err = launch("a,b", "--set", "checkpoints.copies=1", "--stop-after", "20")
    assert (code, err) == (0, "") and steps("a") == steps("b") == [20]
    assert store.whole_steps("spread", tmp_path) == [8, 16, 20]
    shutil.rmtree(tmp_path / "disks" / "b")

    code, out, err = launch("a,c")
    assert (code, err) == (0, ""), out
    assert "20: fetched from the store, and verified" in out and "resumed after step 20" in out
    assert steps("a") == steps("c") == [40]
    assert store.whole_steps("spread", tmp_path) == [8, 16, 20, 24, 32, 40]
    parts = [line for line in store.faults.seen if line.startswith("PUT") and ".distcp" in line]
    assert len(parts) == len(set(parts)) == 6 * 2, "copies are uploaded once"
    joint = joint_state(tmp_path / "runs" / "spread")
    assert joint is not None and {state.node for state in joint.nodes} == {"a", "c"} and joint.newest == 40
    found, expected = (
        curve(read_metrics(tmp_path / "runs" / name / "metrics.jsonl").steps) for name in ("spread", "plain")
    )
    assert found == expected
