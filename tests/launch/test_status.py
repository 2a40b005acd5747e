"""`status`: what it says of runs in every state, from their files alone."""

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from status_runs import RECIPE, ROOT, command, make_run, record, shown, start, status_of

from launch.cli.checkpoints import checkpoints
from launch.cluster.attempts import Begin, End, NodeEnd, write_begin, write_end, write_node_end
from launch.status.gather import gather
from launch.status.rank_report import RankReport, Window, write_report
from launch.status.records import read_records
from launch.status.runs import find_run, read_run
from launch.status.show import next_command
from launch.status.speed import SpeedWatch, find_drop, seconds_left
from launch.train.metrics import StepRecord, read_metrics
from launch.train.run_lock import RunLock
from nanotron_recipes.errors import UserError
from nanotron_recipes.loading import dump_yaml, load_recipe
from parallel.checkpoint_files import Manifest, write_manifest


def test_a_run_that_trains_is_told_with_its_speed_and_what_is_left(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "a", [start(1, dp=1), *(record(step) for step in range(1, 101))])
    with RunLock.acquire(folder.path, "launch"):
        status = status_of(folder)
        text = shown(status)
    assert (status.state, status.step, status.train_steps) == ("training", 100, 200)
    assert status.tokens_per_second == status.usual_tokens_per_second == 1000.0
    assert status.eta_seconds == pytest.approx(100 * 3072 / 1000)
    assert status.drop is None and "100 of 200 (50.0%)" in text and "5m07s" in text
    assert f"process {os.getpid()}" in status.message
    assert status_of(folder).state == "stopped"


def test_mfu_is_that_of_the_speed_beside_it(tmp_path: Path) -> None:
    """Both are medians of the last steps: one step that had the machine to itself says little."""
    steps = [record(step) for step in range(1, 40)]
    folder = make_run(tmp_path, "a", [start(1, dp=1), *steps, record(40, 3000.0) | {"mfu": 0.3}])
    status = status_of(folder)
    assert (status.tokens_per_second, status.mfu) == (1000.0, 0.1)
    unknown = make_run(tmp_path, "b", [start(1, dp=1), *(step | {"mfu": None} for step in steps)])
    assert status_of(unknown).mfu is None


def test_a_sustained_drop_is_flagged_with_its_first_step(tmp_path: Path) -> None:
    usual, slow = [record(step) for step in range(1, 81)], [record(step, 700.0) for step in range(81, 111)]
    folder = make_run(tmp_path, "a", [start(1, dp=1), *usual, *slow])
    with RunLock.acquire(folder.path, "launch"):
        status = status_of(folder)
        text = shown(status)
    assert status.drop is not None and status.drop.since_step == 81
    assert status.slow_seconds == pytest.approx(30 * 3072 / 700)
    assert "SLOW" in text and "since step 81, 70% of the run's median (1,000)" in text
    assert status_of(folder).drop is None, "a run that has stopped is not slow"


def test_a_few_slow_steps_and_another_topology_are_no_drop(tmp_path: Path) -> None:
    usual, pause = [record(step) for step in range(1, 81)], [record(step, 10.0) for step in range(81, 90)]
    folder = make_run(tmp_path, "a", [start(1, dp=2), *usual, *pause])
    fewer = [start(81, dp=1), *(record(step, 500.0) for step in range(81, 150))]
    other = make_run(tmp_path, "b", [start(1, dp=2), *usual, *pause, *fewer])
    for each in (folder, other):
        with RunLock.acquire(each.path, "launch"):
            assert status_of(each).drop is None
    with RunLock.acquire(other.path, "launch"):
        assert status_of(other).usual_tokens_per_second == 500.0


def test_a_watch_finds_what_status_finds_once(tmp_path: Path) -> None:
    speeds = [1000.0] * 60 + [700.0] * 30 + [1000.0] * 30 + [600.0] * 30
    watch = SpeedWatch(lambda step: 256)
    records = [StepRecord(**record(step, speed)) for step, speed in enumerate(speeds, 1)]
    found = [(each.step, drop) for each in records if (drop := watch.observe(each)) is not None]
    assert [step for step, _ in found] == [71, 131]
    assert [drop.since_step for _, drop in found] == [61, 121]
    assert find_drop(records, 1000.0) is not None


def test_another_sequence_length_is_no_drop() -> None:
    watch = SpeedWatch(lambda step: 256 if step <= 60 else 512)
    speeds = [1000.0] * 60 + [500.0] * 60
    assert not any(watch.observe(StepRecord(**record(step, speed))) for step, speed in enumerate(speeds, 1))


def test_time_left_counts_the_tokens_of_longer_sequences() -> None:
    base = load_recipe("tiny", ["tokens.train_steps=1100"]).recipe
    assert seconds_left(base, 1000, 3072.0) == pytest.approx(100)
    assert seconds_left(base, 1100, 3072.0) == 0


def test_attempts_of_jobs_say_how_often_and_why_it_was_started_again(tmp_path: Path) -> None:
    begun = start(1, launch="slurm-41.0", dp=1)
    folder = make_run(tmp_path, "a", [begun, *(record(step) for step in range(1, 31))])
    place = folder.jobs / "1"
    place.mkdir(parents=True)
    (place / "job.json").write_text(json.dumps({"slurm_job": "41", "nodes": 2, "stop_after": None}))
    assert status_of(folder).state == "queued" and next_command(status_of(folder)) == "squeue --job 41"
    write_begin(folder.path, Begin("41", 0, ["n1", "n2"], "2026-01-01T00:00:00+00:00", 0))
    write_node_end(folder.path, "41", 0, NodeEnd("n2", "crashed", "rank 3 was ended by SIGKILL", 5.0, True))
    end = End("requeue", "n2: rank 3 was ended by SIGKILL", 20, "2026-01-01T01:00:00+00:00", True, 60, [])
    write_end(folder.path, "41", 0, end)
    status = status_of(folder)
    assert status.state == "queued" and "SIGKILL" in status.message
    assert [(each.start, each.nodes, each.verdict) for each in status.restarts] == [("41.0", ["n1", "n2"], "requeue")]
    write_begin(folder.path, Begin("41", 1, ["n1", "n3"], "2026-01-01T02:00:00+00:00", 20))
    write_end(folder.path, "41", 1, End("give up", "it would fail again: loss", 20, "2026", True, 0, []))
    status = status_of(folder)
    text = shown(status)
    assert status.state == "failed" and "give up" in text and "n1, n3" in text and len(status.restarts) == 2
    assert next_command(status).endswith(f"{folder.recipe_file} --run a --nodes 2")


def test_a_job_that_has_begun_and_says_no_more_is_neither_queued_nor_ended(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "a", [])
    write_begin(folder.path, Begin("41", 0, ["n1", "n2"], "2026-01-01T00:00:00+00:00", 0))
    status = status_of(folder)
    assert status.state == "begun" and next_command(status) == "squeue --job 41"
    assert status.message == "job 41 began on 2 nodes, and has not said how it ended"


@pytest.mark.parametrize("event", [start(51, dp=1), {"event": "rewind", "step": 100, "to": 50}])
def test_after_a_resume_or_a_rewind_the_step_and_the_speed_are_those_of_now(
    tmp_path: Path, event: dict[str, Any]
) -> None:
    before = [start(1, dp=1), *(record(step) for step in range(1, 101)), event]
    folder = make_run(tmp_path, "a", [*before, record(51, 500.0), record(52, 500.0)])
    with RunLock.acquire(folder.path, "launch"):
        status = status_of(folder)
    assert (status.step, status.loss) == (52, record(52)["loss"])
    again = make_run(tmp_path, "b", before)
    assert status_of(again).step == 50


def test_the_folder_of_a_step_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = make_run(Path("runs"), "a", [])
    step = folder.checkpoints / "8"
    step.mkdir(parents=True)
    write_manifest(step, Manifest(8, "", {}, ()))
    (step / "recipe.yaml").write_text(folder.recipe_file.read_text())
    for call in (lambda: find_run(str(step), Path("runs")), lambda: checkpoints("verify", str(step))):
        with pytest.raises(UserError, match=r"runs/a/checkpoints/8: a checkpoint; expected its run"):
            call()


def test_a_folder_without_a_recipe_and_no_name_are_told_from_a_run_that_is_not_there(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "a", [])
    folder.recipe_file.unlink()
    for argument, said in (
        ("a", rf"^a: no recipe\.yaml in {folder.path}; expected a run's folder"),
        (str(folder.path), r"no recipe\.yaml in "),
        ("b", r"^b: no such run in "),
        ("", r"^'': expected a run: its name in "),
    ):
        with pytest.raises(UserError, match=said):
            find_run(argument, tmp_path)


def test_what_is_to_be_called_next_is_printed_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", "from launch.cli.main import main; main()", "status"]
    name = "a-name-that-is-longer-than-what-eighty-columns-leave-for-it-" * 2 + "x"
    make_run(tmp_path / "runs", name, [start(1, dp=1), record(1)])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    done = subprocess.run([*command, name], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].endswith(f"runs/{name}/recipe.yaml --run {name}"), done.stdout


def test_a_run_that_was_resumed_a_moment_ago_is_not_quiet(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "a", [start(1, dp=1), *(record(step) for step in range(1, 31))])
    yesterday = time.time() - 86400
    os.utime(folder.metrics_file, (yesterday, yesterday))
    with RunLock.acquire(folder.path, "launch"):
        assert status_of(folder).quiet_seconds is None


def test_starts_without_slurm_are_told_with_their_time_and_end(tmp_path: Path) -> None:
    times = [f"2026-01-0{day}T00:00:00+00:00" for day in (1, 2, 3)]
    ended = {"event": "end", "time": times[2], "verdict": "stopped", "reason": "--stop-after"}
    before = [start(1, time=times[0]), record(1), record(2), start(2, time=times[1]), record(2), ended]
    folder = make_run(tmp_path, "a", [*before, start(3, time=times[2]), record(3)])
    starts = status_of(folder).restarts
    assert [(each.start, each.time, each.after_step) for each in starts] == [
        ("1", times[0], 0),
        ("2", times[1], 1),
        ("3", times[2], 2),
    ]
    assert [each.verdict for each in starts] == ["lost", "stopped", "lost"] and starts[1].reason == "--stop-after"
    with RunLock.acquire(folder.path, "launch"):
        assert status_of(folder).restarts[-1].verdict == "", "what trains has not ended"
    text, here = shown(status_of(folder)), f"{datetime.fromisoformat(times[1]).astimezone():%Y-%m-%d %H:%M}"
    assert "--stop-after" in text and here in text and times[1] not in text and "nodes" not in text


def test_a_run_that_never_began_goes_on_with_the_recipe_of_its_submission(tmp_path: Path) -> None:
    place = tmp_path / "a" / "jobs" / "1"
    place.mkdir(parents=True)
    (place / "tiny.yaml").write_text(dump_yaml(RECIPE))
    (place / "job.json").write_text(json.dumps({"slurm_job": "41", "nodes": 2, "stop_after": None}))
    status = gather(read_run(tmp_path / "a"))
    assert status.state == "queued" and next_command(status) == "squeue --job 41"
    for action in ("list", "pull"):
        with pytest.raises(UserError, match=r"a: was submitted and has not begun"):
            checkpoints(action, str(tmp_path / "a"))
    write_begin(tmp_path / "a", Begin("41", 0, ["n1", "n2"], "2026-01-01T00:00:00+00:00", 0))
    write_end(tmp_path / "a", "41", 0, End("give up", "no text", 0, "2026", True, 0, []))
    status = gather(read_run(tmp_path / "a"))
    assert status.state == "failed" and next_command(status).endswith(f"{place / 'tiny.yaml'} --run a --nodes 2")


def test_nodes_gpus_and_a_quiet_run_are_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "a", [start(1, dp=2), *(record(step) for step in range(1, 31))])
    for rank in (0, 1):
        windows = [Window(10, 10 * number, 1.0 + rank, 0.0) for number in (1, 2, 3)]
        gpu = {"name": "H100", "temperature_celsius": 60 + rank, "sm_clock_mhz": 1980 - 500 * rank}
        gpu |= {"max_sm_clock_mhz": 1980, "throttled": ["thermal (hardware)"] * rank}
        gpu |= {"memory_used_bytes": 70 * 10**9, "memory_total_bytes": 80 * 10**9}
        place = {"rank": rank, "launch": "l", "host": "h", "node": "n1", "pp_rank": 0, "tp_group": rank, "step": 30}
        report = RankReport(**place, time=time.time(), memory_bytes=5, windows=windows, gpu=None)
        write_report(folder.path, report)
        file = folder.path / "ranks" / f"{rank}.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "gpu": gpu}))
    os.utime(folder.metrics_file, (time.time() - 900, time.time() - 900))
    with RunLock.acquire(folder.path, "launch"):
        holder = json.loads((folder.path / "holder.json").read_text())
        hours_ago = datetime.fromtimestamp(time.time() - 7200, UTC).isoformat(timespec="seconds")
        (folder.path / "holder.json").write_text(json.dumps({**holder, "since": hours_ago}))
        status = status_of(folder)
    (node,) = status.nodes
    assert (node.temperature_celsius, node.sm_clock_mhz, node.throttled) == (61, 1480, ["rank 1: thermal (hardware)"])
    assert [each.ranks for each in status.slow_ranks] == [[1]]
    text = shown(status)
    assert "no record for 15m" in text and "1480 of 1980" in text and "70.0 GB of 80.0 GB" in text
    assert "SLOW RANK" in text and "rank 1 on n1 takes 2.0 ×" in text


def test_of_many_nodes_those_to_look_at_are_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "a", [record(1)])
    for rank in range(20):
        place = {"rank": rank, "launch": "l", "host": "h", "node": f"n{rank}", "pp_rank": 0, "tp_group": rank}
        windows = [Window(10, 10, float(rank), 0.0)]
        write_report(
            folder.path, RankReport(**place, step=1, time=time.time(), memory_bytes=5, windows=windows, gpu=None)
        )
    text = shown(status_of(folder))
    assert len(status_of(folder).nodes) == 20 and "20 nodes, of which 16 to look at first" in text
    assert "n19" in text and "n4 " in text and "n3 " not in text


def test_a_checkpoint_on_disks_that_are_not_seen_is_known_from_the_record(tmp_path: Path) -> None:
    saves = [{"event": "checkpoint", "step": step, "num_bytes": 7, "error": error} for step, error in
             ((10, None), (20, None), (30, "full"))]  # fmt: skip
    folder = make_run(tmp_path, "a", [*saves, record(30)])
    found = status_of(folder).checkpoint
    assert found is not None and (found.step, found.time, found.copies) == (20, None, None)
    assert "not seen from here" in found.problem


def test_a_checkpoint_that_a_rewind_has_deleted_is_not_the_newest(tmp_path: Path) -> None:
    saves = [{"event": "checkpoint", "step": step, "num_bytes": step, "error": None} for step in (600, 800, 1000)]
    back = {"event": "rewind", "step": 1100, "to": 600}
    folder = make_run(tmp_path, "a", [*saves, back, {**saves[0], "step": 700, "num_bytes": 7}])
    found = status_of(folder).checkpoint
    assert found is not None and (found.step, found.num_bytes) == (700, 7)


def test_a_damaged_checkpoint_is_said_without_reading_it(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "a", [record(30)])
    (folder.checkpoints / "30").mkdir(parents=True)
    (folder.checkpoints / "30" / "manifest.json").write_text("{")
    found = status_of(folder).checkpoint
    assert found is not None and found.step == 30 and "manifest.json" in found.problem


def test_a_large_record_is_read_in_part(tmp_path: Path) -> None:
    records = [start(1, dp=1), *(record(step, 1000.0 + step % 7) for step in range(1, 20_001))]
    folder = make_run(tmp_path, "a", records)
    size = folder.metrics_file.stat().st_size
    assert size > 4_600_000
    some, whole = read_records(folder.metrics_file, whole_bytes=10_000), read_records(folder.metrics_file)
    assert not some.is_whole and whole.is_whole
    assert some.metrics.steps[-1] == whole.metrics.steps[-1] and some.metrics.events == whole.metrics.events
    assert some.metrics.steps[0].step == 1
    assert read_records(folder.path / "none").metrics == read_metrics(Path(os.devnull))


@pytest.mark.parametrize("slow_from", [57_001, 51_001])
def test_in_a_large_record_the_many_last_steps_weigh_as_much_as_they_are_of_the_run(
    slow_from: int, tmp_path: Path
) -> None:
    records = [record(step, 20_000.0 if step < slow_from else 10_000.0) for step in range(1, 60_001)]
    folder = make_run(tmp_path, "a", [start(1, dp=1), *records])
    with RunLock.acquire(folder.path, "launch"):
        status = status_of(folder)
    assert not status.is_whole_record and status.usual_tokens_per_second == 20_000
    assert status.drop is not None and status.drop.tokens_per_second == 10_000


def test_an_evaluation_without_figures_hides_none_that_has_them(tmp_path: Path) -> None:
    measured = {"event": "evaluation", "step": 1, "source_loss": {"a": 1.0}}
    at_the_end = {"event": "evaluation", "step": 2, "bigram_bits_per_byte": {"a": 2.0}}
    folder = make_run(tmp_path, "a", [record(1), measured, record(2), at_the_end])
    assert status_of(folder).evaluation == measured


def test_the_command_answers_at_once_and_says_what_to_do_next(tmp_path: Path) -> None:
    assert command(cwd=tmp_path).stdout.splitlines()[-1] == "next: nanotron-recipes pretrain tiny"
    runs = tmp_path / "runs"
    make_run(runs, "a", [record(step) for step in range(1, 31)])
    folder = make_run(runs, "b", [record(step) for step in range(1, 31)])
    folder.mark_failed("skipped_steps", 30, "the loss was not finite")
    (runs / "latest").symlink_to("b")
    (runs / "no-run").mkdir()
    done = command(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[1][:3] == ["a", "stopped", "30/200"] and lines[2][:3] == ["b", "failed", "30/200"]
    assert "the loss was not finite" in done.stdout and done.stdout.splitlines()[-1].startswith(
        "next: read runs/b/logs"
    )
    content = json.loads(command("a", "--json", cwd=tmp_path).stdout)
    assert content["state"] == "stopped" and content["step"] == 30 and content["checkpoint"] is None
    assert command("runs/a", cwd=tmp_path).returncode == 0
    watched = command("a", "--watch", cwd=tmp_path)
    assert watched.returncode == 0 and "30 of 200" in watched.stdout, "a run that has ended is shown once"
    (runs / "latest").unlink()
    (runs / "latest").symlink_to("gone")
    assert command(cwd=tmp_path).returncode == 0
    for arguments, message in (
        (["bb"], "did you mean b?"),
        (["--watch", "--json"], "--watch: "),
        (["--json"], "runs/latest: leads to no run; expected RUN"),
        (["--watch"], "runs/latest: leads to no run; expected RUN"),
    ):
        mistake = command(*arguments, cwd=tmp_path)
        assert mistake.returncode == 2 and message in mistake.stderr and len(mistake.stderr.splitlines()) == 1
