"""`status` of runs with damaged files: what is damaged is named, and the rest is shown."""

import json
import os
from pathlib import Path

import pytest
from rich.console import Console
from status_runs import command, make_run, record, start, status_of

from launch.status.runs import find_run
from launch.status.show import runs_table
from launch.train.run_lock import RunLock
from nanotron_recipes.errors import UserError


@pytest.mark.parametrize(
    ("name", "state", "said"),
    [
        ("completed", "unknown", 'completed: damaged: expected {"step": N}'),
        ("holder.json", "unknown", "holder.json: not a holder's description"),
        ("metrics.jsonl", "stopped", "metrics.jsonl: cannot be read (Is a directory)"),
    ],
)
def test_what_is_damaged_is_named_beside_what_can_be_read(tmp_path: Path, name: str, state: str, said: str) -> None:
    folder = make_run(tmp_path / "runs", "a", [start(1, dp=1), record(1)])
    make_run(tmp_path / "runs", "b", [record(1)])
    (folder.path / name).unlink(missing_ok=True)
    if name == "metrics.jsonl":
        (folder.path / name).mkdir()
    else:
        (folder.path / name).write_text("{]")
    content = json.loads(command("a", "--json", cwd=tmp_path).stdout)
    assert (content["state"], content["step"]) == (state, 0 if name == "metrics.jsonl" else 1)
    assert len(content["damage"]) == 1 and said in content["damage"][0]
    text = command("a", cwd=tmp_path).stdout
    assert "DAMAGED" in text and name in text and "checkpoint" in text
    listed = command(cwd=tmp_path)
    assert listed.returncode == 0 and f"a: runs/a/{said}" in listed.stdout
    assert listed.stdout.splitlines()[1].split()[:3] == ["a", state, f"{content['step']}/200"]


def test_a_damaged_file_hides_nothing_that_another_one_says(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "a", [start(1, dp=1), record(1)])
    (folder.path / "completed").write_text("{]")
    with RunLock.acquire(folder.path, "launch"):
        assert status_of(folder).state == "training" and len(status_of(folder).damage) == 1
    folder.mark_completed(200)
    (folder.path / "holder.json").write_text("{]")
    assert status_of(folder).state == "complete" and len(status_of(folder).damage) == 1


def test_a_damaged_run_is_in_nobodys_way(tmp_path: Path) -> None:
    make_run(tmp_path, "a", [record(1)]).recipe_file.write_text("general: [")
    with pytest.raises(UserError):
        find_run("a", tmp_path)
    console = Console(width=120, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    console.print(runs_table([("a", "a: damaged")]))
    assert "damaged" in console.export_text()
