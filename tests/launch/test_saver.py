"""What is kept, what a full disk does, and what a run does with damaged checkpoints and with those of other runs."""

import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_pretraining import TRAIN_STEPS, StartProcess, curve, pretrain_command

from launch.train.metrics import read_metrics
from launch.train.parity import start_engine
from launch.train.retention import prunable_steps, reasons_to_keep
from launch.train.run_folder import RunFolder
from launch.train.run_header import RunHeader
from launch.train.saver import RunSaver
from launch.train.synthetic import synthetic_batch
from nanotron_recipes.schema.checkpoints import Checkpoints
from parallel.checkpoint_disks import one_disk
from parallel.checkpoint_files import verify_checkpoint_files
from parallel.rank_pool import RankPool

STEPS = st.lists(st.integers(1, 400), unique=True).map(sorted)


@given(STEPS, st.sets(st.integers(1, 400)), st.integers(1, 5), st.none() | st.integers(1, 60))
def test_the_newest_good_the_last_k_and_every_mth_are_never_deleted(
    steps: list[int], damaged: set[int], keep_last: int, keep_every: int | None
) -> None:
    policy = Checkpoints(keep_last=keep_last, keep_every=keep_every)
    deleted = prunable_steps(steps, damaged, policy)
    good = [step for step in steps if step not in damaged]
    assert not set(deleted) & set(good[-keep_last:])
    assert not any(keep_every and step % keep_every == 0 for step in set(deleted) & set(good))
    assert set(reasons_to_keep(good, policy)) == set(good) - set(deleted)
    assert prunable_steps(steps, damaged, Checkpoints()) == []
    if not good:
        assert deleted == []


def save_on_a_full_disk_on_rank(mapping: dict[str, object], disk: Path) -> list[dict[str, Any]]:
    engine = start_engine(mapping)
    saver = RunSaver(RunFolder(disk.parent, disk), engine, {}, frozenset(), one_disk())
    events = []
    # 0.65 MB a checkpoint, of which 0.02 MB are not tensors: too little for the tensors, then for the rest alone.
    for step, free in ((1, None), (2, 300_000), (3, 655_360), (4, None)):
        engine.train_step(synthetic_batch(engine.recipe, engine.topology, step, engine.context.dp_rank), 1e-3)
        if engine.context.rank == 0 and free is not None:
            (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - free))
        saver.save(step, {"data": ""})
        events += saver.finish()
        if engine.context.rank == 0:
            (disk / "filler").unlink(missing_ok=True)
    engine.context.destroy()
    return events


def test_a_full_disk_is_said_costs_nothing_and_saving_goes_on_when_there_is_room(
    pool: RankPool, small_recipe: dict[str, Any], small_disk: Path
) -> None:
    small_recipe["parallelism"]["dp"] = 2
    for events in pool.run(2, save_on_a_full_disk_on_rank, small_recipe, small_disk):
        errors = [event["error"] for event in events]
        assert errors[0] is errors[3] is None
        assert re.fullmatch(r"0\.\d MB are needed in .* and 0\.3 MB are free", errors[1])
        assert re.search(rf"no space left .*\(0\.\d MB are free in {small_disk}\)$", errors[2])
    assert sorted(path.name for path in small_disk.iterdir()) == ["1", "4"]
    assert verify_checkpoint_files(small_disk / "1") == verify_checkpoint_files(small_disk / "4") == []


def save_every_two_hours_on_rank(mapping: dict[str, Any], disk: Path) -> list[list[float]]:
    """A step takes half an hour by a clock that is set, and none by this machine's."""
    engine = start_engine(mapping)
    now = 0.0
    saver = RunSaver(RunFolder(disk.parent, disk), engine, {}, frozenset(), one_disk(), clock=lambda: now)
    saves: list[list[float]] = []
    for step in range(1, 11):
        now += 1799.0 if step == 4 else 1800.0
        batch = synthetic_batch(engine.recipe, engine.topology, step, engine.context.dp_rank)
        result = engine.train_step(batch, 1e-3, lambda: False, saver.is_due_by_clock())
        if result.save_requested:
            saver.save(step, {"data": ""})
            saver.finish()
            # The newest name is that of a checkpoint that is whole.
            newest = max(int(path.name) for path in disk.iterdir())
            assert newest == step and verify_checkpoint_files(disk / str(newest), step=step) == []
            saves.append([step, now])
    engine.context.destroy()
    return saves


def test_every_two_hours_is_by_the_clock_on_the_wall_on_all_ranks_alike(
    pool: RankPool, small_recipe: dict[str, Any], tmp_path: Path
) -> None:
    small_recipe["parallelism"]["dp"] = 2
    small_recipe["checkpoints"] = {"checkpoint_interval_minutes": 120}
    (tmp_path / "steps").mkdir()
    first, second = pool.run(2, save_every_two_hours_on_rank, small_recipe, tmp_path / "steps")
    assert first == second == [[5, 8999.0], [9, 16199.0]], "a second before two hours no save is due"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, small_file: Path, start_process: StartProcess) -> Path:
    """A run that nothing disturbs, and that keeps some of its checkpoints."""
    folder = tmp_path_factory.mktemp("kept")
    policy = ["--set", "checkpoints.keep_last=2", "--set", "checkpoints.keep_every=16"]
    code, _, err = start_process(pretrain_command(small_file, "--run", "kept", *policy), folder).end()
    assert (code, err) == (0, "")
    return folder / "runs" / "kept"


def checkpoints_command(*arguments: str | Path) -> list[str | Path]:
    return [*pretrain_command()[:-1], "checkpoints", *arguments]


def saved(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal())


def test_a_run_keeps_what_it_should_and_records_its_saves(run: Path) -> None:
    assert saved(run) == [16, 32, 40]
    events = [event for event in read_metrics(run / "metrics.jsonl").events if event["event"] == "checkpoint"]
    assert [event["step"] for event in events] == [8, 16, 24, 32, 40]
    assert all(event["error"] is None and event["num_bytes"] > 500_000 for event in events)
    assert not list((run / "checkpoints").glob("*.partial"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    run: Path, small_file: Path, start_process: StartProcess, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "runs" / "kept")
    damaged = tmp_path / "runs" / "kept" / "checkpoints" / "40" / "__1_0.distcp"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 4
    damaged.write_bytes(content)

    code, out, _ = start_process(checkpoints_command("verify", "kept"), tmp_path).end()
    assert code == 1 and "2 of 3 checkpoints are as they were written" in out
    assert f"{damaged.parent.relative_to(tmp_path)}: {damaged.name}: its content is not what was written" in out
    code, out, _ = start_process(checkpoints_command("list", "kept"), tmp_path).end()
    rows = [
        [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
        for line in out.splitlines()
        if "MB" in line or "kB" in line
    ]
    assert code == 0
    assert [(row[0], row[3], row[4]) for row in rows] == [
        ("16", "yes", "one of the last 2"),
        ("32", "yes", "the newest that verifies"),
        ("40", "no", "not kept: prune"),
    ]
    code, out, _ = start_process(checkpoints_command("prune", "kept", "--dry-run"), tmp_path).end()
    assert code == 0 and out == "would delete runs/kept/checkpoints/40\n" and damaged.exists()

    policy = ["--set", "checkpoints.keep_last=2", "--set", "checkpoints.keep_every=16"]
    longer = pretrain_command(small_file, "--run", "kept", *policy, "--set", "tokens.train_steps=42")
    code, out, err = start_process(longer, tmp_path).end()
    assert (code, err) == (0, "")
    assert "checkpoint of step 40 refused: __1_0.distcp: its content is not" in out and "resumed after step 32" in out
    assert saved(tmp_path / "runs" / "kept") == [16, 32, 40, 42]
    before, after = (read_metrics(path / "metrics.jsonl").steps for path in (run, tmp_path / "runs" / "kept"))
    assert curve(after[:TRAIN_STEPS]) == curve(before)
    code, out, _ = start_process(checkpoints_command("verify", "kept"), tmp_path).end()
    assert code == 0 and "4 of 4" in out


def test_a_branch_goes_on_from_any_checkpoint_at_another_topology(
    run: Path, small_file: Path, start_process: StartProcess, tmp_path: Path
) -> None:
    parent = run / "checkpoints" / "16"
    branch = ["--set", f"checkpoints.resume_checkpoint_path={parent}", "--set", "parallelism.tp=2"]
    decay = ["--set", "optimizer.learning_rate_scheduler.lr_decay_starting_step=20"]
    command = pretrain_command(small_file, "--run", "decay", "--stop-after", "18", *branch, *decay)
    code, out, err = start_process(command, tmp_path).end()
    assert (code, err) == (0, "") and f"weights from {parent}" in out
    steps = read_metrics(tmp_path / "runs" / "decay" / "metrics.jsonl").steps
    before = read_metrics(run / "metrics.jsonl").steps
    assert [record.step for record in steps] == [17, 18]
    for record in steps:
        assert record.loss == pytest.approx(before[record.step - 1].loss, abs=1e-5)
        assert (record.lr, record.tokens) == (before[record.step - 1].lr, before[record.step - 1].tokens)
    header = RunHeader.parse((tmp_path / "runs" / "decay" / "recipe.yaml").read_text())
    assert header.parent == f"{parent} (step 16, data {header.data[:12]})"

    # The parent is part of the past: without it this is another run.
    code, _, err = start_process(pretrain_command(small_file, "--run", "decay"), tmp_path).end()
    assert code == 2 and "checkpoints.resume_checkpoint_path" in err
    past = ["--set", "optimizer.learning_rate_scheduler.lr_decay_starting_step=10"]
    code, _, err = start_process(pretrain_command(small_file, "--run", "refused", *branch, *past), tmp_path).end()
    assert code == 2 and "would change steps already taken" in err and "lr_decay_starting_step" in err

    fresh = ["--set", "checkpoints.load_optimizer=false", "--set", "checkpoints.load_lr_scheduler=false"]
    command = pretrain_command(small_file, "--run", "fresh", "--stop-after", "1", *branch, *past, *fresh)
    code, _, err = start_process(command, tmp_path).end()
    assert (code, err) == (0, "")
    (first,) = read_metrics(tmp_path / "runs" / "fresh" / "metrics.jsonl").steps
    assert first.loss is not None and before[0].loss is not None and first.loss < before[0].loss - 0.5
    state = (tmp_path / "runs" / "fresh" / "checkpoints" / "1" / "state.json").read_text()
    assert '"optimizer_updates": 1' in state


def test_kill_9_inside_a_save_costs_nothing(
    run: Path, small_file: Path, start_process: StartProcess, tmp_path: Path
) -> None:
    often = ["--set", "checkpoints.checkpoint_interval=1000", "--set", "checkpoints.checkpoint_interval_minutes=0.0001"]
    command = pretrain_command(small_file, "--run", "killed", *often, "--set", "checkpoints.keep_last=3")
    killed = tmp_path / "runs" / "killed"
    first = start_process(command, tmp_path)
    first.wait_for_step(killed / "metrics.jsonl", 6)
    end = time.monotonic() + 60
    while not list((killed / "checkpoints").glob("*.partial")):
        assert time.monotonic() < end
    first.kill()
    newest = saved(killed)[-1]
    assert 1 <= newest < TRAIN_STEPS and verify_checkpoint_files(killed / "checkpoints" / str(newest)) == []
    code, out, err = start_process(command, tmp_path).end()
    assert (code, err) == (0, "") and f"resumed after step {newest}" in out
    after = read_metrics(killed / "metrics.jsonl")
    assert curve(after.steps) == curve(read_metrics(run / "metrics.jsonl").steps)
    assert len(saved(killed)) == 3 and saved(killed)[-1] == TRAIN_STEPS
    assert not [path for path in (killed / "checkpoints").iterdir() if not path.name.isdecimal()]
