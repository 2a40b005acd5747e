"""Alarms ring on growth, not on noise, once for each rise, and survive a restart."""

import json
from pathlib import Path
from typing import Literal

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from posttraining.alarm_limits import AlarmLimits
from posttraining.alarms import LENGTH, WAITS, LengthAlarms

Logs = list[dict[str, float]]


def lengths(*values: float) -> Logs:
    return [{LENGTH: value} for value in values]


def ring(
    tmp_path: Path, logs: Logs, *, action: Literal["stop", "warn"] = "stop", done: int = 0
) -> tuple[LengthAlarms, int | None]:
    """The alarms after these logs, of which the first `done` lie before a restart; and the step that ended training."""
    arguments, control = TrainingArguments(str(tmp_path), report_to="none"), TrainerControl()
    state = TrainerState(log_history=[{**record, "step": step} for step, record in enumerate(logs[:done], 1)])
    alarms = LengthAlarms(AlarmLimits(window=2, action=action), tmp_path / "alarms.jsonl")
    alarms.on_train_begin(arguments, state, control)
    for step, record in enumerate(logs[done:], done + 1):
        state.global_step = step
        alarms.on_log(arguments, state, control, logs=record)
        if control.should_training_stop:
            return alarms, step
    return alarms, None


def test_growth_beyond_the_limit_ends_training_with_the_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alarms, stopped = ring(tmp_path, lengths(800, 838, 900, 1600, 6281, 6281))
    assert stopped == 5
    (alarm,) = alarms.rung
    assert (alarm.baseline, alarm.value, alarm.limit) == (819, 3940.5, 1638)
    assert "alarm at step 5: completions/mean_length is 3940" in capsys.readouterr().out
    assert json.loads((tmp_path / "alarms.jsonl").read_text())["metric"] == LENGTH


def test_shrinking_and_noise_do_not_ring(tmp_path: Path) -> None:
    assert ring(tmp_path, lengths(100, 100, 350, 30, 40, 190, 180, 20))[0].rung == []


def test_waits_ring_by_their_rise(tmp_path: Path) -> None:
    logs = [{LENGTH: 100.0, WAITS: value} for value in (0.0, 0.2, 0.9, 1.1, 1.2)]
    alarms, stopped = ring(tmp_path, logs)
    assert stopped == 5 and alarms.rung[0].metric == WAITS


def test_warn_goes_on_and_rings_once_for_each_rise(tmp_path: Path) -> None:
    alarms, stopped = ring(tmp_path, lengths(10, 10, 30, 30, 30, 10, 10, 30, 30), action="warn")
    assert stopped is None
    assert [alarm.step for alarm in alarms.rung] == [4, 9]


def test_a_restart_is_judged_by_the_same_start(tmp_path: Path) -> None:
    logs = lengths(10, 10, 12, 15, 25, 30)
    assert ring(tmp_path, logs)[1] == ring(tmp_path, logs, done=3)[1] == ring(tmp_path, logs, done=4)[1] == 6


def test_a_restart_after_the_alarm_does_not_go_past_it(tmp_path: Path) -> None:
    assert ring(tmp_path, lengths(10, 10, 30, 30, 10, 10), done=4)[1] == 5
