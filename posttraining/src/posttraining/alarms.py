"""Alarms of GRPO: answers that only grow, and reasoning that keeps saying "wait".

Both are how a model games a reward that does not mind length: in SmolLM3's first attempts answers went from 819 to
6,281 tokens without being better.
"""

import json
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from posttraining.alarm_limits import AlarmLimits

LENGTH = "completions/mean_length"
WAITS = "rewards/waits/mean"
"""As TRL logs them; the second where the reward `posttraining.rewards.waits` is among the recipe's."""


@dataclass(frozen=True)
class Alarm:
    """One that rang."""

    step: int
    metric: str
    baseline: float
    value: float
    limit: float

    def __str__(self) -> str:
        return (
            f"alarm at step {self.step}: {self.metric} is {self.value:.4g}, above {self.limit:.4g} "
            f"(it was {self.baseline:.4g} at the start)"
        )


class Watch:
    """One metric: its mean over the first `window` values, and over the last."""

    def __init__(self, metric: str, window: int) -> None:
        self.metric = metric
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=window)
        self._window = window

    def add(self, value: float) -> tuple[float, float] | None:
        """(mean of the first, mean of the last `window` values); None until there is a window after the first."""
        if len(self._first) < self._window:
            self._first.append(value)
            return None
        self._last.append(value)
        if len(self._last) < self._window:
            return None
        return sum(self._first) / self._window, sum(self._last) / self._window


class LengthAlarms(TrainerCallback):
    """Reads TRL's log, writes what rings to `file` (one JSON object a line) and ends training if told to.

    A resumed run is judged by the same start: the log so far is read back from the trainer's state.
    """

    def __init__(self, limits: AlarmLimits, file: Path) -> None:
        self.rung: list[Alarm] = []
        self._limits, self._file = limits, file
        self._watches = [Watch(LENGTH, limits.window), Watch(WAITS, limits.window)]
        self._silenced: set[str] = set()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take up the log of the steps before a restart; what rang in it still counts."""
        for record in state.log_history:
            self.rung += self._look(record, int(record.get("step", 0)))
        control.should_training_stop |= bool(self.rung) and self._limits.action == "stop"

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        """Judge one record of the log."""
        for alarm in self._look(logs or {}, state.global_step):
            self.rung.append(alarm)
            control.should_training_stop |= self._limits.action == "stop"
            if state.is_world_process_zero:
                print(alarm, flush=True)
                with self._file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(alarm)) + "\n")

    def _look(self, record: dict[str, float], step: int) -> list[Alarm]:
        found = []
        for watch in self._watches:
            means = watch.add(float(record[watch.metric])) if watch.metric in record else None
            if means is None:
                continue
            baseline, value = means
            growth = watch.metric == LENGTH
            limit = baseline * self._limits.length_growth if growth else baseline + self._limits.waits_rise
            if value <= limit:
                self._silenced.discard(watch.metric)
            elif watch.metric not in self._silenced:
                self._silenced.add(watch.metric)
                found.append(Alarm(step, watch.metric, baseline, value, limit))
        return found
