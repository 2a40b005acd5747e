"""metrics.jsonl: the record of a run that tests, plots, ablations and status read."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from parallel.checkpoint_files import is_count

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
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        finally:
            os.close(self._descriptor)

    def _append(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(_finite(record), allow_nan=False).encode() + b"\n"
        if self._in_line:
            line = b"\n" + line
        try:
            written = os.write(self._descriptor, line)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
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
    """Read `path`. Lines that do not parse, and records with values of other types, are ignored; unknown keys too."""
    steps: dict[int, StepRecord] = {}
    events: list[Event] = []
    for line in path.read_bytes().split(b"\n"):
        record = _parse(line)
        if record is None:
            continue
        if "loss" in record:
            step = _step_record(record)
            if step is not None:
                steps[step.step] = step
        elif _is_event(record):
            events.append(record)
    return Metrics([steps[step] for step in sorted(steps)], events)


def validation_event(step: int, loss: Mapping[str, float]) -> Event:
    """The record of a validation after `step`; `loss` in nats per token, by source."""
    return {"event": "validation", "step": step, "validation_loss": dict(loss)}


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _step_record(record: Mapping[str, Any]) -> StepRecord | None:
    """The record of a step, None where a value is not of its type."""
    values = {field.name: record.get(field.name) for field in dataclasses.fields(StepRecord)}
    for field in dataclasses.fields(StepRecord):
        value = values[field.name]
        if field.type == float | None:
            is_right = value is None or _is_number(value)
        elif field.type is float:
            is_right = _is_number(value)
        else:
            is_right = isinstance(value, str) if field.type is str else is_count(value)
        if not is_right:
            return None
    return StepRecord(**values)  # type: ignore[arg-type]


def _is_event(record: Mapping[str, Any]) -> bool:
    """Whether a record is an event; of those that are read again, whether it has what is read."""
    match record.get("event"):
        case "validation":
            return is_count(record.get("step")) and _are_numbers(record.get("validation_loss"))
        case "evaluation":
            arithmetic = record.get("arithmetic", {"correct": 0, "total": 0})
            is_right = isinstance(arithmetic, dict) and all(is_count(arithmetic.get(k)) for k in ("correct", "total"))
            return is_count(record.get("step")) and is_right and _are_numbers(record.get("bigram_bits_per_byte", {}))
        case name:
            return isinstance(name, str)


def _are_numbers(by_source: object) -> bool:
    return isinstance(by_source, dict) and all(value is None or _is_number(value) for value in by_source.values())


def _is_number(value: object) -> bool:
    """A number that a float can hold; JSON's own are finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _finite(value: Any) -> Any:
    """`value` with every number that JSON has no word for replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_finite(item) for item in value]
    return value
