"""No record ends a training: what a full disk, or a server that is gone, does to what rank 0 writes."""

import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest
from faulty_disks import FULL, fill
from test_metrics import step_record

from launch.train import rank
from launch.train.guards import RunFailed
from launch.train.metrics import MetricsWriter, RecordsLost, read_metrics, validation_event
from launch.train.outage import QUIET_SECONDS, Outage
from launch.train.run_folder import RunFolder
from launch.train.tensorboard import TensorBoard
from launch.train.tracing import StepTracer
from nanotron_recipes.recipe import Recipe
from nanotron_recipes.schema.services import Profiler


def test_records_that_find_no_room_wait_and_are_written_in_order(small_disk: Path) -> None:
    path, said = small_disk / "metrics.jsonl", list[str]()
    writer = MetricsWriter(path, said.append)
    writer.on_step(step_record(1))
    filler = fill(small_disk)
    for step in range(2, 60):
        writer.on_step(step_record(step))
    writer.on_event(validation_event(59, {"code": 1.0}))
    written = len(read_metrics(path).steps)
    assert 1 < written < 58 and not path.read_bytes().endswith(b"\n"), "one is cut short by the end of a page"
    filler.unlink()
    writer.on_step(step_record(60))
    writer.on_step(step_record(61))
    writer.close()
    metrics = read_metrics(path)
    assert metrics.steps == [step_record(step) for step in range(1, 62)]
    assert [event["event"] for event in metrics.events] == ["validation"]
    assert path.read_bytes().count(b"\n") == 63, "the line that was cut short is the only one too many"
    assert said == [
        f"{path}: {FULL}; training goes on, records wait in memory",
        f"{path}: written again, with every record",
    ]


def test_records_that_are_lost_at_the_end_are_counted(small_disk: Path) -> None:
    path = small_disk / "metrics.jsonl"
    writer = MetricsWriter(path, lambda line: None)
    fill(small_disk)
    for step in range(1, 4):
        writer.on_step(step_record(step))
    lost = f"{path}: 3 records lost: {FULL}"
    with pytest.raises(RecordsLost, match=f"^{re.escape(lost)}$"):
        writer.close()


def test_records_that_find_room_at_the_very_end_are_not_lost(small_disk: Path) -> None:
    path, said = small_disk / "metrics.jsonl", list[str]()
    writer = MetricsWriter(path, said.append)
    filler = fill(small_disk)
    writer.on_step(step_record(1))
    filler.unlink()
    writer.close()
    assert read_metrics(path).steps == [step_record(1)]
    assert said[-1] == f"{path}: written again, with every record"


@pytest.mark.parametrize("number", [errno.EIO, errno.EDQUOT, errno.EROFS, errno.ESTALE])
def test_a_file_whose_handle_stays_bad_is_opened_anew(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad: set[int] = set()
    write = os.write

    def faulty(descriptor: int, content: bytes) -> int:
        if descriptor in bad:
            raise OSError(number, os.strerror(number))
        return write(descriptor, content)

    monkeypatch.setattr(os, "write", faulty)
    said: list[str] = []
    writer = MetricsWriter(tmp_path / "metrics.jsonl", said.append)
    bad.update(range(1000))
    writer.on_step(step_record(1))
    bad.clear()
    writer.on_step(step_record(2))
    writer.close()
    assert [record.step for record in read_metrics(tmp_path / "metrics.jsonl").steps] == [1, 2]
    assert len(said) == 2 and os.strerror(number) in said[0]


def test_tensorboard_leaves_out_what_finds_no_room_and_goes_on_in_another_file(small_disk: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, said = small_disk / "tensorboard", list[str]()
    board = TensorBoard(folder, 1, said.append)
    board.on_step(step_record(1))
    filler = fill(small_disk)
    for step in range(2, 40):
        board.on_step(step_record(step))
    board.on_event(validation_event(39, {"code": 1.0}))
    filler.unlink()
    for step in range(40, 43):
        board.on_step(step_record(step))
    board.close()
    assert len(list(folder.iterdir())) == 2
    events = EventAccumulator(str(folder))
    events.Reload()
    steps = [event.step for event in events.Scalars("train/loss")]
    written = steps.index(40)
    assert steps == [*range(1, written + 1), 40, 41, 42] and 1 <= written < 38
    assert said == [
        f"{folder}: {FULL}; training goes on without new points for TensorBoard",
        f"{folder}: new points are written again",
    ]


def test_tensorboard_that_finds_no_room_at_its_start_cuts_the_curves_later(small_disk: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(small_disk, 1, lambda line: None)
    for step in range(1, 6):
        board.on_step(step_record(step))
    board.close()
    filler = fill(small_disk)
    resumed = TensorBoard(small_disk, 3, lambda line: None)
    resumed.on_step(step_record(3))
    assert len(list(small_disk.glob("*tfevents*"))) == 1
    filler.unlink()
    resumed.on_step(step_record(4))
    resumed.close()
    events = EventAccumulator(str(small_disk))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 4]


def test_a_trace_that_finds_no_room_ends_nothing(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = Profiler(profiler_export_path="traces", skip_first=0, wait=0, warmup=1, active=1, repeat=1)
    tracer = StepTracer(small_disk, section, first_step=1, rank=0)
    fill(small_disk)
    for _ in range(3):
        tracer.step()
    tracer.close()
    path = small_disk / "traces" / "until-step-2-rank-0.json.gz"
    assert capsys.readouterr().err == f"{path}: not written: {FULL}\n" and not path.exists()


def test_lost_records_are_said_beside_the_reason_of_a_failure(
    small_disk: Path, small_mapping: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder.of(small_disk, "run", Recipe.model_validate(small_mapping))
    folder.path.mkdir()
    writer = MetricsWriter(folder.metrics_file, lambda line: None)
    fill(small_disk)
    with pytest.raises(RunFailed) as caught, rank._closing(writer):
        writer.on_step(step_record(1))
        raise RunFailed("replicas", 1, "copies differ")
    monkeypatch.setattr(rank.torch_dist, "get_rank", lambda: 0)
    monkeypatch.setattr(rank.torch_dist, "destroy_process_group", lambda: None)
    assert rank._fail(folder, caught.value) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"{folder.metrics_file}: 1 record lost: {FULL}",
        f"error: {folder.path}: copies differ",
        f"{folder.failed_file}: could not be written: {FULL}",
    ]


def test_an_outage_is_told_once_and_short_ones_after_it_are_not() -> None:
    now, said = [0.0], list[str]()
    outage = Outage("disk", "wait", "well", said.append, lambda: now[0])
    outage.succeeded()
    for _ in range(3):
        outage.failed(OSError(errno.ENOSPC, FULL))
    outage.succeeded()
    outage.succeeded()
    told = [f"disk: {FULL}; wait", "disk: well"]
    assert said == told
    now[0] = QUIET_SECONDS - 1
    outage.failed(ValueError("not\nthis"))
    outage.succeeded()
    outage.failed(ValueError("a longer one"))
    assert said == told
    now[0] = QUIET_SECONDS
    outage.failed(ValueError("a longer one"))
    assert said == [*told, "disk: a longer one; wait"]
