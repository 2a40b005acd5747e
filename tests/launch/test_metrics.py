import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.train.metrics import MetricsWriter, StepRecord, read_metrics, validation_event


def step_record(step: int, loss: float | None = 2.5) -> StepRecord:
    return StepRecord(
        step=step,
        tokens=step * 3072,
        loss=loss,
        lr=1e-2,
        grad_norm=0.5,
        tokens_per_second=1e5,
        step_seconds=0.03,
        data_wait_seconds=0.0,
        memory_peak_bytes=10**9,
        mfu=None,
        stage="prose",
    )


def write(path: Path, *records: StepRecord) -> None:
    writer = MetricsWriter(path)
    for record in records:
        writer.on_step(record)
    writer.close()


def test_a_step_record_has_exactly_the_agreed_keys(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", step_record(1))
    assert list(json.loads((tmp_path / "metrics.jsonl").read_text())) == [
        "step",
        "tokens",
        "loss",
        "lr",
        "grad_norm",
        "tokens_per_second",
        "step_seconds",
        "data_wait_seconds",
        "memory_peak_bytes",
        "mfu",
        "stage",
    ]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_loss_comes_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, loss: float) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    write(path, step_record(1, loss))
    read = read_metrics(path).steps[0].loss
    assert read is not None and math.copysign(1, read) == math.copysign(1, loss) and read == loss


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.on_step(step_record(1, math.nan))
    writer.on_event(validation_event(1, {"code": math.inf, "prose": 2.0}))
    writer.close()
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()
    metrics = read_metrics(path)
    assert metrics.steps[0].loss is None
    assert metrics.events[0]["validation_loss"] == {"code": None, "prose": 2.0}


def test_after_a_resume_the_last_record_of_a_step_wins(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, step_record(1, 5.0), step_record(2, 4.0), step_record(3, 3.0))
    write(path, step_record(2, 4.5), step_record(3, 3.5))
    assert [(record.step, record.loss) for record in read_metrics(path).steps] == [(1, 5.0), (2, 4.5), (3, 3.5)]


@pytest.mark.parametrize(
    ("event", "left"),
    [
        ({"event": "start", "step": 4}, [1, 2, 3]),
        ({"event": "start", "step": 1}, []),
        ({"event": "rewind", "step": 6, "to": 2}, [1, 2]),
        ({"event": "rewind", "step": 6, "to": None}, [1, 2, 3, 4, 5, 6]),
        ({"event": "validation", "step": 2, "validation_loss": {}}, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_steps_that_are_to_be_trained_again_are_none_of_the_runs(
    tmp_path: Path, event: dict[str, object], left: list[int]
) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, *(step_record(step) for step in range(1, 7)))
    with path.open("a") as file:
        file.write(json.dumps(event) + "\n")
    assert [record.step for record in read_metrics(path).steps] == left
    write(path, step_record(len(left) + 1, 9.0))
    assert read_metrics(path).steps[-1] == step_record(len(left) + 1, 9.0)


def test_every_cut_of_the_file_is_read_and_goes_on(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    write(whole, step_record(1), step_record(2))
    content = whole.read_bytes()
    first_line = content.index(b"\n") + 1
    for cut in range(len(content) + 1):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(content[:cut])
        before = [record.step for record in read_metrics(path).steps]
        assert before == [1, 2][: (cut >= first_line - 1) + (cut >= len(content) - 1)]
        write(path, step_record(7))
        assert [record.step for record in read_metrics(path).steps] == [*before, 7]


def test_lines_that_do_not_parse_are_ignored_wherever_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, step_record(1))
    good = path.read_text()
    path.write_text("{\n[1]\n\n3\n\x00\n" + good + '{"step": 2, "lo')
    metrics = read_metrics(path)
    assert [record.step for record in metrics.steps] == [1] and metrics.events == []


def test_only_a_steps_record_may_have_a_loss(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="may not have 'loss'"):
        writer.on_event({"event": "start", "loss": 1.0})
    with pytest.raises(ValueError, match="needs 'event'"):
        writer.on_event({"step": 3})
    writer.close()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", "1"),
        ("step", True),
        ("step", 1.5),
        ("step", -1),
        ("step", 10**400),
        ("loss", "low"),
        ("loss", [2.5]),
        ("loss", 10**400),
        ("lr", None),
        ("lr", True),
        ("stage", 3),
        ("memory_peak_bytes", 1e9),
    ],
)
def test_a_step_with_a_value_of_another_type_is_ignored(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, step_record(2))
    good = dataclasses.asdict(step_record(1))
    with path.open("a") as file:
        file.write(json.dumps({**good, key: value, "unknown": 1}) + "\n")
    assert [record.step for record in read_metrics(path).steps] == [2]


@pytest.mark.parametrize(
    "event",
    [
        {"event": 3},
        {"event": "validation", "step": "1", "validation_loss": {}},
        {"event": "validation", "step": 1, "validation_loss": [2.0]},
        {"event": "validation", "step": 1, "validation_loss": {"code": "low"}},
        {"event": "checkpoint", "step": "8", "num_bytes": 7, "error": None},
        {"event": "checkpoint", "step": 8, "num_bytes": None, "error": None},
        {"event": "rewind", "step": 8, "to": "6"},
        {"event": "evaluation", "step": 1, "bigram_bits_per_byte": 3},
        {"event": "evaluation", "step": 1, "arithmetic": {"correct": 1}},
        {"event": "evaluation", "step": 1, "source_loss": {"prose": "low"}},
        {"event": "evaluation", "step": 1, "benchmarks": {"arc": 0.5}},
        {"event": "evaluation", "step": 1, "benchmarks": 1},
    ],
)
def test_an_event_with_a_value_of_another_type_is_ignored(tmp_path: Path, event: dict[str, object]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(event) + '\n{"event": "start", "new": {"key": 1}}\n')
    assert [found["event"] for found in read_metrics(path).events] == ["start"]


def test_a_line_that_is_nested_without_end_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("[" * 200_000 + "\n" + '{"event": ' + '{"a": ' * 100_000 + "\n")
    write(path, step_record(1))
    assert [record.step for record in read_metrics(path).steps] == [1]
