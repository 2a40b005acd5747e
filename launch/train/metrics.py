"""metrics.jsonl: the record of a run that tests, plots, ablations and status read."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

EventName = Literal["start", "validation", "evaluation", "checkpoint", "skipped", "spike", "rewind"]
Event = dict[str, Any]
"""A record other than a step's: `event` (an EventName), mostly `step`, and what belongs to that event."""


@dataclass(frozen=True)
class StepRecord:
    """What is written about one training step. None where a value is unknown or was not finite."""

    step: int
    """Counts from 1."""
    tokens: int
    """Consumed after this step, since the first one, by the whole run."""
    loss: float | None
    """Nats per valid target of the global batch, before this step's update, at full precision."""
    lr: float
    """The rate that this step trained with."""
    grad_norm: float | None
    """L2 norm of the whole gradient before clipping."""
    tokens_per_second: float
    """Of the whole run, not of one rank."""
    step_seconds: float
    """Wall time from the end of the step before to the end of this one."""
    data_wait_seconds: float
    """The part of it spent waiting for the loader."""
    memory_peak_bytes: int
    """Largest memory of a rank so far: allocated on the GPU, else resident."""
    mfu: float | None
    """Model FLOPs per second as a fraction of the devices' peak; None where the peak is unknown."""
    stage: str
    """Name of the data stage."""


_STEP_KEYS = [field.name for field in dataclasses.fields(StepRecord)]


class Callback(Protocol):
    """Something that is told what happens in a run: the file, the live line, TensorBoard, wandb."""

    def on_step(self, record: StepRecord) -> None:
        """Called on rank 0 after every step."""

    def on_event(self, event: Event) -> None:
        """Called on rank 0 for every record that is not a step's."""

    def close(self) -> None:
        """Called once, however the run ends."""


class MetricsWriter:
    """A callback that appends to metrics.jsonl, one whole line a system call."""

    def __init__(self, path: Path) -> None:
        """Open or make `path`; a last line that a crash cut short is closed first, and readers ignore it."""
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        size = os.fstat(self._descriptor).st_size
        self._in_line = size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"

    def on_step(self, record: StepRecord) -> None:
        """Append the record of a step."""
        self._append(dataclasses.asdict(record))

    def on_event(self, event: Event) -> None:
        """Append another record; raises ValueError for one that readers would take for a step's."""
        if "event" not in event or "loss" in event:
            raise ValueError(f"a record that is not a step's needs 'event' and may not have 'loss': {event}")
        self._append(event)

    def close(self) -> None:
        """Flush to the disk and close the file."""
        os.fsync(self._descriptor)
        os.close(self._descriptor)

    def _append(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(_finite(record), allow_nan=False).encode() + b"\n"
        if self._in_line:
            line = b"\n" + line
        written = os.write(self._descriptor, line)
        self._in_line = written < len(line)
        if self._in_line:
            raise OSError(f"{self._path}: {written} of {len(line)} bytes could be written")


@dataclass(frozen=True)
class Metrics:
    """What metrics.jsonl says."""

    steps: list[StepRecord]
    """One record a step, ascending; after a resume the last one written."""
    events: list[Event]
    """All other records in the order of writing."""


def read_metrics(path: Path) -> Metrics:
    """Read `path`. Lines that do not parse are ignored, and unknown keys of a step's record too."""
    steps: dict[int, StepRecord] = {}
    events: list[Event] = []
    for line in path.read_bytes().split(b"\n"):
        record = _parse(line)
        if record is None:
            continue
        if "loss" in record and isinstance(record.get("step"), int):
            step = StepRecord(**{key: record.get(key) for key in _STEP_KEYS})  # type: ignore[arg-type]
            steps[step.step] = step
        elif "event" in record:
            events.append(record)
    return Metrics([steps[step] for step in sorted(steps)], events)


def validation_event(step: int, loss: Mapping[str, float]) -> Event:
    """The record of a validation after `step`; `loss` in nats per token, by source."""
    return {"event": "validation", "step": step, "validation_loss": dict(loss)}


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _finite(value: Any) -> Any:
    """`value` with every number that JSON has no word for replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_finite(item) for item in value]
    return value
