"""A rank that makes the others wait is named, from a real run in which one sleeps in its forward pass."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_pretraining import StartProcess
from test_guards_run import run_planted

from launch.status.gather import gather
from launch.status.gpu import GpuHealth
from launch.status.rank_report import (
    KEPT_WINDOWS,
    WINDOW_STEPS,
    RankReport,
    StepWindows,
    Window,
    read_reports,
    write_report,
)
from launch.status.runs import read_run
from launch.status.speed import slow_ranks
from launch.train.rank_reporter import RankPlace, RankReporter

GPU = GpuHealth("H100", 61, 1200, 1980, ["thermal (hardware)"], 10**9, 8 * 10**10)


def test_a_rank_that_sleeps_in_its_forward_is_named(
    small_file: Path, start_process: StartProcess, tmp_path: Path
) -> None:
    code, _, err = run_planted(start_process, tmp_path, "slow_rank", small_file, "tokens.train_steps=31")
    assert code == 0, err
    reports = read_reports(tmp_path / "runs" / "planted")
    assert [(report.rank, report.step) for report in reports] == [(0, 31), (1, 31)]
    (slow,) = slow_ranks(reports)
    assert slow.ranks == [1] and not slow.is_loader and slow.since_step == 1
    own = [report.windows[-1].own_seconds or 0 for report in reports]
    assert own[1] > 0.15 and own[1] > 1.5 * own[0]
    status = gather(read_run(tmp_path / "runs" / "planted"))
    assert status.nodes[0].ranks == [0, 1] and status.nodes[0].step == 31


@pytest.mark.long
@pytest.mark.parametrize(("split", "named"), [("pp", [1]), ("tp", [0, 1])])
def test_stages_that_wait_for_it_are_not_named_and_its_tensor_group_is(
    split: str, named: list[int], small_file: Path, start_process: StartProcess, tmp_path: Path
) -> None:
    settings = ("tokens.train_steps=31", "parallelism.dp=2", f"parallelism.{split}=2")
    code, _, err = run_planted(start_process, tmp_path, "slow_rank", small_file, *settings, ranks=4)
    assert code == 0, err
    (slow,) = slow_ranks(read_reports(tmp_path / "runs" / "planted"))
    assert slow.ranks == named


def report(rank: int, compute: list[float | None], wait: float = 0.0, size: int = 10, **changes: int) -> RankReport:
    windows = [Window(size, size * number, seconds, wait) for number, seconds in enumerate(compute, 1)]
    place = {"pp_rank": 0, "tp_group": rank, **changes}
    return RankReport(
        rank, "a", "host", f"node{rank // 2}", **place, time=1.0, step=9, memory_bytes=1, windows=windows, gpu=None
    )


def test_only_what_lasts_is_slow() -> None:
    usual = [report(rank, [1.0] * 5) for rank in range(3)]
    assert slow_ranks([*usual, report(3, [1.0, 1.0, 1.5, 1.5, 1.0])]) == []
    assert slow_ranks([*usual, report(3, [1.0, 1.0, 1.0, 1.5, 1.5])]) == []
    assert slow_ranks([*usual, report(3, [1.19] * 5)]) == []
    (slow,) = slow_ranks([*usual, report(3, [1.0, 1.0, 1.5, 1.5, 1.5])])
    assert (slow.ranks, slow.nodes, slow.since_step) == ([3], ["node1"], 21)
    assert str(slow) == "rank 3 on node1 takes 1.5 × the median of all, since step 21"


def test_a_rank_that_waits_for_its_loader_is_named_with_the_cause() -> None:
    (slow,) = slow_ranks([report(0, [1.0] * 3), report(1, [1.0] * 3), report(2, [1.0] * 3, wait=0.6)])
    assert slow.ranks == [2] and slow.is_loader and "waiting for its loader" in str(slow)


def test_ranks_of_a_tensor_group_are_named_together_and_stages_are_not_compared() -> None:
    group = [report(rank, [1.0] * 3, tp_group=rank // 2 * 2) for rank in range(4)]
    group += [report(rank, [2.0] * 3, tp_group=4) for rank in (4, 5)]
    (slow,) = slow_ranks(group)
    assert slow.ranks == [4, 5]
    assert slow_ranks([report(0, [1.0] * 3, pp_rank=0), report(1, [3.0] * 3, pp_rank=1)]) == []


def test_where_it_cannot_be_told_nobody_is_named() -> None:
    assert slow_ranks([]) == []
    assert slow_ranks([report(0, [None] * 3), report(1, [None] * 3)]) == []
    assert slow_ranks([report(0, [1.0] * 3), report(1, [])]) == []


def test_files_that_are_many_short_windows_apart_are_compared_by_the_long_ones() -> None:
    early, late = StepWindows(), StepWindows()
    for step in range(1, 801):
        if step <= 500:
            early.observe(step, 0.1, 0.0)
        late.observe(step, 0.2, 0.0)
    times = [report(0, []), report(1, [])]
    reports = [
        RankReport(**{**vars(each), "windows": windows.newest()})
        for each, windows in zip(times, (early, late), strict=True)
    ]
    assert {window.last_step for window in early.newest()} & {window.last_step for window in late.newest()} == {
        100, 200, 300, 400, 500,
    }  # fmt: skip
    (slow,) = slow_ranks(reports)
    assert slow.ranks == [1]


@given(st.lists(st.integers(1, 400), min_size=1, max_size=5))
def test_windows_end_at_multiples_and_never_span_a_rewind(lengths: list[int]) -> None:
    windows, step = StepWindows(), 0
    for length in lengths:
        for _ in range(length):
            step += 1
            windows.observe(step, float(step), 0.0)
        newest = windows.newest()
        assert all(window.last_step % window.steps == 0 and window.last_step <= step for window in newest)
        assert all(window.compute_seconds == window.last_step - (window.steps - 1) / 2 for window in newest)
        assert len(newest) <= len(WINDOW_STEPS) * KEPT_WINDOWS
        step //= 2


def test_reports_of_earlier_starts_and_broken_ones_are_left_out(tmp_path: Path) -> None:
    for each in (report(0, [1.0]), report(1, [1.0])):
        write_report(tmp_path, each)
    newer = RankReport(**{**vars(report(1, [2.0])), "launch": "b", "time": 2.0, "gpu": GPU})
    write_report(tmp_path, newer)
    for name, text in (("3", "{"), ("4", "[]"), ("5", json.dumps({"rank": 5})), ("6", '{"windows": 3, "gpu": null}')):
        (tmp_path / "ranks" / f"{name}.json").write_text(text)
    assert read_reports(tmp_path) == [newer]
    assert read_reports(tmp_path / "nowhere") == []


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_full_disk_is_said_once_and_costs_no_step(small_disk: Path) -> None:
    said: list[str] = []
    full = small_disk / "full"
    full.write_bytes(b"x" * (4096 * ((os.statvfs(small_disk).f_bavail) - 1)))
    (small_disk / "rest").write_bytes(b"x" * 4096 * os.statvfs(small_disk).f_bavail)
    reporter = RankReporter(small_disk, RankPlace(0, 0, 0, "n", "l"), torch.device("cpu"), said.append, seconds=0.01)
    wait_until(lambda: bool(said))
    for step in range(1, 21):
        reporter.on_step(step, 1.0, 0.5)
    full.unlink()
    wait_until(lambda: len(said) == 2)
    reporter.close()
    assert "No space left on device; training goes on" in said[0] and "written again" in said[1]
    (written,) = read_reports(small_disk)
    assert written.step == 20 and [window.own_seconds for window in written.windows] == [1.5, 1.5]


def test_a_disk_that_does_not_answer_is_waited_for_by_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()
    monkeypatch.setattr("launch.train.rank_reporter.write_report", lambda *_: answers.wait())
    monkeypatch.setattr("launch.train.rank_reporter._PATIENCE_SECONDS", 0.2)
    reporter = RankReporter(tmp_path, RankPlace(0, 0, 0, "n", "l"), torch.device("cpu"))
    began = time.monotonic()
    for step in range(1, 21):
        reporter.on_step(step, 1.0, 0.0)
    reporter.close()
    assert time.monotonic() - began < 2
    answers.set()
