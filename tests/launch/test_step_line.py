import dataclasses
import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from launch.train.metrics import StepRecord, validation_event
from launch.train.step_line import (
    StepLine,
    ValidationRow,
    average,
    bits_per_byte,
    format_seconds,
    format_step,
    validation_table,
)
from launch.train.tensorboard import TensorBoard
from nanotron_recipes.numbers import counted

RECORD = StepRecord(
    step=7,
    tokens=7 * 3072,
    loss=2.34567,
    lr=9.3e-3,
    grad_norm=0.5432,
    tokens_per_second=101234.5,
    step_seconds=2.0,
    data_wait_seconds=0.1,
    memory_peak_bytes=532_000_000,
    mfu=0.312,
    stage="prose",
)


def record(step: int) -> StepRecord:
    return dataclasses.replace(RECORD, step=step)


def plain_console() -> tuple[Console, io.StringIO]:
    output = io.StringIO()
    return Console(file=output, force_terminal=False, soft_wrap=True), output


def test_the_line_has_every_number_a_trainer_wants() -> None:
    assert format_step(RECORD, 2000, 3987.0) == (
        "step    7/2000   0% |  1h06m left | loss 2.3457 | lr 9.30e-03 | norm 0.543 | 101,234 tok/s | prose | "
        "mfu 31.2% | wait 5.0% | mem 532 MB"
    )


def test_unknown_numbers_are_said_to_be_unknown() -> None:
    unknown = dataclasses.replace(RECORD, loss=None, grad_norm=None, mfu=None)
    assert "loss n/a | lr 9.30e-03 | norm n/a | 101,234 tok/s | prose | mfu n/a" in format_step(unknown, 2000, 1.0)


def test_a_log_gets_the_first_the_last_and_some_lines_between() -> None:
    console, output = plain_console()
    line = StepLine(20, every_steps=3, every_seconds=8.0, console=console)
    for step in range(1, 21):
        line.on_step(record(step))
    line.close()
    shown = [int(text.split()[1].split("/")[0]) for text in output.getvalue().splitlines()]
    # 2 seconds a step: 4 steps make 8 seconds, and are more than 3.
    assert shown == [1, 5, 9, 13, 17, 20]


def test_a_line_tells_the_mean_speed_of_the_steps_since_the_line_before() -> None:
    console, output = plain_console()
    line = StepLine(5, every_steps=3, every_seconds=0.0, console=console)
    for step, seconds in enumerate((9.0, 1.0, 1.0, 4.0), start=1):
        speeds = {"tokens_per_second": 1200 / seconds, "mfu": 0.6 / seconds, "data_wait_seconds": seconds / 2}
        line.on_step(dataclasses.replace(record(step), step_seconds=seconds, **speeds))
    shown = output.getvalue().splitlines()
    assert [text.split()[1] for text in shown] == ["1/5", "4/5"]
    assert "133 tok/s | prose | mfu 6.7% | wait 50.0%" in shown[0]
    # 3 × 1200 tokens in 6 seconds; the mean of the three speeds would be 900.
    assert "600 tok/s | prose | mfu 30.0% | wait 50.0%" in shown[1]
    unknown = [dataclasses.replace(record(1), mfu=0.5), dataclasses.replace(record(2), mfu=None)]
    assert average(unknown).mfu is None and average(unknown[:1]) == unknown[0]
    still = dataclasses.replace(record(1), step_seconds=0.0)
    assert average([still]) == still


def test_numbers_and_nouns_agree() -> None:
    assert [counted(1, "replica"), counted(2, "replica")] == ["1 replica", "2 replicas"]
    assert [counted(1, "micro-batch"), counted(1200, "micro-batch")] == ["1 micro-batch", "1,200 micro-batches"]


def test_the_last_step_of_a_run_that_is_stopped_is_shown() -> None:
    console, output = plain_console()
    line = StepLine(2000, every_steps=100, console=console)
    for step in range(1, 8):
        line.on_step(record(step))
    line.close()
    assert [text.split()[1] for text in output.getvalue().splitlines()] == ["1/2000", "7/2000"]


def test_a_terminal_keeps_one_line_and_what_is_printed_stays_above_it() -> None:
    output = io.StringIO()
    line = StepLine(9, console=Console(file=output, force_terminal=True, width=160))
    for step in range(1, 10):
        line.on_step(record(step))
        if step == 4:
            line.on_event(validation_event(4, {"code": 1.5, "prose": 2.25}))
    line.close()
    text = output.getvalue()
    assert "step 4: validation loss (nats/token)  code 1.5000  prose 2.2500" in text
    assert text.index("validation loss") < text.rindex("step 9/9")


def test_skipped_steps_spikes_and_what_follows_have_a_line() -> None:
    console, output = plain_console()
    line = StepLine(9, console=console)
    line.on_event({"event": "skipped", "step": 3, "sources": ["code", "prose"], "in_a_row": 1})
    line.on_event({"event": "spike", "step": 5, "spike_loss": 7.5, "median": 2.25, "limit": 2.5})
    back = {"event": "rewind", "step": 5, "to": 2, "skipped": [3, 8], "reason": None, "refused": {"4": "no manifest"}}
    line.on_event(back)
    line.on_event({**back, "to": None, "skipped": None, "reason": "there is none", "refused": {}})
    assert output.getvalue().splitlines() == [
        "step 3: skipped, loss or gradient norm is not finite (sources: code, prose)",
        "step 5: loss spike, 7.5000 where the median is 2.2500",
        "checkpoint of step 4 refused: no manifest",
        "step 5: back to step 2; batches 3 to 7 are skipped",
        "step 5: training goes on after the spike: there is none",
    ]


def test_the_table_compares_before_after_and_bigram_by_source() -> None:
    console, output = plain_console()
    rows = [ValidationRow("code", 6.9, 2.0, 2.5, 2.4), ValidationRow("mine", None, 1.0, None, None)]
    console.print(validation_table(rows))
    cells = [text.split("│")[1:-1] for text in output.getvalue().splitlines() if "│" in text]
    assert [[cell.strip() for cell in row] for row in cells] == [
        ["code", "6.9000", "2.0000", "3.982", "1.154", "2.400"],
        ["mine", "n/a", "1.0000", "n/a", "n/a", "n/a"],
    ]


def test_bits_per_byte_of_a_uniform_byte_model_are_eight() -> None:
    assert bits_per_byte(math.log(256), 1.0) == pytest.approx(8.0)


def test_times_are_short() -> None:
    assert [format_seconds(value) for value in (0.4, 59.6, 3599, 7500, 90000 * 11)] == [
        "0s",
        "1m00s",
        "59m59s",
        "2h05m",
        "11d11h",
    ]


def test_tensorboard_gets_the_same_records_and_forgets_steps_that_are_trained_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first_step, last_step, loss in ((1, 5, 3.0), (4, 6, 2.0)):
        board = TensorBoard(tmp_path, first_step)
        for step in range(first_step, last_step + 1):
            board.on_step(dataclasses.replace(record(step), loss=loss))
        board.on_event(validation_event(last_step, {"code": 1.5}))
        board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, 3.0),
        (2, 3.0),
        (3, 3.0),
        (4, 2.0),
        (5, 2.0),
        (6, 2.0),
    ]
    assert [event.step for event in events.Scalars("validation/code")] == [6]
    assert {"train/lr", "train/mfu", "train/tokens_per_second"} <= set(events.Tags()["scalars"])


def test_tensorboard_forgets_what_a_run_went_back_over(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path, 1)
    for steps, loss in ((range(1, 6), 3.0), (range(3, 5), 2.0)):
        for step in steps:
            board.on_step(dataclasses.replace(record(step), loss=loss))
        board.on_event({"event": "rewind", "step": 5, "to": 2 if loss == 3.0 else None})
    board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, 3.0),
        (2, 3.0),
        (3, 2.0),
        (4, 2.0),
    ]
